"""Settings of a streamed catalogue, each with its meaning, of which `contrec generate` makes its arguments."""

from dataclasses import dataclass, field

from contrec_dist.errors import ConfigError

MAX_ITEMS, MAX_USERS = 2**31, 2**40


def _setting(default: float, meaning: str):
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings:
    """What `contrec generate` is asked for. Errors   ConfigError naming the argument."""

    num_items: int = _setting(1_000_000, "items of the catalogue")
    num_users: int = _setting(1_000_000, "users")
    mean_history: float = _setting(12.0, "mean interactions a user, before the cap")
    min_history: int = _setting(5, "fewest interactions a user")
    max_history: int = _setting(200, "most interactions a user; a quarter of the items if that is less")
    popularity_exponent: float = _setting(1.0, "exponent of the power law that item popularity follows past its head")
    category_stickiness: float = _setting(0.6, "probability that the next item follows a transition of the last one")
    seed: int = _setting(0, "seed of every draw")

    def __post_init__(self):
        if not 1 <= self.min_history <= self.mean_history <= self.max_history:
            got = (self.min_history, self.mean_history, self.max_history)
            raise ConfigError("--min_history, --mean_history, --max_history", got, "1 <= min <= mean <= max")
        limits = {
            "num_items": (4 * self.min_history, MAX_ITEMS),
            "num_users": (1, MAX_USERS),
            "popularity_exponent": (0, 4),
            "category_stickiness": (0, 0.99),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"--{name}", getattr(self, name), f"{low} to {high}")

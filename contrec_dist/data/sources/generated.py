"""A generated catalogue with a known best recommender: titled items, a Zipf tail, histories that can be learned.

Items belong to categories and, inside one, to product lines (the noun of the title). The first item of a user is drawn
by popularity; its category is the user's home. Every next item is drawn from

    stickiness * successors(last item) + (1 - stickiness) * (0.6 popularity in the home category + 0.4 popularity)

with items already seen excluded and the rest scaled to one. An item has 20 successors (fewer in small categories) of
Zipf weights: the even places are shared by its product line, the odd ones its own; two thirds lie in its category, the
others in a companion one. So titles say something about what comes next, and only the order says all of it. The draw
depends on nothing but the history, so `next_item_probabilities` is exact and no model can do better on average.

Measured at the default settings (seed 0, HR@10 of the test targets): this law .49, popularity .04, counts of the
training transitions .32 by item and .38 with those of the product line.

Cost: a second for 2,000 items and 4,000 users. The draw is by rejection (draw, draw again where seen), which gives
the excluded and rescaled distribution exactly, without a users x items matrix.
"""

from functools import lru_cache
from pathlib import Path
from typing import Sequence

import numpy as np
import polars as pl

from contrec_dist.config import Config, GeneratedConfig
from contrec_dist.data.sources.generated_words import BRAND_SYLLABLES, CATEGORIES
from contrec_dist.data.sources.raw import RawLogs, RawTable, locate_by_row
from contrec_dist.errors import ConfigError

MAX_SUCCESSORS = 20
MIN_CATEGORY_ITEMS = 6
SUCCESSOR_EXPONENT = 0.8
COMPANION_RATIO = 1 / 3
HOME_RATIO = 0.6
BRANDS_A_CATEGORY = 5
FIRST_TIME_SECONDS = 1_600_000_000
MEAN_GAP_SECONDS = 5 * 86_400


def source_files(config: Config) -> dict[str, Path]:
    """None: everything follows from config.source.generated and config.seed."""
    return {}


def read(config: Config) -> RawLogs:
    """Generate the interactions and the items."""
    catalogue = GeneratedCatalogue.of(config)
    users, items, seconds = catalogue.draw_histories()
    ids = pl.Series("item_id", catalogue.item_ids)
    row = pl.int_range(len(items), dtype=pl.Int64, eager=True).alias("row")
    no_fault = pl.lit(None, dtype=pl.String).alias("fault")
    frame = pl.DataFrame([row, ids.gather(items), pl.Series("time", seconds)]).with_columns(no_fault)
    user_ids = pl.Series("user_id", [f"user{user:06d}" for user in range(users.max() + 1)])
    frame = frame.with_columns(user_ids.gather(users))
    path = Path("generated")
    interactions = RawTable(frame=frame, path=path, locate=locate_by_row(path))
    item_table = RawTable(frame=catalogue.item_frame(), path=path, locate=locate_by_row(path))
    return RawLogs(interactions=interactions, items=item_table, time_unit="s")


def oracle_recommendations(
    config: Config, histories_item_ids: Sequence[Sequence[str]], k: int, among: Sequence[str] | None = None
) -> list[list[str]]:
    """The k likeliest next items of every history, best first: the best that any recommender can do.

    `among` restricts them to items that a filtered catalogue still has. Seen items are never among them.
    """
    catalogue = GeneratedCatalogue.of(config)
    allowed = np.ones(catalogue.num_items, dtype=bool)
    if among is not None:
        allowed[:] = False
        allowed[catalogue.numbers(among)] = True
    return [catalogue.best_items(history, k, allowed) for history in histories_item_ids]


class GeneratedCatalogue:
    """Items, the law by which users choose them, and the users' draws; a function of (settings, seed)."""

    def __init__(self, settings: GeneratedConfig, seed: int):
        _check(settings)
        self.settings, self.seed = settings, seed
        self.num_items = settings.num_items
        rng = np.random.default_rng([seed, 0])
        self._draw_items(rng)
        self._draw_popularity(rng)
        self._draw_successors(rng)

    @classmethod
    def of(cls, config: Config) -> "GeneratedCatalogue":
        """The catalogue of a config of kind 'generated'; built once a process."""
        g = config.source.generated
        return _build_once(tuple((name, getattr(g, name)) for name in g.__dataclass_fields__), config.seed)

    def item_frame(self) -> pl.DataFrame:
        """[row, item_id, title, category, brand, text, fault]."""
        columns = {
            "item_id": self.item_ids,
            "title": self.titles,
            "category": [_category_words(c)[0] for c in self.category],
            "brand": self.brands,
            "text": [""] * self.num_items,
        }
        row = pl.int_range(pl.len(), dtype=pl.Int64).alias("row")
        return pl.DataFrame(columns).select(row, pl.all(), pl.lit(None, dtype=pl.String).alias("fault"))

    def numbers(self, item_ids: Sequence[str]) -> np.ndarray:
        """Item numbers of ids."""
        return np.array([self._number_of[item_id] for item_id in item_ids], dtype=np.int64)

    def next_item_probabilities(self, history_item_ids: Sequence[str]) -> np.ndarray:
        """(N,) float64: exactly the law by which the item after this history is drawn; seen items have 0.

        An empty history gives popularity.
        """
        if not len(history_item_ids):
            return self.popularity.copy()
        history = self.numbers(history_item_ids)
        settings, home = self.settings, self.category[history[0]] == self.category
        in_home = np.where(home, self.popularity, 0.0)
        fresh = HOME_RATIO * in_home / in_home.sum() + (1 - HOME_RATIO) * self.popularity
        law = (1 - settings.category_stickiness) * fresh
        np.add.at(law, self.successors[history[-1]], settings.category_stickiness * self.successor_weights)
        law[history] = 0.0
        return law / law.sum()

    def best_items(self, history_item_ids: Sequence[str], k: int, allowed: np.ndarray) -> list[str]:
        """Ids of the k likeliest allowed items, best first, ties by item number."""
        law = np.where(allowed, self.next_item_probabilities(history_item_ids), 0.0)
        top = np.argsort(-law, kind="stable")[:k]
        return [self.item_ids[i] for i in top if law[i] > 0]

    def draw_histories(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every user's history, user after user.

        Shapes   user, item, unix seconds: all (M,) int64; seconds increase inside a user
        """
        rng = np.random.default_rng([self.seed, 1])
        s = self.settings
        lengths = s.min_history - 1 + rng.geometric(1 / (s.mean_history - s.min_history + 1), s.num_users)
        lengths = np.minimum(lengths, s.num_items // 4)
        drawn = np.full((s.num_users, lengths.max()), -1, dtype=np.int64)
        for step in range(lengths.max()):
            self._draw_step(rng, drawn, np.flatnonzero(lengths > step), step)
        users = np.repeat(np.arange(s.num_users), lengths)
        return users, drawn[drawn >= 0], _draw_times(rng, users)

    def _draw_step(self, rng: np.random.Generator, drawn: np.ndarray, users: np.ndarray, step: int) -> None:
        """Write column `step` for `users`; who draws a seen item draws again."""
        while len(users):
            items = self._propose(rng, drawn[users], step)
            seen = (drawn[users, :step] == items[:, None]).any(axis=1)
            drawn[users[~seen], step] = items[~seen]
            users = users[seen]

    def _propose(self, rng: np.random.Generator, histories: np.ndarray, step: int) -> np.ndarray:
        """One draw a row from the law before seen items are excluded."""
        num = len(histories)
        everywhere = self._draw_popular(rng.random(num), np.zeros(num), np.ones(num))
        if step == 0:
            return everywhere
        home = self.category[histories[:, 0]]
        at_home = self._draw_popular(rng.random(num), self._category_bounds[home], self._category_bounds[home + 1])
        fresh = np.where(rng.random(num) < HOME_RATIO, at_home, everywhere)
        place = np.searchsorted(np.cumsum(self.successor_weights)[:-1], rng.random(num), side="right")
        follower = self.successors[histories[:, step - 1], place]
        return np.where(rng.random(num) < self.settings.category_stickiness, follower, fresh)

    def _draw_popular(self, uniform: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Items by popularity, between two bounds of the cumulative popularity in category order."""
        place = np.searchsorted(self._cumulative, low + uniform * (high - low), side="right")
        return self._by_category[np.minimum(place, self.num_items - 1)]

    def _draw_items(self, rng: np.random.Generator) -> None:
        """Category, line, brand and title of every item; the numbering mixes the categories."""
        num_categories = self.settings.num_categories
        self.category = rng.permutation(np.arange(self.num_items) % num_categories)
        self.line = np.array([rng.integers(len(_category_words(c)[1])) for c in self.category])
        brand = rng.integers(BRANDS_A_CATEGORY, size=self.num_items)
        starts, ends = BRAND_SYLLABLES
        names = [start + end for end in ends for start in starts]
        self.brands = [names[(c * BRANDS_A_CATEGORY + b) % len(names)] for c, b in zip(self.category, brand)]
        self.item_ids = [f"G{i:06d}" for i in range(self.num_items)]
        self._number_of = {item_id: i for i, item_id in enumerate(self.item_ids)}
        self.titles = []
        for i, c in enumerate(self.category):
            _, lines, adjectives = _category_words(c)
            adjective = adjectives[rng.integers(len(adjectives))]
            self.titles.append(f"{self.brands[i]} {adjective} {lines[self.line[i]]} {100 + i}")

    def _draw_popularity(self, rng: np.random.Generator) -> None:
        """Zipf inside every category, categories alike; cumulative in category order for drawing."""
        self.popularity = np.zeros(self.num_items)
        for c in range(self.settings.num_categories):
            members = rng.permutation(np.flatnonzero(self.category == c))
            weights = _zipf(len(members), self.settings.popularity_exponent)
            self.popularity[members] = weights / self.settings.num_categories
        self._by_category = np.argsort(self.category, kind="stable")
        self._cumulative = np.cumsum(self.popularity[self._by_category])
        ends = np.searchsorted(self.category[self._by_category], np.arange(self.settings.num_categories), side="right")
        self._category_bounds = np.concatenate([[0.0], self._cumulative[ends - 1]])

    def _draw_successors(self, rng: np.random.Generator) -> None:
        """(N, successors) items: even places shared by the product line, odd places the item's own."""
        num_categories = self.settings.num_categories
        circle = rng.permutation(num_categories)
        companion = np.empty_like(circle)
        companion[circle] = np.roll(circle, 1)
        members = [np.flatnonzero(self.category == c) for c in range(num_categories)]
        half = min(MAX_SUCCESSORS // 2, min(len(m) for m in members) // 3)
        shared: dict[tuple[int, int], np.ndarray] = {}
        self.successors = np.empty((self.num_items, 2 * half), dtype=np.int64)
        for i, (c, line) in enumerate(zip(self.category, self.line)):
            if (c, line) not in shared:
                shared[c, line] = _pick(rng, members[c], members[companion[c]], half, ())
            own = _pick(rng, members[c], members[companion[c]], half, (i, *shared[c, line]))
            self.successors[i, 0::2], self.successors[i, 1::2] = shared[c, line], own
        self.successor_weights = _zipf(2 * half, SUCCESSOR_EXPONENT)


@lru_cache(maxsize=2)
def _build_once(settings: tuple, seed: int) -> GeneratedCatalogue:
    return GeneratedCatalogue(GeneratedConfig(**dict(settings)), seed)


def _check(settings: GeneratedConfig) -> None:
    smallest = settings.num_categories * MIN_CATEGORY_ITEMS
    if settings.num_categories < 1 or settings.num_items < smallest:
        expected = f"at least {smallest} for {settings.num_categories} categories"
        raise ConfigError("source.generated.num_items", settings.num_items, expected)
    if not 1 <= settings.min_history <= settings.mean_history:
        expected = f"1 to mean_history ({settings.mean_history})"
        raise ConfigError("source.generated.min_history", settings.min_history, expected)
    if not 0 <= settings.category_stickiness < 1:
        raise ConfigError("source.generated.category_stickiness", settings.category_stickiness, "0 to below 1")


def _category_words(category: int) -> tuple[str, list[str], list[str]]:
    """Name, lines and adjectives; past the written list the words repeat under a numbered name."""
    name, lines, adjectives = CATEGORIES[category % len(CATEGORIES)]
    series = category // len(CATEGORIES)
    return f"{name} {series + 1}" if series else name, lines.split("|"), adjectives.split("|")


def _zipf(number: int, exponent: float) -> np.ndarray:
    weights = 1.0 / np.arange(1, number + 1) ** exponent
    return weights / weights.sum()


def _pick(rng: np.random.Generator, home: np.ndarray, companion: np.ndarray, number: int, without: tuple) -> np.ndarray:
    """`number` different items, about COMPANION_RATIO of them from the companion category, in random order."""
    from_companion = rng.binomial(number, COMPANION_RATIO)
    companion = np.setdiff1d(companion, without)
    home = np.setdiff1d(np.setdiff1d(home, without), companion)
    from_companion = max(from_companion, number - len(home))
    away = rng.choice(companion, from_companion, replace=False)
    near = rng.choice(home, number - from_companion, replace=False)
    return rng.permutation(np.concatenate([away, near]))


def _draw_times(rng: np.random.Generator, users: np.ndarray) -> np.ndarray:
    """Unix seconds, strictly increasing inside a user; users begin at different times."""
    gaps = 1 + rng.exponential(MEAN_GAP_SECONDS, len(users)).astype(np.int64)
    total = np.cumsum(gaps)
    first = np.flatnonzero(np.diff(users, prepend=-1))
    starts = FIRST_TIME_SECONDS + rng.integers(0, 365 * 86_400, len(first))
    return total + np.repeat(starts - total[first], np.diff(np.append(first, len(users))))

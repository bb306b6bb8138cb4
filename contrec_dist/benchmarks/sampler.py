"""Few solver steps against 200 ancestral ones on a finished run: HR@10 of samples on validation users, and seconds.

    python launchers/benchmark.py sampler --config configs/beauty.yaml run_dir=...
    python launchers/benchmark.py sampler ... --chains ddpm:10 ddpm:10:step_spacing=2,guidance_max_sigma=0.999

Every chain draws score.num_samples latents a user with score.guidance and is ranked as `score.rank_by=samples` ranks. What a
chain does not name is the config's; the reference's steps are evenly spaced and all guided whatever the config says. HR@10
is a mean over users and seeds. Chains are compared on the same users; the interval of a ratio is a bootstrap over users of
their mean hits over seeds, so it holds the noise of the draws too.

Seconds are CPU seconds of the sampler alone, one thread. The chains take turns on every chunk of users, each turn begun by
another chain, and what is ranked is ranked between the turns; "times faster" is the median over turns of the ratio within
a turn, so that other work on the machine, which comes and goes, meets both alike.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table

from contrec_dist.config import Config, ScoreConfig, load_config
from contrec_dist.errors import ConfigError
from contrec_dist.model.export import load_export
from contrec_dist.progress import track
from contrec_dist.retrieval.retriever import Retriever
from contrec_dist.retrieval.scored_users import Users
from contrec_dist.retrieval.user_views import UserViews

HIT_CUT = 10
CHUNK_USERS = 1024
NUM_RESAMPLES = 2000
LEVEL = 0.95
PLAIN = {"guidance_min_sigma": 0.0, "guidance_max_sigma": 1.0, "step_spacing": 1.0}
SETTINGS = {*PLAIN, "guidance"}


@dataclass(frozen=True)
class Chain:
    """A solver, its number of steps and settings of its own, written dpm:10 or dpm:10:step_spacing=2,guidance_max_sigma=0.999."""

    solver: str
    num_steps: int
    settings: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, name: str) -> "Chain":
        """Raises ConfigError for what is no SOLVER:STEPS[:NAME=VALUE,...], or a name that is not in SETTINGS."""
        try:
            solver, steps, *rest = name.split(":", 2)
            pairs = [pair.split("=") for pair in rest[0].split(",")] if rest else []
            settings = tuple((key, float(value)) for key, value in pairs)
            chain = cls(solver, int(steps), settings)
        except ValueError:
            raise ConfigError("--chains", name, "SOLVER:STEPS[:NAME=VALUE,...], for example ddpm:10:step_spacing=2") from None
        if not set(dict(settings)) <= SETTINGS:
            raise ConfigError("--chains", name, f"settings among {sorted(SETTINGS)}")
        return chain

    def __str__(self) -> str:
        own = ",".join(f"{name}={value:g}" for name, value in self.settings)
        return f"{self.solver}:{self.num_steps}" + (f":{own}" if own else "")

    def score(self, score: ScoreConfig, *, plain: bool) -> ScoreConfig:
        """The chain's settings; those it does not name are the config's, or with `plain` steps evenly spaced, all guided."""
        return replace(
            score, **{**(PLAIN if plain else {}), **dict(self.settings)}, solver=self.solver, num_sampling_steps=self.num_steps
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the chains, and how many users and seeds they are measured on."""
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file of a finished run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, for example run_dir=... score.guidance=2")
    chains = ["ddpm:5", "ddpm:10", "ddpm:20", "ddim:10", "dpm:10"]
    parser.add_argument("--chains", nargs="+", default=chains, metavar="SOLVER:STEPS[:NAME=VALUE,...]", help="what is measured")
    parser.add_argument("--reference", default="ddpm:200", metavar="SOLVER:STEPS[:NAME=VALUE,...]", help="what it is compared with")
    parser.add_argument("--users", type=int, default=0, help="validation users, spread over all (0: all)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of every chain")


def run(parsed: argparse.Namespace) -> dict:
    """Measure every chain; print the table. Returns the figures."""
    torch.set_num_threads(1)
    config = load_config(parsed.config, parsed.overrides)
    config.score.rank_by = "samples"
    bench = SamplerBench.open(config, parsed.users)
    names = [parsed.reference, *(name for name in parsed.chains if name != parsed.reference)]
    chains = [Chain.parse(name) for name in names]
    scores = [chain.score(config.score, plain=not number) for number, chain in enumerate(chains)]
    hits, seconds = bench.measure(scores, parsed.seeds)
    records = [
        describe(chain, hits[number], seconds[number], hits[0], seconds[0], num_seeds=parsed.seeds, seed=config.seed)
        for number, chain in enumerate(chains)
    ]
    print_table(records, config, len(bench.users), parsed.seeds)
    settings = {name: getattr(config.score, name) for name in ("guidance", "num_samples", *PLAIN)}
    return {"users": len(bench.users), "seeds": parsed.seeds, **settings, "chains": records}


@dataclass
class SamplerBench:
    """Users whose histories were read once, and what ranks the samples drawn for them."""

    views: UserViews
    retriever: Retriever
    users: Users
    condition: torch.Tensor

    @classmethod
    def open(cls, config: Config, num_users: int) -> "SamplerBench":
        views = UserViews.open(config, *load_export(config.folder("model")))
        everyone = views.users.with_target("validation")
        count = min(num_users or len(everyone), len(everyone))
        users = views.users.pick("validation", everyone[np.linspace(0, len(everyone) - 1, count).astype(np.int64)])
        condition = views.read_users(users, reasoning=False).condition
        return cls(views, Retriever.open(config), users, condition)

    def measure(self, scores: Sequence[ScoreConfig], num_seeds: int) -> tuple[np.ndarray, np.ndarray]:
        """Share of seeds in which a user's target was found, (scores, B), and CPU seconds of every turn, (scores, turns).

        A turn is a seed's draw for one chunk of users; all chains draw from the same generator state.
        """
        rows = np.arange(len(self.users))
        chunks = [rows[start : start + CHUNK_USERS] for start in range(0, len(rows), CHUNK_USERS)]
        hits, seconds = np.zeros((len(scores), len(rows))), np.zeros((len(scores), num_seeds * len(chunks)))
        retrievers = [replace(self.retriever, score=score) for score in scores]
        for turn in track(range(seconds.shape[1]), stage="benchmark", unit="turns", total=seconds.shape[1]):
            part = chunks[turn % len(chunks)]
            samples = {}
            for number in np.roll(np.arange(len(scores)), -turn):  # what a turn begins with may find cold caches
                began = time.process_time()
                samples[number] = retrievers[number].draw_samples(self.views, self.condition[part], turn)
                seconds[number, turn] = time.process_time() - began
            users = take_users(self.users, part)
            for number, drawn in samples.items():
                _, item_idx = retrievers[number].rank_samples(drawn, users, ("masked",))["masked"]
                hits[number, part] += (item_idx[:, :HIT_CUT] == users.targets[:, None]).any(axis=1)
        return hits / num_seeds, seconds


def take_users(users: Users, rows: np.ndarray) -> Users:
    """Some of them, whole histories."""
    longest = int(np.diff(users.offsets).max(initial=0))
    items, offsets = users.newest(rows, longest)
    return replace(
        users, user_ids=users.user_ids[rows], user_idx=users.user_idx[rows], items=items, offsets=offsets, targets=users.targets[rows]
    )


def describe(
    chain: Chain, hits: np.ndarray, seconds: np.ndarray, reference: np.ndarray, reference_seconds: np.ndarray,
    *, num_seeds: int, seed: int,
) -> dict:  # fmt: skip
    """HR@10, its share of the reference's with a paired interval, and how much faster the chain is. seconds: of every turn."""
    low, high = ratio_interval(hits, reference, seed)
    faster = reference_seconds / seconds
    return {
        "chain": str(chain),
        "hr": float(hits.mean()),
        "share": float(hits.mean() / reference.mean()) if reference.any() else float("nan"),
        "share_interval": [low, high],
        "seconds": float(seconds.sum() / num_seeds),
        "times_faster": float(np.median(faster)),
        "times_faster_quartiles": [float(np.percentile(faster, percent)) for percent in (25, 75)],
    }


def ratio_interval(hits: np.ndarray, reference: np.ndarray, seed: int) -> tuple[float, float]:
    """Bootstrap over users of mean(hits) / mean(reference)."""
    if hits is reference or not reference.any():
        return 1.0, 1.0
    draw, ratios = np.random.default_rng(seed), np.empty(NUM_RESAMPLES)
    for number in range(NUM_RESAMPLES):
        rows = draw.integers(len(hits), size=len(hits))
        ratios[number] = hits[rows].sum() / max(reference[rows].sum(), 1e-12)
    tail = 50 * (1 - LEVEL)
    return float(np.percentile(ratios, tail)), float(np.percentile(ratios, 100 - tail))


def print_table(records: list[dict], config: Config, num_users: int, num_seeds: int) -> None:
    title = (
        f"{config.score.num_samples} samples a user, guidance {config.score.guidance:g}, {num_users:,} validation users, "
        f"{num_seeds} seeds"
    )
    figures = (f"HR@{HIT_CUT}", "of the reference", f"{LEVEL:.0%} interval", "CPU seconds", "times faster")
    table = Table(Column("chain", overflow="fold"), *figures, title=title)
    for record in records:
        low, high = record["share_interval"]
        table.add_row(
            record["chain"], f"{record['hr']:.4f}", f"{record['share']:.1%}", f"{low:.1%} to {high:.1%}", f"{record['seconds']:.1f}",
            f"{record['times_faster']:.1f}",
        )  # fmt: skip
    Console(width=max(110, Console().width)).print(table)

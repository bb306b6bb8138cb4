"""Few solver steps against 200 ancestral ones on a finished run: HR@10 of samples on validation users, and seconds.

    python launchers/benchmark.py sampler --config configs/beauty.yaml run_dir=...

Every chain draws score.num_samples latents a user with score.guidance and is ranked as `score.rank_by=samples` ranks; the
reference is guided at every step, the others down to score.guidance_min_sigma. HR@10
is a mean over users and seeds. Chains are compared on the same users; the interval of a ratio is a bootstrap over users of
their mean hits over seeds, so it holds the noise of the draws too. Seconds are CPU seconds of the sampler alone, one thread.
"""

import argparse
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from contrec_dist.config import Config, load_config
from contrec_dist.model.export import load_export
from contrec_dist.progress import get_logger
from contrec_dist.retrieval.retriever import Retriever
from contrec_dist.retrieval.scored_users import Users
from contrec_dist.retrieval.user_views import UserViews

HIT_CUT = 10
CHUNK_USERS = 1024
NUM_RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Chain:
    """A solver and its number of steps; the name is how the command line writes it, for example dpm:10."""

    solver: str
    num_steps: int

    @classmethod
    def parse(cls, name: str) -> "Chain":
        solver, _, steps = name.partition(":")
        return cls(solver, int(steps))

    def __str__(self) -> str:
        return f"{self.solver}:{self.num_steps}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the chains, and how many users and seeds they are measured on."""
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file of a finished run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, for example run_dir=... score.guidance=2")
    chains = ["ddpm:5", "ddpm:10", "ddpm:20", "ddim:10", "dpm:10"]
    parser.add_argument("--chains", nargs="+", default=chains, metavar="SOLVER:STEPS", help="what is measured")
    parser.add_argument("--reference", default="ddpm:200", metavar="SOLVER:STEPS", help="what it is compared with")
    parser.add_argument("--users", type=int, default=0, help="validation users, spread over all (0: all)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of every chain")


def run(parsed: argparse.Namespace) -> dict:
    """Measure every chain; print the table. Returns the figures."""
    torch.set_num_threads(1)
    config = load_config(parsed.config, parsed.overrides)
    config.score.rank_by = "samples"
    bench = SamplerBench.open(config, parsed.users)
    names = [parsed.reference, *(name for name in parsed.chains if name != parsed.reference)]
    records = []
    for chain in map(Chain.parse, names):
        min_sigma = config.score.guidance_min_sigma if records else 0.0  # the reference is guided at every step
        hits, seconds = bench.measure(chain, parsed.seeds, min_sigma)
        reference = records[0]["hits"] if records else hits
        records.append(describe(chain, hits, seconds, reference, records[0]["seconds"] if records else seconds, config.seed))
        get_logger("benchmark").info("%s: HR@%d %.4f", chain, HIT_CUT, records[-1]["hr"])
    print_table(records, config, len(bench.users), parsed.seeds)
    chains = [{name: value for name, value in record.items() if name != "hits"} for record in records]
    settings = {"guidance": config.score.guidance, "guidance_min_sigma": config.score.guidance_min_sigma, "samples": config.score.num_samples}
    return {"users": len(bench.users), "seeds": parsed.seeds, **settings, "chains": chains}


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

    def measure(self, chain: Chain, num_seeds: int, guidance_min_sigma: float) -> tuple[np.ndarray, float]:
        """Share of seeds in which a user's target was found, (B,), and CPU seconds of a draw for all users."""
        changes = {"solver": chain.solver, "num_sampling_steps": chain.num_steps, "guidance_min_sigma": guidance_min_sigma}
        score = replace(self.retriever.score, **changes)
        retriever, hits, seconds = replace(self.retriever, score=score), np.zeros(len(self.users)), 0.0
        chunks = [np.arange(start, min(start + CHUNK_USERS, len(hits))) for start in range(0, len(hits), CHUNK_USERS)]
        for seed in range(num_seeds):
            for number, rows in enumerate(chunks):
                began = time.process_time()
                samples = retriever.draw_samples(self.views, self.condition[rows], seed * len(chunks) + number)
                seconds += time.process_time() - began
                part = take_users(self.users, rows)
                _, item_idx = retriever.rank_samples(samples, part, ("masked",))["masked"]
                hits[rows] += (item_idx[:, :HIT_CUT] == part.targets[:, None]).any(axis=1)
        return hits / num_seeds, seconds / num_seeds


def take_users(users: Users, rows: np.ndarray) -> Users:
    """Some of them, whole histories."""
    longest = int(np.diff(users.offsets).max(initial=0))
    items, offsets = users.newest(rows, longest)
    return replace(
        users, user_ids=users.user_ids[rows], user_idx=users.user_idx[rows], items=items, offsets=offsets, targets=users.targets[rows]
    )


def describe(chain: Chain, hits: np.ndarray, seconds: float, reference: np.ndarray, reference_seconds: float, seed: int) -> dict:
    """HR@10, its share of the reference's with a paired interval, and how much faster the chain is."""
    low, high = ratio_interval(hits, reference, seed)
    return {
        "chain": str(chain),
        "hr": float(hits.mean()),
        "share": float(hits.mean() / reference.mean()) if reference.any() else float("nan"),
        "share_interval": [low, high],
        "seconds": seconds,
        "times_faster": reference_seconds / seconds,
        "hits": hits,
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
    table = Table("chain", f"HR@{HIT_CUT}", "of the reference", f"{LEVEL:.0%} interval", "CPU seconds", "times faster", title=title)
    for record in records:
        low, high = record["share_interval"]
        table.add_row(
            record["chain"], f"{record['hr']:.4f}", f"{record['share']:.1%}", f"{low:.1%} to {high:.1%}", f"{record['seconds']:.1f}",
            f"{record['times_faster']:.1f}",
        )  # fmt: skip
    Console(width=max(110, Console().width)).print(table)

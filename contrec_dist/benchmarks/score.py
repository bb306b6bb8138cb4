"""The score stage at any size, over Ray as in production: users/s, memory, cost against users, one worker against several.

    python launchers/benchmark.py score --config configs/million.yaml run_dir=...     # a finished run
    python launchers/benchmark.py score --num_items 1000000                           # one that is made up

A made-up run (score_world.py) has random weights, clustered latents and Zipf histories; its index is built by the real stage.
Random queries point at no item, so their search costs more than a trained model's. Each measurement is `contrec score` in a
process of its own. Two rates: by wall clock, and by the workers' CPU time, which holds on a busy machine too. A worker's peak
is of resident memory, pages of mapped files included, which the system may take back; "own memory" is without them, the
highest at the end of a part. With --tiger the same histories go through TIGER's beam search with the same backbone in the
same run, each side in one thread of this process, in turns.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from contrec_dist.config import Config, load_config
from contrec_dist.errors import ConfigError, ContRecError
from contrec_dist.manifest import MANIFEST_NAME, Manifest, write_atomically
from contrec_dist.progress import get_logger

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
WORLD = (
    "import json, sys; from contrec_dist.benchmarks.score_world import write_world; from contrec_dist.config import load_config;"
    "write_world(load_config([sys.argv[1]]), **json.loads(sys.argv[2]))"
)
COLUMNS = (
    "users", "workers", "seconds", "users/s", "users/s and core", "by CPU time", "histories", "model", "search", "writing",
    "driver peak", "worker peak", "worker's own",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, sizes, workers and where to put things."""
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file of a finished run (else: made up)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="its config values, for example run_dir=...")
    parser.add_argument("--num_items", type=int, default=1_000_000, help="items of a made-up run")
    parser.add_argument("--num_users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="users a measurement")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[1, 2], help="Ray workers, one core each")
    parser.add_argument("--compared_users", type=int, default=0, help="users at which workers are compared (0: the middle size)")
    parser.add_argument("--mean_history", type=float, default=12.0, help="mean items of a history of a made-up run")
    parser.add_argument("--k", type=int, default=50, help="items a user")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark/score"), help="working files; a made-up run, kept for the next time")
    parser.add_argument("--plot", type=Path, help="PNG of seconds and memory against users")
    parser.add_argument("--tiger", action="store_true", help="measure TIGER's beam search beside")
    parser.add_argument("--beam", type=int, default=20, help="TIGER's beam, and the items a user of that comparison")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="config values of a made-up run")


def run(parsed: argparse.Namespace) -> dict:
    """Measure, print the tables, write the plot. Returns the figures."""
    config = open_run(parsed)
    most, sizes = max(parsed.num_workers), pick_sizes(parsed.num_users, count_users(config))
    compared = min(parsed.compared_users or sizes[len(sizes) // 2], sizes[-1] if sizes else 0)
    plan = [(users, most) for users in sizes]
    plan += [(compared, workers) for workers in parsed.num_workers if (compared, workers) not in plan]
    records = [measure(config, parsed.folder, users, workers) for users, workers in plan]
    print_table(records)
    index = Manifest.load(config.folder("index")).facts["query"]
    figures = {"run": parsed.config or "made up", "num_items": index["num_items"], "index": index, "runs": records}
    figures |= describe_growth([record for record in records if record["workers"] == most and record["users"] in sizes])
    figures |= compare_workers([record for record in records if record["users"] == compared])
    if parsed.tiger:
        figures["tiger"] = compare_with_tiger(config, parsed)
    if parsed.plot:
        plot_growth([record for record in records if record["workers"] == most], parsed.plot)
    return figures


def open_run(parsed: argparse.Namespace) -> Config:
    """Config of the run that is scored: the finished one that is named, else one that is made up first.

    Errors   ConfigError for values of a finished run where none is named
    """
    if parsed.config:
        return load_config([*parsed.config], [*parsed.overrides, f"score.k={parsed.k}", "score.splits=[next]"])
    if parsed.overrides:
        raise ConfigError("key=value", parsed.overrides, "--config FILE before it; values of a made-up run follow --set")
    config = make_config(parsed)
    make_world(config, parsed)
    return config


def count_users(config: Config) -> int:
    """Users of the catalogue."""
    return pl.scan_parquet(config.folder("catalog") / "users.parquet").select(pl.len()).collect().item()


def pick_sizes(wanted: list[int], count: int) -> list[int]:
    """Rising numbers of users to measure, none of them more than there are."""
    return sorted({min(users, count) for users in wanted})


def make_config(parsed: argparse.Namespace) -> Config:
    """Config of the made-up run."""
    fixed = [
        "name=score", f"run_dir={parsed.folder.absolute()}", f"score.k={parsed.k}", "score.splits=[next]", "score.reasoning=none",
        "index.spaces=[query]", "loss.num_negatives=1024",
    ]  # fmt: skip
    return load_config([], [*fixed, *parsed.set])


def make_world(config: Config, parsed: argparse.Namespace) -> None:
    """The run's folders; in a process of its own, so that none of its memory is counted."""
    sizes = {"num_items": parsed.num_items, "num_users": max(parsed.num_users), "mean_history": parsed.mean_history}
    _run_child([sys.executable, "-c", WORLD, str(_write_config(config, parsed.folder, "world")), json.dumps(sizes)], threads=0)


def measure(config: Config, folder: Path, num_users: int, num_workers: int) -> dict:
    """One `contrec score`: all users of the run, or so many of them spread over it; lists and settings go to `folder`."""
    output = folder.absolute() / "scored"
    ray, score = replace(config.ray, num_workers=num_workers), replace(config.score, output=str(output))
    count = count_users(config)
    if num_users < count:
        score.users_file = str(folder.absolute() / f"users-{num_users}.parquet")
        rows = np.linspace(0, count - 1, num_users).astype(np.int64)
        folder.mkdir(parents=True, exist_ok=True)
        pl.read_parquet(config.folder("catalog") / "users.parquet", columns=["user_id"])[rows].write_parquet(score.users_file)
    (output / MANIFEST_NAME).unlink(missing_ok=True)  # so that it runs again
    path = _write_config(replace(config, ray=ray, score=score), folder, "measured")
    started = time.perf_counter()
    _run_child([sys.executable, "-m", "contrec_dist", "score", "--config", str(path)], threads=1)
    seconds = time.perf_counter() - started
    facts = Manifest.load(output).facts
    record = summarize(facts, seconds, num_workers)
    get_logger("benchmark").info("%d users, %d workers: %.1f s", record["users"], num_workers, seconds)
    return record


def summarize(facts: dict, seconds: float, num_workers: int) -> dict:
    """The record of a measurement from the stage's own facts and the command's wall clock."""
    users, steps = facts["users"], facts["worker_seconds"]
    return {
        "users": users,
        "workers": num_workers,
        "seconds": seconds,
        "users_per_second": users / seconds,
        "users_per_second_per_core": users / seconds / num_workers,
        "users_per_cpu_second": users / facts["worker_cpu_seconds"],
        "shares": {step: value / sum(steps.values()) for step, value in steps.items()},
        "busy_seconds": sum(steps.values()) / num_workers,
        "driver_peak_bytes": facts["driver_peak_bytes"],
        "worker_peak_bytes": facts["worker_peak_bytes"],
        "worker_own_bytes": facts["worker_own_bytes"],
    }


def describe_growth(records: list[dict]) -> dict:
    """Between the smallest and the largest number of users: the exponent of seconds at work (1: linear), and added memory."""
    if len(records) < 2:
        return {}
    small, large = records[0], records[-1]
    ratio = math.log(large["users"] / small["users"])
    figures = {
        "growth_exponent": math.log(large["busy_seconds"] / small["busy_seconds"]) / ratio,
        "cpu_growth_exponent": 1 - math.log(large["users_per_cpu_second"] / small["users_per_cpu_second"]) / ratio,
        "added_driver_bytes": large["driver_peak_bytes"] - small["driver_peak_bytes"],
        "added_worker_bytes": large["worker_peak_bytes"] - small["worker_peak_bytes"],
        "added_worker_own_bytes": large["worker_own_bytes"] - small["worker_own_bytes"],
    }
    print(
        f"from {small['users']:,} to {large['users']:,} users: seconds at work grow as users^{figures['growth_exponent']:.2f}, CPU "
        f"seconds as users^{figures['cpu_growth_exponent']:.2f}; driver {figures['added_driver_bytes'] / MIB:+.0f} MiB, worker "
        f"{figures['added_worker_bytes'] / MIB:+.0f} MiB, of its own {figures['added_worker_own_bytes'] / MIB:+.0f} MiB"
    )
    return figures


def compare_workers(records: list[dict]) -> dict:
    """How much faster more workers are, by seconds at work and by wall clock."""
    by_workers = {record["workers"]: record for record in records}
    if len(by_workers) < 2:
        return {}
    few, many = by_workers[min(by_workers)], by_workers[max(by_workers)]
    ratio = few["seconds"] / many["seconds"]
    print(f"{few['workers']} -> {many['workers']} workers at {few['users']:,} users: {ratio:.2f} times faster, Ray's start included")
    return {"worker_ratio": ratio, "worker_ratio_users": few["users"]}


def compare_with_tiger(config: Config, parsed: argparse.Namespace, num_users: int = 2048, repeats: int = 3) -> dict:
    """Users a second of both methods in one thread of this process, in turns; medians, by CPU time."""
    try:
        from contrec_dist.benchmarks.tiger_decoder import synthetic_decoder
    except ImportError:
        raise ContRecError("--tiger: contrec_dist.benchmarks.tiger_decoder is not there") from None
    import torch

    from contrec_dist.retrieval.pairing import check_pairing
    from contrec_dist.retrieval.score_workers import CandidateFinder, StepClock
    from contrec_dist.retrieval.scored_users import ScoredUsers

    config = replace(config, score=replace(config.score, k=parsed.beam, num_candidates=parsed.beam))
    users = ScoredUsers.of_catalog(config.folder("catalog"))
    finder = CandidateFinder.open(config, users, check_pairing(config))  # one thread from here on
    num_items = finder.retriever.shards.num_items
    with torch.random.fork_rng():
        decoder = synthetic_decoder(
            num_items, config.backbone.shape, max_history=config.prompt.max_history, beam_width=parsed.beam
        )
    loaded = users.load("next", 0, num_users)
    histories = [loaded.items[start:stop] for start, stop in zip(loaded.offsets, loaded.offsets[1:])]
    sides = {
        "ours": lambda: finder.find("next", 0, num_users, ("masked",), StepClock()),
        "tiger": lambda: decoder.recommend(histories[: num_users // 4], parsed.beam),
    }
    counts, seconds = {"ours": num_users, "tiger": num_users // 4}, {side: [] for side in sides}
    for number in range(repeats + 1):
        for side, work in sides.items():
            start = time.process_time()
            work()
            if number:  # the first one warms up
                seconds[side].append(time.process_time() - start)
    rates = {side: counts[side] / statistics.median(values) for side, values in seconds.items()}
    print(
        f"one thread, {num_items:,} items, {parsed.beam} items a user: ours {rates['ours']:,.0f} users a CPU second, TIGER with "
        f"beam {parsed.beam} {rates['tiger']:,.0f}: {rates['ours'] / rates['tiger']:.1f} times"
    )
    return {"users_per_cpu_second": rates, "ratio": rates["ours"] / rates["tiger"], "beam": parsed.beam}


def print_table(records: list[dict]) -> None:
    table = Table(*COLUMNS, title="score")
    for record in records:
        table.add_row(
            f"{record['users']:,}", str(record["workers"]), f"{record['seconds']:.1f}",
            *(f"{record[name]:,.0f}" for name in ("users_per_second", "users_per_second_per_core", "users_per_cpu_second")),
            *(f"{record['shares'].get(step, 0):.0%}" for step in ("histories", "model", "search", "writing")),
            *(f"{record[f'{name}_bytes'] / MIB:.0f} MiB" for name in ("driver_peak", "worker_peak", "worker_own")),
        )  # fmt: skip
    Console(width=max(150, Console().width)).print(table)


def plot_growth(records: list[dict], path: Path) -> None:
    """Seconds, and the memory of driver and workers, against users."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    users = [record["users"] for record in records]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2)
    busy = [record["busy_seconds"] for record in records]
    time_axes.loglog(users, [record["seconds"] for record in records], "o-", label="whole command")
    time_axes.loglog(users, busy, "s--", label="workers at work")
    time_axes.loglog(users, [busy[-1] * one / users[-1] for one in users], ":", color="grey", label="linear")
    time_axes.set_ylabel("seconds")
    lines = {"driver_peak_bytes": "driver, peak", "worker_peak_bytes": "worker, peak", "worker_own_bytes": "worker, its own"}
    for name, label in lines.items():
        memory_axes.semilogx(users, [record[name] / MIB for record in records], "o-", label=label)
    memory_axes.set_ylabel("MiB")
    memory_axes.set_ylim(bottom=0)
    for axes in (time_axes, memory_axes):
        axes.set_xlabel("users")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _write_config(config: Config, folder: Path, name: str) -> Path:
    path = folder.absolute() / f"{name}.yaml"
    config = replace(config, run_dir=str(Path(config.run_dir).absolute()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    return path


def _run_child(command: list[str], threads: int) -> None:
    """Run to its end, its log on ours. `threads` 0: as many as there are. Errors   ContRecError with the exit code"""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS") if threads}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **limits, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": paths}
    ended = subprocess.run(command, env=environment)
    if ended.returncode:
        raise ContRecError(f"{' '.join(command[:4])} ... ended with exit code {ended.returncode}; its log is above")

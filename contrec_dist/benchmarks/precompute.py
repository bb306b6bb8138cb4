"""Stage precompute against a bare loop of torch and tarfile: rows/s a core, memory, and cost against size.

A row is an item that is encoded or a user that is laid out; a size of n is n items and n users. Both sides run in
processes of their own, in turns, and the median of the repeats counts. Two ratios, of rows/s a core: by wall clock
(Ray's start and the manifest included), and by CPU time of all processes, which holds on a busy machine too.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from contrec_dist.benchmarks.precompute_runs import BARE_FOLDER, make_config
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import Manifest, hash_file
from contrec_dist.progress import get_logger

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
COLUMNS = (
    "rows", "seconds", "of them Ray's start", "rows/s", "rows/s a core", "bare loop, rows/s", "ratio",
    "ratio by CPU time", "driver peak", "worker peak",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, repeats, workers and where to put things."""
    sizes = "items, and as many users, a measurement"
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help=sizes)
    repeats = "runs of each side, one number or one a size; the median counts"
    parser.add_argument("--repeats", type=int, nargs="+", default=[3], help=repeats)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Ray workers, one core each")
    parser.add_argument("--plot", type=Path, help="PNG of cost against size")
    parser.add_argument("--folder", type=Path, help="for the temporary runs, 10 GB at a million; default: the system's")


def run(parsed: argparse.Namespace) -> dict:
    """Measure every size; print the table, write the plot. Returns the figures."""
    records = []
    for size, repeats in sorted(pair_repeats(parsed.sizes, parsed.repeats)):
        with tempfile.TemporaryDirectory(prefix="precompute-", dir=parsed.folder) as folder:
            records.append(measure_size(Path(folder), size, repeats, parsed.workers))
    print_table(records)
    figures = {"workers": parsed.workers, "sizes": records}
    if len(records) > 1:
        figures["growth_exponent"] = growth_exponent(records)
        grown = f"rows^{figures['growth_exponent']:.2f} between the two largest sizes"
        print(f"seconds without Ray's start grow as {grown}")
    if parsed.plot:
        plot_cost(records, parsed.plot)
    return figures


def pair_repeats(sizes: list[int], repeats: list[int]) -> list[tuple[int, int]]:
    """Every size with its number of repeats. Errors   ConfigError when there are not as many as sizes"""
    if len(repeats) not in (1, len(sizes)) or min(repeats) < 1:
        raise ConfigError("--repeats", repeats, f"one number, or one for each of the {len(sizes)} sizes, at least 1")
    return list(zip(sizes, repeats * len(sizes) if len(repeats) == 1 else repeats))


def measure_size(folder: Path, size: int, repeats: int, num_workers: int) -> dict:
    """Medians of both sides at one size. Errors   ArtifactError when their shards differ"""
    from contrec_dist.benchmarks.precompute_inputs import make_inputs

    config = make_config(folder, num_workers)
    make_inputs(config, size)
    runs: dict[str, list[dict]] = {"bare": [], "stage": []}
    for number in range(repeats):
        for side in runs:
            shutil.rmtree(folder / BARE_FOLDER if side == "bare" else config.folder("tokens"), ignore_errors=True)
            runs[side].append(run_apart(side, folder, num_workers))
            seconds = runs[side][-1]["seconds"]
            get_logger("benchmark").info("%d rows, %s, run %d: %.1f s", 2 * size, side, number + 1, seconds)
        check_equal(config.folder("tokens"), folder / BARE_FOLDER)
    bare, stage = (take_medians(runs[side]) for side in ("bare", "stage"))
    return {"repeats": repeats, **summarise(2 * size, bare, stage, num_workers)}


def take_medians(runs: list[dict]) -> dict:
    """The median of every figure."""
    return {name: statistics.median(one[name] for one in runs) for name in runs[0]}


def run_apart(side: str, folder: Path, num_workers: int) -> dict:
    """One run in a new process; its figures."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "POLARS_MAX_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **threads, "PYTHONPATH": paths}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "contrec_dist.benchmarks.precompute_runs", side, str(folder), str(num_workers)]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def check_equal(tokens: Path, bare: Path) -> None:
    """The shards of both sides must be the same bytes: the loop did the stage's work."""
    for name, record in Manifest.load(tokens).files.items():
        if name.startswith("shards/") and hash_file(bare / name) != record["sha256"]:
            raise ArtifactError(bare / name, "other content", f"the bytes of {tokens / name}")


def summarise(num_rows: int, bare: dict, stage: dict, num_workers: int) -> dict:
    """The record of a size."""
    per_core = num_rows / stage["seconds"] / num_workers
    return {
        "rows": num_rows,
        "rows_per_second": num_rows / stage["seconds"],
        "rows_per_second_per_core": per_core,
        "bare_rows_per_second": num_rows / bare["seconds"],
        "ratio": per_core * bare["seconds"] / num_rows,
        "ratio_by_cpu_time": bare["cpu_seconds"] / stage["cpu_seconds"],
        "stage": stage,
        "bare": bare,
    }


def print_table(records: list[dict]) -> None:
    table = Table(*COLUMNS, title="precompute")
    rates = ("rows_per_second", "rows_per_second_per_core", "bare_rows_per_second")
    for record in records:
        stage = record["stage"]
        table.add_row(
            f"{record['rows']:,}", f"{stage['seconds']:.1f}", f"{stage['ray_start_seconds']:.1f}",
            *(f"{record[name]:,.0f}" for name in rates),
            f"{record['ratio']:.2f}", f"{record['ratio_by_cpu_time']:.2f}",
            *(f"{stage[name] / MIB:.0f} MiB" for name in ("driver_peak_bytes", "worker_peak_bytes")),
        )  # fmt: skip
    Console(width=max(140, Console().width)).print(table)


def growth_exponent(records: list[dict]) -> float:
    """1: linear. Of the seconds that are not Ray's start, between the two largest sizes."""
    small, large = ((r["rows"], r["stage"]["seconds"] - r["stage"]["ray_start_seconds"]) for r in records[-2:])
    return math.log(large[1] / small[1]) / math.log(large[0] / small[0])


def plot_cost(records: list[dict], path: Path) -> None:
    """Seconds against rows, both logarithmic, with a line of slope one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [record["rows"] for record in records]
    without = [record["stage"]["seconds"] - record["stage"]["ray_start_seconds"] for record in records]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.loglog(rows, [record["stage"]["seconds"] for record in records], "o-", label="precompute")
    axes.loglog(rows, without, "o--", label="precompute without Ray's start")
    axes.loglog(rows, [record["bare"]["seconds"] for record in records], "s-", label="bare loop, one core")
    axes.loglog(rows, [without[-1] * number / rows[-1] for number in rows], ":", color="grey", label="linear")
    axes.set_xlabel("rows: items encoded + users laid out")
    axes.set_ylabel("seconds, wall clock")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)

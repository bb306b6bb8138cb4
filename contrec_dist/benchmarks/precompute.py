"""Stage precompute against a bare loop of torch and tarfile: rows/s a core, memory, and cost against size.

A row is an item that is encoded or a user that is laid out; a size of n is n items and n users. Both sides run in processes
of their own, in turns, and the median of the repeats counts. Two ratios, of rows/s a core: by wall clock (Ray's start and the
manifest included), and by CPU time of all processes, which holds on a busy machine too.
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
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, hash_file
from contrec_dist.progress import get_logger

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
COLUMNS = (
    "rows", "seconds", "of them Ray's start", "rows/s", "rows/s a core", "bare loop, rows/s", "ratio", "ratio by CPU time",
    "driver peak", "worker peak",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, repeats, workers and where to put things."""
    sizes = "items, and as many users, a measurement"
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help=sizes)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side a size; the median counts")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Ray workers, one core each")
    parser.add_argument("--plot", type=Path, help="PNG of cost against size")
    parser.add_argument("--folder", type=Path, help="where the temporary runs lie (10 GB at a million); default: the system's")


def run(parsed: argparse.Namespace) -> dict:
    """Measure every size; print the table, write the plot. Returns the figures."""
    records = []
    for size in sorted(parsed.sizes):
        with tempfile.TemporaryDirectory(prefix="precompute-", dir=parsed.folder) as folder:
            records.append(measure_size(Path(folder), size, parsed.repeats, parsed.workers))
    print_table(records)
    figures = {"workers": parsed.workers, "repeats": parsed.repeats, "sizes": records}
    if len(records) > 1:
        figures["growth_exponent"] = growth_exponent(records)
        print(f"seconds without Ray's start grow as rows^{figures['growth_exponent']:.2f} between the two largest sizes")
    if parsed.plot:
        plot_cost(records, parsed.plot)
    return figures


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
            get_logger("benchmark").info("%d rows, %s, run %d: %.1f s", 2 * size, side, number + 1, runs[side][-1]["seconds"])
        check_equal(config.folder("tokens"), folder / BARE_FOLDER)
    bare, stage = ({name: statistics.median(one[name] for one in runs[side]) for name in runs[side][0]} for side in runs)
    return summarise(2 * size, bare, stage, num_workers)


def run_apart(side: str, folder: Path, num_workers: int) -> dict:
    """One run in a new process; its figures."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "POLARS_MAX_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
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
    for record in records:
        stage = record["stage"]
        table.add_row(
            f"{record['rows']:,}", f"{stage['seconds']:.1f}", f"{stage['ray_start_seconds']:.1f}",
            *(f"{record[name]:,.0f}" for name in ("rows_per_second", "rows_per_second_per_core", "bare_rows_per_second")),
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

"""One run of stage precompute, or of the bare loop that it is compared with, in a process of its own.

    python -m contrec_dist.benchmarks.precompute_runs stage RUN_DIR NUM_WORKERS      prints its figures as JSON
    python -m contrec_dist.benchmarks.precompute_runs bare RUN_DIR NUM_WORKERS       the same for the bare loop

The bare loop does what must be done and nothing else: torch encodes the same batches, tarfile.addfile takes the same
members, in one process and one thread; no Ray, no checks, no index, no sha256, no manifest. Its shards are the stage's,
byte for byte.
"""

import io
import json
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import psutil

from contrec_dist.config import Config, RayConfig
from contrec_dist.data import precompute
from contrec_dist.data.catalog import HISTORIES_FILE, USERS_FILE
from sharding.partition import part_ranges
from sharding.ray_jobs import ray_session
from sharding.token_writer import sample_key, shard_name

BARE_FOLDER = "bare"
WORKER_NAME = "_PartActor"
SAMPLE_SECONDS = 0.1


def make_config(run_dir: Path, num_workers: int) -> Config:
    """The config that both run by: the defaults."""
    return Config(name="precompute", run_dir=str(run_dir), ray=RayConfig(num_workers=num_workers))


class ProcessTreeSampler(threading.Thread):
    """Watches this process's children: CPU seconds of all, peak memory of the workers, as the kernel keeps them."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self.cpu_seconds: dict[int, float] = {}
        self.worker_peak_bytes: dict[int, int] = {}

    def run(self) -> None:
        while not self.stopped.wait(SAMPLE_SECONDS):
            for process in psutil.Process().children(recursive=True):
                try:
                    times, name = process.cpu_times(), " ".join(process.cmdline()[:1])
                    self.cpu_seconds[process.pid] = times.user + times.system
                    if WORKER_NAME in name:
                        self.worker_peak_bytes[process.pid] = read_peak_bytes(process.pid)
                except (psutil.Error, OSError):
                    continue  # it has just ended


def read_peak_bytes(pid: int | str = "self") -> int:
    """Largest resident memory of a process so far (Linux)."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def measure_stage(config: Config) -> dict:
    """Run the stage. Seconds are wall clock; cpu_seconds are of the driver, Ray's processes and the workers."""
    sampler = ProcessTreeSampler()
    sampler.start()
    start, own = time.perf_counter(), time.process_time()
    with ray_session(config.ray):
        ray_seconds = time.perf_counter() - start
        precompute.run(config)
        seconds = time.perf_counter() - start
    sampler.stopped.set()
    sampler.join()
    return {
        "seconds": seconds,
        "ray_start_seconds": ray_seconds,
        "cpu_seconds": time.process_time() - own + sum(sampler.cpu_seconds.values()),
        "driver_peak_bytes": read_peak_bytes(),
        "worker_peak_bytes": max(sampler.worker_peak_bytes.values()),
    }


def measure_bare(config: Config) -> dict:
    """Run the bare loop into run_dir/bare."""
    import torch

    from contrec_dist.tokenizer.sigma_vae import SigmaVAE

    torch.set_num_threads(1)
    work = Path(config.run_dir) / BARE_FOLDER
    (work / "shards").mkdir(parents=True)
    start, own = time.perf_counter(), time.process_time()
    tokenizer = SigmaVAE.load(config.folder("tokenizer"), "item_tokenizer")
    table = encode_catalogue(config, tokenizer).astype(np.float16)
    write_bare_shards(config, table, work)
    figures = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - own}
    return {**figures, "peak_bytes": read_peak_bytes()}


def encode_catalogue(config: Config, tokenizer) -> np.ndarray:
    """mu of all items, in the stage's batches. Shapes   -> (N, K, Z) float32"""
    import torch

    embeddings = np.load(config.folder("embeddings") / "items.npy", mmap_mode="r")
    batches = []
    for start, stop in part_ranges(len(embeddings), config.precompute.batch_rows):
        with torch.no_grad():
            batches.append(tokenizer.encode(torch.from_numpy(np.array(embeddings[start:stop]))).numpy())
    latents = np.concatenate(batches)
    np.save(Path(config.run_dir) / BARE_FOLDER / "item_latents.npy", latents)
    return latents


def write_bare_shards(config: Config, table: np.ndarray, work: Path) -> None:
    """All users' samples, shard after shard. Shapes   table: (N, K, Z) float16"""
    histories = pl.scan_parquet(config.folder("catalog") / HISTORIES_FILE).drop("timestamps")
    users = pl.scan_parquet(config.folder("catalog") / USERS_FILE)
    num_users = users.select(pl.len()).collect().item()
    for shard, (start, stop) in enumerate(part_ranges(num_users, config.precompute.users_per_shard)):
        rows = histories.slice(start, stop - start).collect()
        user_ids = users.slice(start, stop - start).collect()["user_id"].to_list()
        with tarfile.open(work / shard_name(shard), "w", format=tarfile.USTAR_FORMAT) as tar:
            for user_id, row in zip(user_ids, rows.iter_rows(named=True), strict=True):
                _add_sample(tar, user_id, row, table)


def _add_sample(tar: tarfile.TarFile, user_id: str, row: dict, table: np.ndarray) -> None:
    key, items = sample_key(row["user_idx"]), np.array(row["items"], dtype=np.int32)
    facts = {"user_id": user_id, **{name: row[name] for name in ("num_train", "validation_pos", "test_pos")}}
    for name, data in (
        ("json", json.dumps(facts).encode()),
        ("items.npy", _npy_bytes(items)),
        ("latents.npy", _npy_bytes(table[items])),
    ):
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


if __name__ == "__main__":
    measure = {"stage": measure_stage, "bare": measure_bare}[sys.argv[1]]
    print(json.dumps(measure(make_config(Path(sys.argv[2]), int(sys.argv[3])))))

"""The Ray side of a stage: its output cut into parts, each made exactly once.

Stage    precompute and score. How to use it:

    class Scorer:                                     # a module-level class; made once a worker, so it may load a model
        def __init__(self, model_dir: str): ...       # small arguments
        def process(self, payload: dict, path: Path) -> dict:
            ...                                       # write the part to exactly `path`, from `payload` alone
            return {"rows": 4096}                     # facts: small, JSON

    parts = [Part(name=f"{i:06d}.parquet", payload={"start": i * n, "stop": ...}) for i in ...]
    with ray_session(config.ray):
        facts = run_parts(
            parts, Scorer, {"model_dir": ...}, output_folder=work, workers=config.ray, stage="score", unit="parts"
        )
    remove_part_records(work)                         # when the stage has nothing left to do

Promise  A part is a fixed range of the input under a fixed name. The worker writes it under a temporary name, fsyncs,
         renames, and then records it with its sha256 in `<output_folder>/.parts/<name>.json`. A recorded part whose
         files still have that sha256 is not made again, so a killed job continues where it was. Parts of a worker or
         node that dies are made by others (ray_workers.py); an exception of the part's own code ends the job, naming it.
         Every worker computes with one thread whatever it reserves, so that the bits depend on no setting of `ray`.
Cost     Files are read once more for their sha256. Output folder and inputs must lie on a file system that all
         nodes share.
"""

import json
import logging
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Protocol, Sequence

import ray

from contrec_dist.config import RayConfig
from contrec_dist.errors import ConfigError
from contrec_dist.manifest import hash_file, hash_json, write_json
from contrec_dist.progress import get_logger, track
from sharding.ray_workers import PartError, WorkerPool

__all__ = ["Part", "PartError", "PartWorker", "ray_session", "read_part_hashes", "remove_part_records", "run_parts"]

RECORDS_FOLDER = ".parts"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One piece of output: `files` (relative to the output folder; just `name` unless given), made from `payload`."""

    name: str
    payload: dict
    files: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "files", self.files or (self.name,))


class PartWorker(Protocol):
    """What run_parts asks of a worker: write one file a path, return small facts."""

    def process(self, payload: dict, *paths: Path) -> dict: ...


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Be connected to Ray: as we already are, else to config.address or RAY_ADDRESS, else to a new local cluster.

    What was started or joined here is left at the end; a session that was there before stays.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address:
        ray.init(address=address, **quiet)
        get_logger("ray").info("joined the cluster at %s: %s", address, _show_resources())
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        num_cpus = max(1, math.ceil(config.num_workers * config.cpus_per_worker))
        memory = config.object_store_bytes
        ray.init("local", num_cpus=num_cpus, object_store_memory=memory, include_dashboard=False, **quiet)
    try:
        _check_one_fits(config, grows=bool(address))
        yield
    finally:
        ray.shutdown()


def _show_resources() -> str:
    resources = ray.cluster_resources()
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _check_one_fits(config: RayConfig, *, grows: bool) -> None:
    """A local cluster never grows: what no worker can get there is an error, not a wait for ever."""
    available = ray.cluster_resources()
    resources = {"cpus_per_worker": "CPU", "gpus_per_worker": "GPU", "memory_bytes_per_worker": "memory"}
    for key, resource in resources.items():
        asked, there = getattr(config, key), available.get(resource, 0.0)
        if asked > there and not grows:
            raise ConfigError(f"ray.{key}", asked, f"at most {there}, what this machine has")


def run_parts(
    parts: Sequence[Part],
    worker_factory: Callable[..., PartWorker],
    arguments: dict,
    *,
    output_folder: Path,
    workers: RayConfig,
    stage: str,
    unit: str,
) -> list[dict]:
    """Make every part once, in worker processes that hold `worker_factory(**arguments)`; facts in order of parts.

    Errors   PartError naming the part: its code raised, or its worker died more than MAX_WORKER_DEATHS times.
             ConfigError when two parts share a file. In both cases finished parts stay, for the next attempt.
    """
    output_folder = Path(output_folder).absolute()  # a worker has another current folder
    _check_names(parts)
    _prepare_folders(output_folder, parts)
    pool = WorkerPool(
        lambda: _start_actor(workers, output_folder, worker_factory, arguments), workers, len(parts), stage
    )
    results = {}
    try:
        for part, result in track(pool.finish(parts), stage=stage, unit=unit, total=len(parts)):
            results[part.name] = result
    finally:
        pool.close()
    num_kept = sum(result["kept"] for result in results.values())
    if num_kept:
        get_logger(stage).info("%d of %d %s were complete before", num_kept, len(parts), unit)
    return [results[part.name]["facts"] for part in parts]


def read_part_hashes(output_folder: Path, parts: Sequence[Part]) -> dict[str, str]:
    """{file: sha256} of the parts that are recorded, as they were taken when the files were written."""
    paths = [path for part in parts if (path := _record_path(Path(output_folder), part)).is_file()]
    records = [json.loads(path.read_text()) for path in paths]
    return {name: file["sha256"] for record in records for name, file in record["files"].items()}


def remove_part_records(output_folder: Path) -> None:
    """Remove the records of finished parts, at the end of a stage."""
    shutil.rmtree(Path(output_folder) / RECORDS_FOLDER, ignore_errors=True)


class _PartActor:
    """Lives in a worker process; makes its worker object when the first part asks for it."""

    def __init__(self, output_folder: Path, worker_factory: Callable[..., PartWorker], arguments: dict):
        self.output_folder, self.worker_factory, self.arguments = output_folder, worker_factory, arguments
        self.worker: PartWorker | None = None

    def ready(self) -> None:
        """Returns once the process is up."""

    def work(self, part: Part) -> dict:
        """Make a part, or find it made. Returns {"facts", "kept"}."""
        facts = read_part_facts(self.output_folder, part)
        if facts is not None:
            return {"facts": facts, "kept": True}
        if self.worker is None:
            self.worker = self.worker_factory(**self.arguments)
        return {"facts": make_part(self.worker, part, self.output_folder), "kept": False}


def make_part(worker: PartWorker, part: Part, output_folder: Path) -> dict:
    """Have `worker` write the part, give it its name, record it; returns its facts."""
    paths = [output_folder / name for name in part.files]
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    facts = worker.process(part.payload, *temporary)
    files = {name: _seal(path) for name, path in zip(part.files, temporary, strict=True)}
    for source, path in zip(temporary, paths, strict=True):
        os.replace(source, path)
    record = {"payload": hash_json(part.payload), "files": files, "facts": facts}
    write_json(_record_path(output_folder, part), record)
    return facts


def read_part_facts(output_folder: Path, part: Part) -> dict | None:
    """Facts of a part that is complete; None when there is no record, or payload or files are not the recorded ones."""
    record_path = _record_path(output_folder, part)
    if not record_path.is_file():
        return None
    record = json.loads(record_path.read_text())
    if record["payload"] != hash_json(part.payload) or tuple(sorted(record["files"])) != tuple(sorted(part.files)):
        return None
    for name, expected in record["files"].items():
        path = output_folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or hash_file(path) != expected["sha256"]:
            return None
    return record["facts"]


def _seal(path: Path) -> dict:
    """Force a finished file to the disk and describe it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"sha256": hash_file(path), "bytes": path.stat().st_size}


def _record_path(output_folder: Path, part: Part) -> Path:
    return output_folder / RECORDS_FOLDER / f"{part.name}.json"


def _check_names(parts: Sequence[Part]) -> None:
    """Two parts with the same file would overwrite each other."""
    seen = set()
    for part in parts:
        for name in {part.name, *part.files}:
            if name in seen:
                raise ConfigError(f"part '{part.name}'", f"the file {name} of another part", "a file of its own")
            seen.add(name)


def _prepare_folders(output_folder: Path, parts: Sequence[Part]) -> None:
    """Make the folders here and not in workers, so that one that outlives its job cannot bring a folder back."""
    files = [output_folder / name for part in parts for name in part.files]
    for folder in {path.parent for path in [*files, *(_record_path(output_folder, part) for part in parts)]}:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def _start_actor(workers: RayConfig, output_folder: Path, worker_factory, arguments: dict):
    """Ask Ray for a worker process."""
    options = {
        "num_cpus": workers.cpus_per_worker,
        "num_gpus": workers.gpus_per_worker,
        "memory": workers.memory_bytes_per_worker or None,
        "max_restarts": 0,  # the pool replaces it: a restart waits for ever where the cluster has no room left
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": worker_environment()},
    }
    return ray.remote(_PartActor).options(**options).remote(output_folder, worker_factory, arguments)


def worker_environment() -> dict[str, str]:
    """One thread a worker that sleeps when idle; and this source tree, where the project is not installed."""
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "POLARS_MAX_THREADS": "1"}
    root = Path(__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):
        paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment

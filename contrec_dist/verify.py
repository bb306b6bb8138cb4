"""What a run's folders hold, against what was written down when they were complete: everything broken, not the first alone.

Looks at  every folder with a manifest: its files (presence, size, sha256), files that it does not name, and whether the folders
          that it was made from are still the ones there; every checkpoint; every kept version of the living index.
Promise   Reads only. What a killed process left half-written is a note, not a fault: no stage takes it for finished.
Cost      One read of everything, hashed by as many threads as there are cores; quick: names and sizes alone.
"""

import json
import os
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError, ContRecError
from contrec_dist.manifest import IDENTITY_NAME, MANIFEST_NAME, SHARDS, WRITTEN_BY, Manifest, check_file, lying_elsewhere
from contrec_dist.progress import track
from contrec_dist.training.checkpoint_files import COMPLETE_NAME, LATEST_NAME, list_checkpoints, read_marker
from contrec_dist.verify_index import LIVE_FOLDER, list_checks
from sharding.shard_files import open_shards

CHECKPOINTS = "checkpoints"
SHOWN_LETTERS = 16
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError)
NO_STAGE_READS = {MANIFEST_NAME, IDENTITY_NAME}


@dataclass
class Finding:
    """What was seen of one folder. A fault says what it is and what was expected; a note is no fault."""

    folder: str
    num_files: int = 0
    num_bytes: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_run(config: Config, folders: Sequence[str] = (), *, quick: bool = False) -> Iterator[Finding]:
    """Look at every folder of a run, or at some, and yield what was found, folder after folder.

    Errors   ArtifactError where there is nothing to look at
    """
    run_dir = Path(config.run_dir)
    there = find_folders(config)
    if not there and not folders:
        raise ArtifactError(run_dir, "no folder that a stage wrote", "the run_dir of a run")
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for name in folders or there:
            if name == LIVE_FOLDER:
                yield _check_live_index(config, Finding(name), threads, quick)
            elif name == CHECKPOINTS:
                yield from _check_checkpoints(config, threads, quick)
            else:
                yield _check_folder(config, name, threads, quick)
    if not folders:
        yield from _list_half_written(run_dir)
        yield from _list_half_written(run_dir / "baselines")


def find_folders(config: Config) -> list[str]:
    """Folders of the run that somebody completed or should have: in the order of the stages, then by name."""
    run_dir = Path(config.run_dir)
    manifests = [*run_dir.glob(f"*/{MANIFEST_NAME}"), *run_dir.glob(f"*/*/{MANIFEST_NAME}")]
    names = {path.parent.relative_to(run_dir).as_posix() for path in manifests}
    names |= {name for name in (*WRITTEN_BY, CHECKPOINTS, LIVE_FOLDER) if config.folder(name).is_dir()}
    if config.score.output and Path(config.score.output).is_dir():
        names.add(str(Path(config.score.output).absolute()))
    order = {name: place for place, name in enumerate(WRITTEN_BY)}
    shown = (name for name in names if not any(part.startswith(".") for part in Path(name).parts))
    return sorted(shown, key=lambda name: (order.get(name, len(order)), name))


def _check_folder(config: Config, name: str, threads: Executor, quick: bool) -> Finding:
    """One folder with a manifest."""
    finding, folder = Finding(name), config.folder(name)
    try:
        manifest = Manifest.load(folder)
        elsewhere = lying_elsewhere(config, name)
        checks = {
            file: partial(check_file, folder / file, {"bytes": record["bytes"], "sha256": record["sha256"]}, deep=not quick)
            for file, record in manifest.files.items()
            if not file.startswith(elsewhere)
        }
        inputs = dict(manifest.inputs)
    except ArtifactError as error:
        finding.faults.append(str(error))
        return finding
    except UNREADABLE as error:
        got = f"{folder / MANIFEST_NAME}: got an unreadable manifest ({type(error).__name__} {error})"
        finding.faults.append(f"{got}, expected JSON as this project writes it")
        return finding
    if elsewhere:
        _check_shards_elsewhere(config, manifest, finding, threads, quick)
    finding.num_files += len(checks)
    finding.num_bytes += sum(manifest.files[file]["bytes"] for file in checks)
    finding.faults += run_checks(checks.values(), threads, name)
    finding.faults += _name_others(folder, manifest.files, MANIFEST_NAME)
    finding.faults += _check_inputs(config, folder, inputs)
    return finding


def run_checks(checks: Iterable[Callable[[], None]], threads: Executor, name: str) -> list[str]:
    """Run all checks; the errors of those that failed, in their order."""
    checks = list(checks)
    errors = threads.map(_error_of, checks)
    return [error for error in track(errors, stage="verify", unit=f"files of {name}", total=len(checks)) if error]


def _error_of(check: Callable[[], None]) -> str:
    try:
        check()
    except ContRecError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: got {error.strerror}, expected a file that can be read"
    return ""


def _check_shards_elsewhere(config: Config, manifest: Manifest, finding: Finding, threads: Executor, quick: bool) -> None:
    """Shards of shards.url: fetched into the cache unless they are there, and hashed. Quick: those in a folder alone."""
    names = [name for name in manifest.files if name.startswith(SHARDS)]
    if quick and "://" in config.shards.url:
        finding.notes.append(f"{len(names)} shards at {config.shards.url} were not looked at")
        return
    try:
        shards = open_shards(config)
    except ContRecError as error:
        finding.faults.append(str(error))
        return
    finding.num_files += len(names)
    finding.num_bytes += sum(manifest.files[name]["bytes"] for name in names)
    checks = [partial(shards.check, shard, deep=not quick) for shard in range(len(names))]
    finding.faults += run_checks(checks, threads, config.shards.url)


def _name_others(folder: Path, named: Iterable[str], book: str) -> list[str]:
    """Files of a folder that its book does not name; folders inside with a manifest of their own are looked at by themselves."""
    others = []
    for parent, subfolders, files in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        subfolders[:] = [name for name in subfolders if not (Path(parent) / name / MANIFEST_NAME).is_file()]
        others += [(inside / name).as_posix() for name in files if name not in NO_STAGE_READS]
    return [f"{folder / name}: got a file, expected none: {book} does not name it" for name in sorted(set(others) - set(named))]


def _check_inputs(config: Config, folder: Path, inputs: dict[str, str]) -> list[str]:
    """Whether the folders that this one was made from are the ones that are there."""
    said = [(folder / MANIFEST_NAME, name, made_from) for name, made_from in inputs.items()]
    exported = folder / "config.json"
    if folder.name == "model" and exported.is_file():
        try:
            trained_on = json.loads(exported.read_text())
            said += [(exported, name, trained_on[f"{name}_hash"]) for name in inputs if f"{name}_hash" in trained_on]
        except (ValueError, TypeError):
            pass  # its content is not what the manifest says: told already
    faults = []
    for who, name, made_from in said:
        there = _content_hash(config.folder(name))
        if there != made_from:
            expected = f"{name} {there[:SHOWN_LETTERS]}, which is there now" if there else f"a complete {name} beside it"
            faults.append(f"{who}: got made from {name} {made_from[:SHOWN_LETTERS]}, expected {expected}")
    return faults


def _content_hash(folder: Path) -> str:
    """Of what a folder's manifest says; empty where there is none to read."""
    try:
        return Manifest.load(folder).content_hash
    except (ContRecError, *UNREADABLE):
        return ""


def _check_live_index(config: Config, finding: Finding, threads: Executor, quick: bool) -> Finding:
    files = [path for path in config.folder(LIVE_FOLDER).rglob("*") if path.is_file()]
    finding.num_files, finding.num_bytes = len(files), sum(path.stat().st_size for path in files)
    try:
        checks, notes = list_checks(config, quick=quick)
    except ContRecError as error:
        finding.faults.append(str(error))
        return finding
    finding.notes += notes
    finding.faults += run_checks(checks, threads, finding.folder)
    return finding


def _check_checkpoints(config: Config, threads: Executor, quick: bool) -> Iterator[Finding]:
    """Every checkpoint of every training of the run, those that were set aside too."""
    for training in sorted(path for path in config.folder(CHECKPOINTS).glob("*") if path.is_dir()):
        places = [training, *sorted(training.glob("set-aside-*"))]
        for path in (path for place in places for path in reversed(list_checkpoints(place))):
            yield _check_checkpoint(path, Finding(path.relative_to(config.run_dir).as_posix()), threads, quick)
        latest = training / LATEST_NAME
        if latest.is_file() and not (training / (latest.read_text().strip() or "nothing")).is_dir():
            fault = f"{latest}: got {latest.read_text().strip()!r}, expected a checkpoint that is there"
            yield Finding(training.relative_to(config.run_dir).as_posix(), faults=[fault])
        yield from _list_half_written(training)


def _check_checkpoint(folder: Path, finding: Finding, threads: Executor, quick: bool) -> Finding:
    try:
        files = dict(read_marker(folder)["files"])
    except ArtifactError as error:
        finding.faults.append(str(error))
        return finding
    except UNREADABLE as error:
        got = f"{folder / COMPLETE_NAME}: got {type(error).__name__} {error}"
        finding.faults.append(f"{got}, expected the files of a checkpoint")
        return finding
    checks = [partial(check_file, folder / name, {"sha256": sha256}, deep=not quick) for name, sha256 in files.items()]
    finding.num_files = len(files)
    finding.num_bytes = sum((folder / name).stat().st_size for name in files if (folder / name).is_file())
    finding.faults += run_checks(checks, threads, finding.folder)
    finding.faults += _name_others(folder, [*files, COMPLETE_NAME], COMPLETE_NAME)
    return finding


def _list_half_written(parent: Path) -> Iterator[Finding]:
    """What a process left that was stopped or killed, or writes at this moment."""
    for path in sorted(path for pattern in (".*.partial", ".*.old", ".*.universal") for path in parent.glob(pattern)):
        yield Finding(path.name, notes=[f"{path} is not finished; whoever wrote it goes on with it or removes it"])

"""The files of checkpoints: complete or invisible, newest first, never destroyed by a wish to go back.

A checkpoint is written under a temporary name, hashed, synced and renamed; `complete.json` inside names the sha256 of every
file, and `latest` beside it is written last. Whatever `latest` says, only what verifies is taken, so DeepSpeed's pickles
are only opened when they are the bytes that this project wrote.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import hash_file, write_atomically, write_json
from contrec_dist.progress import get_logger
from contrec_dist.training.frozen_base import FrozenBase

COMPLETE_NAME = "complete.json"
LATEST_NAME = "latest"


@dataclass(frozen=True, kw_only=True)
class TrainingPosition:
    """Where a run stands: everything that the data order and the learning rate are a function of.

    step counts optimizer steps over the run, epoch_step inside the epoch; the next batch is (epoch, epoch_step).
    bad_steps are those that were not applied; left_out_shards are in no plan, samples of bad_shards are skipped when they are
    met (training/bad_shards.py).
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    bad_steps: int = 0
    left_out_shards: tuple[int, ...] = ()
    bad_shards: tuple[int, ...] = ()
    skipped_samples: int = 0


def verify_checkpoint(folder: Path) -> None:
    """Raise ArtifactError naming the first file of a checkpoint that is missing or has other content."""
    for name, sha256 in read_marker(folder)["files"].items():
        path = folder / name
        if not path.is_file() or hash_file(path) != sha256:
            raise ArtifactError(path, "missing or other content", f"sha256 {sha256}")


def read_marker(folder: Path) -> dict:
    """complete.json: the position, the sha256 of every file, the base. Errors   ArtifactError where there is none."""
    try:
        return json.loads((folder / COMPLETE_NAME).read_text())
    except (OSError, ValueError):
        raise ArtifactError(folder, f"no {COMPLETE_NAME}", "a complete checkpoint") from None


def complete_checkpoint(work: Path, position: TrainingPosition, base: FrozenBase | None = None) -> None:
    """Bring every file and folder to the disk and write complete.json."""
    files = sorted(path for path in work.rglob("*") if path.is_file())
    for path in [*files, *(path for path in work.rglob("*") if path.is_dir())]:
        _sync(path)
    hashes = {path.relative_to(work).as_posix(): hash_file(path) for path in files}
    write_json(work / COMPLETE_NAME, {
        "position": asdict(position), "files": hashes, "base": None if base is None else asdict(base),
    })  # fmt: skip
    _sync(work)


def publish_checkpoint(work: Path, target: Path) -> None:
    """Give a complete checkpoint its name, and only then say in `latest` that it is the newest."""
    shutil.rmtree(target, ignore_errors=True)
    os.replace(work, target)
    _sync(target.parent)
    write_atomically(target.parent / LATEST_NAME, f"{target.name}\n".encode())
    _sync(target.parent)


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have their name, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; what was passed over is logged, and a `latest` that named it too."""
    log, good = get_logger("train"), None
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path)
        except ArtifactError as error:
            log.warning("checkpoint skipped: %s", error)
            continue
        good = path
        break
    latest = folder / LATEST_NAME
    named = latest.read_text().strip() if latest.is_file() else ""
    if named > (good.name if good else ""):
        taken = f"{good.name} is taken" if good else "there is no good one"
        log.warning("%s names %s, which is missing or damaged: %s", latest, named, taken)
    return good


def set_aside(folder: Path, after_step: int) -> None:
    """Move checkpoints of later steps, with a copy of the metrics, into a folder of their own, and say so in the log."""
    moved = [path for path in list_checkpoints(folder) if path.name > step_name(after_step)]
    if not moved:
        return
    number = 1 + len(list(folder.glob("set-aside-*")))
    aside = folder / f"set-aside-{number}"
    aside.mkdir()
    for path in moved:
        os.replace(path, aside / path.name)
    for path in folder.glob("*.jsonl"):
        shutil.copyfile(path, aside / path.name)
    (folder / LATEST_NAME).unlink(missing_ok=True)
    kept = list_checkpoints(folder)
    if kept:
        write_atomically(folder / LATEST_NAME, f"{kept[0].name}\n".encode())
    get_logger("train").warning("set aside in %s: %s", aside, ", ".join(path.name for path in reversed(moved)))


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that launch.resume asks for. Errors   ArtifactError when a named one is not there or not good"""
    if resume == "auto":
        return newest_good(folder)
    if resume == "never":
        return None
    path = folder / step_name(int(resume)) if resume.isdecimal() else Path(resume)
    if not path.is_dir():
        steps = ", ".join(str(int(one.name.removeprefix("step-"))) for one in reversed(list_checkpoints(folder)))
        raise ArtifactError(path, "no such checkpoint", f"launch.resume: auto, never, a path, or a step among {steps or 'none'}")
    verify_checkpoint(path)
    return path


def _sync(path: Path) -> None:
    """fsync of a file's bytes or of a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints that are complete or invisible.

A checkpoint is written under a temporary name, hashed, synced and renamed; `complete.json` inside names the sha256 of
every file. Loading takes the newest one whose hashes match and says which it skipped, so DeepSpeed's pickles are only
opened when they are the bytes that this project wrote.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import hash_file, write_json
from contrec_dist.progress import get_logger
from contrec_dist.training.repartition import load_repartitioned

TAG = "state"
COMPLETE_NAME = "complete.json"


@dataclass(frozen=True, kw_only=True)
class TrainingPosition:
    """Where a run stands: everything that the data order and the learning rate are a function of.

    step counts optimizer steps over the run, epoch_step inside the epoch; the next batch is (epoch, epoch_step).
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0


def save_checkpoint(engine, folder: Path, position: TrainingPosition, keep_last_n: int) -> None:
    """Write `folder/step-XXXXXXXX` on all ranks together, then drop all but the newest keep_last_n.

    A checkpoint of a later step can only be one that did not verify when this run was resumed: it is dropped too.
    """
    target = folder / f"step-{position.step:08d}"
    work = folder / f".{target.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(work), tag=TAG, client_state=asdict(position), save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        _complete(work, position)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(work, target)
        checkpoints = _checkpoints(folder)
        newest = checkpoints.index(target)
        for dropped in checkpoints[:newest] + checkpoints[newest + keep_last_n :]:
            shutil.rmtree(dropped)
    dist.barrier()


def load_newest_checkpoint(engine, folder: Path) -> TrainingPosition | None:
    """Load the newest checkpoint that verifies, on all ranks, whatever number wrote it; None where there is none."""
    chosen = [_newest_good(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        return None
    if _num_pieces(Path(chosen[0])) in (0, dist.get_world_size()):
        path, client_state = engine.load_checkpoint(chosen[0], tag=TAG)
    else:
        path, client_state = load_repartitioned(engine, Path(chosen[0]), TAG)
    if path is None:
        raise ArtifactError(chosen[0], "a checkpoint that DeepSpeed does not load", "one written by this engine")
    return TrainingPosition(**{name: client_state[name] for name in TrainingPosition.__dataclass_fields__})


def verify_checkpoint(folder: Path) -> None:
    """Raise ArtifactError naming the first file of a checkpoint that is missing or has other content."""
    marker = folder / COMPLETE_NAME
    if not marker.is_file():
        raise ArtifactError(folder, f"no {COMPLETE_NAME}", "a complete checkpoint")
    for name, sha256 in json.loads(marker.read_text())["files"].items():
        path = folder / name
        if not path.is_file() or hash_file(path) != sha256:
            raise ArtifactError(path, "missing or other content", f"sha256 {sha256}")


def _complete(work: Path, position: TrainingPosition) -> None:
    files = sorted(path for path in work.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    hashes = {path.relative_to(work).as_posix(): hash_file(path) for path in files}
    write_json(work / COMPLETE_NAME, {"position": asdict(position), "files": hashes})


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def _num_pieces(checkpoint: Path) -> int:
    """Ranks among which ZeRO had cut the optimizer's state; 0 without ZeRO, where any number of ranks can load it."""
    return len(list((checkpoint / TAG).glob("*_optim_states.pt")))


def _newest_good(folder: Path) -> str | None:
    for path in _checkpoints(folder):
        try:
            verify_checkpoint(path)
        except ArtifactError as error:
            get_logger("train").warning("checkpoint skipped: %s", error)
            continue
        return str(path)
    return None

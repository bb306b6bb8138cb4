"""Loading a checkpoint that another number of ranks wrote.

ZeRO's files hold one piece a rank. DeepSpeed's own converter joins the pieces into its universal format, which any number
of ranks can read; this module drives it and repairs what loading that format leaves wrong (DeepSpeed 0.19). Only rounding
then tells the run from one that kept its ranks.
Cost     Once at the start of such a run: rank 0 reads the checkpoint and writes it again, one tensor a file.
"""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
import torch.distributed as dist

from contrec_dist.errors import ArtifactError


def load_repartitioned(engine, checkpoint: Path, tag: str, *, work: Path) -> tuple[str | None, dict]:
    """What engine.load_checkpoint returns, for a checkpoint of another number of ranks. All ranks call this together.

    The universal form lies in `work` meanwhile.

    Errors   ArtifactError with the end of the converter's log
    """
    failure = [_convert(checkpoint / tag, work / tag) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ArtifactError(checkpoint, f"a failed conversion: {failure[0]}", "a checkpoint for another number of ranks")
    with _reading_universal(engine), _keeping_weight_decay(engine):
        loaded = engine.load_checkpoint(str(work), tag=tag)
    _separate_step_counts(engine)
    _load_buffers(engine, checkpoint / tag)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(work)
    return loaded


def _convert(source: Path, target: Path) -> str | None:
    """Write the universal form of a checkpoint; the end of the log when that failed."""
    shutil.rmtree(target.parent, ignore_errors=True)
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source),
        "--output_folder", str(target), "--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1",
    ]  # fmt: skip
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    alone = {name: value for name, value in os.environ.items() if name not in ranks}
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    return (done.stdout + done.stderr)[-2000:] if done.returncode else None


@contextmanager
def _reading_universal(engine) -> Iterator[None]:
    """DeepSpeed takes the format from its config, which was fixed before a checkpoint was chosen."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


@contextmanager
def _keeping_weight_decay(engine) -> Iterator[None]:
    """Stage 3 gives every parameter group the settings of the first one."""
    before = [group["weight_decay"] for group in engine.optimizer.param_groups]
    yield
    for group, weight_decay in zip(engine.optimizer.param_groups, before, strict=True):
        group["weight_decay"] = weight_decay


def _separate_step_counts(engine) -> None:
    """Stage 3 gives all groups one and the same step tensor, which each would then count up."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


@torch.no_grad()
def _load_buffers(engine, folder: Path) -> None:
    """The universal format holds parameters only; buffers (the head's moving average) are whole in every rank's file."""
    path = min(folder.glob("*mp_rank_00_model_states.pt"))
    saved = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["module"]
    for name, buffer in engine.module.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])

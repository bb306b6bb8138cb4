"""Checkpoints of files that no engine wrote, and a process group of one rank."""

from pathlib import Path

import pytest
import torch.distributed as dist

from contrec_dist.training.checkpoint_files import (
    TrainingPosition,
    complete_checkpoint,
    publish_checkpoint,
    step_name,
)


@pytest.fixture
def write_checkpoint():
    """write(folder, step) -> a folder of files as an engine leaves them, completed and published."""

    def write(folder: Path, step: int) -> Path:
        work = folder / f".{step_name(step)}.partial"
        (work / "state").mkdir(parents=True)
        for rank in range(2):
            (work / "state" / f"rank{rank}.pt").write_bytes(bytes([step % 256, rank]) * 100)
        complete_checkpoint(work, TrainingPosition(step=step, epoch=1, epoch_step=2))
        publish_checkpoint(work, folder / step_name(step))
        return folder / step_name(step)

    return write


@pytest.fixture
def one_rank():
    """A process group of this process alone, for what is written as a collective."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

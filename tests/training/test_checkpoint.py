"""training/checkpoint.py, the part that needs no engine: which checkpoint counts as good."""

import pytest

from contrec_dist.errors import ArtifactError
from contrec_dist.training.checkpoint import (
    COMPLETE_NAME,
    TrainingPosition,
    _checkpoints,
    _complete,
    _newest_good,
    verify_checkpoint,
)


def write_checkpoint(folder, step):
    """A folder of files as an engine leaves them, completed."""
    path = folder / f"step-{step:08d}"
    (path / "state").mkdir(parents=True)
    for rank in range(2):
        (path / "state" / f"rank{rank}.pt").write_bytes(bytes([step % 256, rank]) * 100)
    _complete(path, TrainingPosition(step=step, epoch=1, epoch_step=2))
    return path


def test_a_complete_checkpoint_verifies(tmp_path):
    verify_checkpoint(write_checkpoint(tmp_path, 5))


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = write_checkpoint(tmp_path, 5)
    file = path / "state" / "rank1.pt"
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "cut" else data[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"rank1\.pt.*sha256"):
        verify_checkpoint(path)


def test_a_checkpoint_without_its_marker_is_not_complete(tmp_path):
    path = write_checkpoint(tmp_path, 5)
    (path / COMPLETE_NAME).unlink()
    with pytest.raises(ArtifactError, match=COMPLETE_NAME):
        verify_checkpoint(path)


def test_the_newest_good_checkpoint_is_taken_and_damaged_ones_are_passed_over(tmp_path):
    assert _newest_good(tmp_path) is None
    paths = {step: write_checkpoint(tmp_path, step) for step in (900, 1000, 20_000_000)}
    (tmp_path / ".step-30000000.partial").mkdir()  # what a killed run leaves
    assert [path.name for path in _checkpoints(tmp_path)] == ["step-20000000", "step-00001000", "step-00000900"]
    assert _newest_good(tmp_path) == str(paths[20_000_000])
    (paths[20_000_000] / "state" / "rank0.pt").write_bytes(b"")
    assert _newest_good(tmp_path) == str(paths[1000])
    (paths[1000] / COMPLETE_NAME).unlink()
    assert _newest_good(tmp_path) == str(paths[900])

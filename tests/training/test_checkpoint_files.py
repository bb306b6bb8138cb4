"""training/checkpoint_files.py: which checkpoint counts as good, which is taken, and that none is destroyed."""

import pytest

from contrec_dist.errors import ArtifactError
from contrec_dist.training.checkpoint_files import (
    COMPLETE_NAME,
    LATEST_NAME,
    find_checkpoint,
    list_checkpoints,
    newest_good,
    set_aside,
    verify_checkpoint,
)


@pytest.fixture
def warnings(monkeypatch):
    """Lines that the log got."""
    from contrec_dist.training import checkpoint_files

    lines = []
    logger = checkpoint_files.get_logger("train")
    monkeypatch.setattr(logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_a_complete_checkpoint_verifies_and_latest_names_it(tmp_path, write_checkpoint):
    verify_checkpoint(write_checkpoint(tmp_path, 5))
    assert (tmp_path / LATEST_NAME).read_text() == "step-00000005\n"


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_file_is_named(tmp_path, damage, write_checkpoint):
    path = write_checkpoint(tmp_path, 5)
    file = path / "state" / "rank1.pt"
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "cut" else data[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"rank1\.pt.*sha256"):
        verify_checkpoint(path)


def test_a_checkpoint_without_its_marker_is_not_complete(tmp_path, write_checkpoint):
    path = write_checkpoint(tmp_path, 5)
    (path / COMPLETE_NAME).unlink()
    with pytest.raises(ArtifactError, match=COMPLETE_NAME):
        verify_checkpoint(path)


def test_the_newest_good_checkpoint_is_taken_and_damaged_ones_are_passed_over(tmp_path, warnings, write_checkpoint):
    assert newest_good(tmp_path) is None
    paths = {step: write_checkpoint(tmp_path, step) for step in (900, 1000, 20_000_000)}
    (tmp_path / ".step-30000000.partial").mkdir()  # what a killed run leaves
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-20000000", "step-00001000", "step-00000900"]
    assert newest_good(tmp_path) == paths[20_000_000] and warnings == []
    (paths[20_000_000] / "state" / "rank0.pt").write_bytes(b"")
    assert newest_good(tmp_path) == paths[1000]
    assert f"checkpoint skipped: {paths[20_000_000] / 'state' / 'rank0.pt'}" in warnings[0]
    assert f"{tmp_path / LATEST_NAME} names step-20000000, which is missing or damaged: step-00001000 is taken" in warnings[1]
    (paths[1000] / COMPLETE_NAME).unlink()
    assert newest_good(tmp_path) == paths[900]


def test_a_kill_before_latest_was_written_loses_no_checkpoint(tmp_path, warnings, write_checkpoint):
    write_checkpoint(tmp_path, 4)
    older = (tmp_path / LATEST_NAME).read_bytes()
    newer = write_checkpoint(tmp_path, 8)
    (tmp_path / LATEST_NAME).write_bytes(older)
    assert newest_good(tmp_path) == newer and warnings == []


def test_a_latest_without_its_checkpoint_is_said(tmp_path, warnings):
    (tmp_path / LATEST_NAME).write_text("step-00000008\n")
    assert newest_good(tmp_path) is None
    assert "names step-00000008, which is missing or damaged: there is no good one" in warnings[0]


def test_resume_takes_what_it_names(tmp_path, write_checkpoint):
    paths = {step: write_checkpoint(tmp_path, step) for step in (4, 8)}
    assert find_checkpoint(tmp_path, "auto") == paths[8]
    assert find_checkpoint(tmp_path, "never") is None
    assert find_checkpoint(tmp_path, "4") == find_checkpoint(tmp_path / "other", str(paths[4])) == paths[4]


def test_a_named_checkpoint_that_is_not_there_or_not_good_is_an_error(tmp_path, write_checkpoint):
    path = write_checkpoint(tmp_path, 4)
    with pytest.raises(ArtifactError, match="step-00000005: got no such checkpoint, expected .* a step among 4"):
        find_checkpoint(tmp_path, "5")
    (path / "state" / "rank0.pt").write_bytes(b"")
    with pytest.raises(ArtifactError, match="rank0.pt"):
        find_checkpoint(tmp_path, "4")


def test_going_back_sets_later_checkpoints_aside_whole(tmp_path, warnings, write_checkpoint):
    for step in (4, 8, 12):
        write_checkpoint(tmp_path, step)
    (tmp_path / "metrics.jsonl").write_text('{"step": 12}\n')
    set_aside(tmp_path, after_step=4)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004"]
    assert (tmp_path / LATEST_NAME).read_text() == "step-00000004\n"
    aside = tmp_path / "set-aside-1"
    for name in ("step-00000008", "step-00000012"):
        verify_checkpoint(aside / name)
    assert (aside / "metrics.jsonl").read_text() == '{"step": 12}\n' and (tmp_path / "metrics.jsonl").is_file()
    assert warnings == [f"set aside in {aside}: step-00000008, step-00000012"]
    set_aside(tmp_path, after_step=-1)
    assert newest_good(tmp_path) is None and not (tmp_path / LATEST_NAME).exists()
    verify_checkpoint(tmp_path / "set-aside-2" / "step-00000004")

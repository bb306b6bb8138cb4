"""training/checkpoint.py, the part that needs no engine: what launch.resume makes of the folder, and what is left out."""

from pathlib import Path

import pytest
import torch
from torch import nn

from contrec_dist.errors import ArtifactError
from contrec_dist.training.checkpoint import _choose, _leaving_out_frozen, _load_trained
from contrec_dist.training.checkpoint_files import list_checkpoints, verify_checkpoint


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_resume_never_starts_anew_and_keeps_what_was_there(tmp_path, write_checkpoint):
    for step in (4, 8):
        write_checkpoint(tmp_path, step)
    assert _choose(tmp_path, "never", None) is None
    assert names(tmp_path) == []
    for step in (4, 8):
        verify_checkpoint(tmp_path / "set-aside-1" / f"step-{step:08d}")
    assert _choose(tmp_path, "auto", None) is None


def test_resume_from_a_step_sets_the_later_ones_aside(tmp_path, write_checkpoint):
    paths = [write_checkpoint(tmp_path, step) for step in (4, 8, 12)]
    assert _choose(tmp_path, "8", None) == str(paths[1])
    assert names(tmp_path) == ["step-00000008", "step-00000004"]


def test_resume_from_another_run_sets_all_of_this_one_aside_and_leaves_that_one_alone(tmp_path, write_checkpoint):
    here, there = tmp_path / "here", tmp_path / "there"
    write_checkpoint(here, 4)
    named = write_checkpoint(there, 2)
    write_checkpoint(there, 6)
    assert _choose(here, str(named), None) == str(named)
    assert names(here) == [] and names(there) == ["step-00000006", "step-00000002"]


def test_error_is_handed_to_all_ranks_and_nothing_is_moved(tmp_path, write_checkpoint):
    write_checkpoint(tmp_path, 4)
    error = _choose(tmp_path, "5", None)
    assert isinstance(error, ArtifactError) and names(tmp_path) == ["step-00000004"]


@pytest.fixture
def adapted() -> nn.Module:
    """A frozen table with a tied output layer, and a trained layer with a buffer."""
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False), "adapter": nn.BatchNorm1d(3)})
    model["out"].weight = model["table"].weight
    model["table"].weight.requires_grad_(False)
    return model


def test_frozen_weights_are_left_out_under_all_their_names_and_only_meanwhile(adapted):
    with _leaving_out_frozen(adapted, True):
        kept = adapted.state_dict()
    assert kept and all(name.startswith("adapter.") for name in kept)
    assert {"table.weight", "out.weight"} <= adapted.state_dict().keys()
    _load_trained({name: value + 1 for name, value in kept.items()}, adapted)
    torch.testing.assert_close(adapted["adapter"].weight, torch.full((3,), 2.0))


def test_a_trained_weight_that_is_missing_is_an_error(adapted):
    with _leaving_out_frozen(adapted, True):
        kept = adapted.state_dict()
    del kept["adapter.weight"]
    with pytest.raises(ArtifactError, match="adapter.weight"):
        _load_trained(kept, adapted)

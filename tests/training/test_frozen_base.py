"""training/frozen_base.py: the hash that ties adapters to their base."""

from pathlib import Path

import pytest

from contrec_dist.errors import ArtifactError
from contrec_dist.training.frozen_base import FrozenBase, hash_weights


def write_base(folder: Path, last: bytes = b"b") -> Path:
    folder.mkdir()
    (folder / "model-1.safetensors").write_bytes(b"a")
    (folder / "model-2.safetensors").write_bytes(last)
    return folder


def test_weights_are_hashed_and_nothing_else(tmp_path):
    one = write_base(tmp_path / "one")
    same, other = write_base(tmp_path / "same"), write_base(tmp_path / "other", last=b"c")
    (same / "README.md").write_text("words")
    assert hash_weights(one) == hash_weights(same) != hash_weights(other)


def test_folder_without_weights_is_a_named_error(tmp_path):
    with pytest.raises(ArtifactError, match=f"{tmp_path}: got no weights"):
        hash_weights(tmp_path)


def test_adapters_of_another_base_are_refused_with_both_names():
    base, checkpoint = FrozenBase("models/new", "1" * 64), Path("step-00000004")
    base.refuse_other({"path": "models/moved", "sha256": "1" * 64}, checkpoint)
    with pytest.raises(ArtifactError, match=r"step-00000004: got adapters of the base models/old \(sha256 2222.*models/new \(sha256 1111"):
        base.refuse_other({"path": "models/old", "sha256": "2" * 64}, checkpoint)

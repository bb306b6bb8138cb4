"""The weights that training leaves as they are: the base under LoRA adapters.

Checkpoints hold what was trained and, of the base, its path and the hash of its weights, so a run over a model of 100 GB
has checkpoints of the size of its adapters; one that is resumed over another base is refused by name.
Cost     Rank 0 reads the weight files once at the start of such a run.
"""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from contrec_dist.config import BackboneConfig
from contrec_dist.errors import ArtifactError, ContRecError
from contrec_dist.manifest import hash_file, hash_json

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class FrozenBase:
    """Where a base lies (backbone.path) and what is in it."""

    path: str
    sha256: str

    def refuse_other(self, stored: dict | None, checkpoint: Path) -> None:
        """Errors   ArtifactError when the checkpoint's adapters were trained on a base of other weights"""
        if stored is not None and stored["sha256"] != self.sha256:
            got = f"adapters of the base {stored['path']} (sha256 {stored['sha256'][:16]})"
            raise ArtifactError(checkpoint, got, f"those of the base {self.path} (sha256 {self.sha256[:16]})")


def find_frozen_base(config: BackboneConfig) -> FrozenBase | None:
    """The base that stays frozen, None where every weight is trained. A collective: rank 0 reads, all hear.

    Errors   ArtifactError when the folder holds no weights, on all ranks
    """
    if not config.lora.rank:
        return None
    found = [_read(config.path) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], ContRecError):
        raise found[0]
    return found[0]


def hash_weights(folder: Path) -> str:
    """One hash of all weight files of a model folder. Errors   ArtifactError when there is none"""
    for pattern in WEIGHT_PATTERNS:
        files = sorted(folder.glob(pattern))
        if files:
            return hash_json({path.name: hash_file(path) for path in files})
    raise ArtifactError(folder, "no weights", f"{' or '.join(WEIGHT_PATTERNS)}")


def _read(path: str) -> FrozenBase | ContRecError:
    try:
        return FrozenBase(path, hash_weights(_local_folder(path)))
    except ContRecError as error:
        return error


def _local_folder(path: str) -> Path:
    """The folder of a model that is named by its path or, once it was loaded, by its name on a hub."""
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils import CONFIG_NAME, cached_file

    return Path(cached_file(path, CONFIG_NAME, local_files_only=True)).parent

"""Where the catalogue's latents lie."""

from pathlib import Path

import numpy as np

from contrec_dist.config import Config
from contrec_dist.embeddings.layout import read_layout
from contrec_dist.errors import ArtifactError

ITEM_LATENTS, NEW_ITEM_LATENTS = "item_latents.npy", "new_item_latents.npy"


def item_latents_path(config: Config, model_folder: Path | None = None) -> Path:
    """The latents (N, K, Z) that the model reads and generates: its own where training moved them (head.latents: trained), else
    the tokenizer's. `model_folder`: where the model lies; None: model/ of the run.
    """
    own = (config.folder("model") if model_folder is None else Path(model_folder)) / ITEM_LATENTS
    return own if own.is_file() else config.folder("tokens") / ITEM_LATENTS


def encodes_new_items(config: Config) -> bool:
    """Whether tokens/ holds new_item_latents.npy: head.residual_drop asks for it, and embeddings/ have both of their parts."""
    if config.head.residual_drop == 0 or not (config.folder("embeddings") / "layout.json").is_file():
        return False  # without embeddings the stage itself says what is missing
    return all(part.stop > part.start for part in read_layout(config.folder("embeddings")).values())


def load_new_item_latents(config: Config) -> np.ndarray | None:
    """(N, K, Z) float32, raw: every item as the tokenizer makes it without its collaborative part; None where encodes_new_items says no.

    Errors   ArtifactError where tokens/ was written without them
    """
    path = config.folder("tokens") / NEW_ITEM_LATENTS
    if not encodes_new_items(config):
        return None
    if not path.is_file():
        raise ArtifactError(path, "nothing", "latents that `contrec precompute` writes where head.residual_drop is above 0")
    return np.load(path)

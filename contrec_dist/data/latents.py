"""Where the catalogue's latents lie."""

from pathlib import Path

from contrec_dist.config import Config

ITEM_LATENTS = "item_latents.npy"


def item_latents_path(config: Config, model_folder: Path | None = None) -> Path:
    """The latents (N, K, Z) that the model reads and generates: its own where training moved them (head.latents: trained), else
    the tokenizer's. `model_folder`: where the model lies; None: model/ of the run.
    """
    own = (config.folder("model") if model_folder is None else Path(model_folder)) / ITEM_LATENTS
    return own if own.is_file() else config.folder("tokens") / ITEM_LATENTS

"""SASRec with text in its item vectors: the text columns of embeddings/items.npy, the features that the model itself gets.

Writes   sasrec.safetensors beside the lists
"""

from pathlib import Path

import numpy as np

from contrec_dist.baselines.sasrec import baseline
from contrec_dist.baselines.sasrec.recommender import SasRecRecommender
from contrec_dist.config import Config
from contrec_dist.embeddings.layout import read_text_part
from contrec_dist.errors import ArtifactError

SECTIONS, INPUTS = baseline.SECTIONS, ("embeddings",)
settings = baseline.settings


def fit(config: Config, work: Path) -> tuple[SasRecRecommender, dict]:
    """Train and save in `work`."""
    return baseline.fit_and_save(config, work, load_text_vectors(config), "sasrec_text")


def load_recommender(config: Config, folder: Path) -> SasRecRecommender:
    """The finished baseline of a run. `config` must be the one that it was fitted with."""
    return baseline.load_recommender(config, folder, load_text_vectors(config))


def load_text_vectors(config: Config) -> np.ndarray:
    """The text part of the item embeddings. -> (N, E) float32. Errors   ArtifactError where they have none"""
    folder = config.folder("embeddings")
    text = read_text_part(folder)
    if text is None:
        raise ArtifactError(folder / "layout.json", "no text columns", "some; `contrec embed` with embed.text_dim above 0")
    return np.ascontiguousarray(text, dtype=np.float32)

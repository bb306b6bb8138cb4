"""Text kNN: the items whose text is nearest to that of the items met last. It recommends items that nobody has met yet.

A user's vector is the sum of the unit text vectors of the newest items, the a-th newest weighing 1 / a ** recency_decay; items
are ranked by their cosine with it. The text vectors are those that the tokenizer gets (embeddings/items.npy). No training.
Cost     one matrix product of users and catalogue
"""

import json
from pathlib import Path
from typing import Sequence

import numpy as np

from contrec_dist.config import Config, TextKnnConfig
from contrec_dist.errors import ConfigError
from contrec_dist.retrieval.top_k import exact_top_k

SECTIONS, INPUTS = ("text_knn",), ("embeddings",)


def settings(config: Config) -> dict:
    """Nothing but its own section and the embeddings decide the lists."""
    return {}


def fit(config: Config, work: Path) -> tuple["TextKnn", dict]:
    """Read the text part. Errors   ConfigError where the embeddings have none"""
    folder = config.folder("embeddings")
    start, stop = json.loads((folder / "layout.json").read_text())["text"]
    if start == stop:
        raise ConfigError("embed.text_dim", 0, "a text part, which is all that text_knn knows of items")
    return TextKnn(np.load(folder / "items.npy")[:, start:stop], config.text_knn), {"text_dim": stop - start}


class TextKnn:
    """The recommender of baselines/registry.py. Shapes   text (N, D) float32, of which directions count alone"""

    def __init__(self, text: np.ndarray, config: TextKnnConfig):
        self.vectors = (text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-12)).astype(np.float32)
        self.weights = np.arange(1, config.num_recent + 1) ** -config.recency_decay

    def recommend(self, histories: Sequence[np.ndarray], k: int, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The k items nearest to each history; scores are cosines, times the sum's length."""
        queries = np.zeros((len(histories), self.vectors.shape[1]), dtype=np.float32)
        for row, history in enumerate(histories):
            newest = history[::-1][: len(self.weights)]
            queries[row] = self.weights[: len(newest)] @ self.vectors[newest]
        scores, items = exact_top_k(queries, self.vectors, k, "inner_product")
        return items, scores

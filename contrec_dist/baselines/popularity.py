"""Popularity: the same most-trained-on items for everybody, less what the user has seen.

Counts are of training interactions only. No training; a list costs its length.
"""

from pathlib import Path
from typing import Sequence

import numpy as np

from contrec_dist.config import Config
from contrec_dist.data.catalog import load_items
from contrec_dist.retrieval.ranking import search_unseen
from contrec_dist.retrieval.top_k import empty_result

SECTIONS, INPUTS = (), ()


def settings(config: Config) -> dict:
    """Nothing but the catalogue decides the lists."""
    return {}


def fit(config: Config, work: Path) -> tuple["Popularity", dict]:
    """Count training interactions."""
    return Popularity(load_items(config.folder("catalog"))["num_train"].to_numpy()), {}


class Popularity:
    """The recommender of baselines/registry.py. Shapes   num_train (N,) int64"""

    def __init__(self, num_train: np.ndarray):
        self.num_train = num_train

    def recommend(self, histories: Sequence[np.ndarray], k: int, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same list for everybody; scores are the counts."""
        nothing, offsets = np.zeros(0, dtype=np.int64), np.zeros(len(histories) + 1, dtype=np.int64)
        items = recommend_popular(self.num_train, k, nothing, offsets, mask=False)
        return items, np.where(items < 0, -np.inf, self.num_train[items]).astype(np.float32)


def recommend_popular(
    num_train: np.ndarray,
    k: int,
    seen_flat: np.ndarray,
    seen_offsets: np.ndarray,
    *,
    mask: bool,
) -> np.ndarray:
    """The k items with most training interactions, ties by lower item_idx, for every row of seen items.

    `mask` leaves out what the row has seen; -1 past the end of the catalogue.

    Shapes   num_train (N,) int64, seen_offsets (B + 1,) -> item_idx (B, k) int64
    """
    order = np.lexsort((np.arange(len(num_train)), -num_train))

    def search(queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        scores, item_idx = empty_result(len(queries), count)
        width = min(count, len(order))
        item_idx[:, :width], scores[:, :width] = order[:width], num_train[order[:width]]
        return scores, item_idx

    queries = np.empty((len(seen_offsets) - 1, 0), dtype=np.float32)
    if mask:
        return search_unseen(search, queries, k, seen_flat, seen_offsets)[1]
    return search(queries, k)[1]

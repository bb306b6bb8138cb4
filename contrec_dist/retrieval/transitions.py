"""The transition score: how often training histories led from what a user met last to an item. Fitted and read in score.

    t(j | history) = log1p(sum over the newest items i of S[i, j] / a ** recency_decay / FLOOR),   i the a-th newest

with S the similarity of baselines/item_knn.py under the config's section item_knn: the sparse memory of pairs, which vectors
of some hundred dimensions blur. It is 0 where no recent item leads to j, and for items that joined after the histories.

Cost     the pairs of the training histories, once, in the driver's memory; a sparse product and a search a user.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from contrec_dist.baselines.item_knn import FILES, item_similarities
from contrec_dist.config import Config, ItemKnnConfig
from contrec_dist.data.catalog import Histories, load_items
from contrec_dist.retrieval.scored_users import Users

FLOOR = 0.05  # below the similarity of a pair that was met once; what is smaller hardly counts
CHUNK_USERS = 512


def fit_transitions(config: Config, folder: Path) -> None:
    """Write S into `folder`, which is complete or not there."""
    if folder.is_dir():
        return
    catalog, partial = config.folder("catalog"), folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    num_train = load_items(catalog)["num_train"].to_numpy()
    similarity = item_similarities(Histories.load(catalog), num_train, config.item_knn)
    for part, name in FILES.items():
        np.save(partial / name, getattr(similarity, part))
    os.replace(partial, folder)


@dataclass
class TransitionScores:
    """Shapes   similarity (N, N), memory-mapped"""

    similarity: csr_array
    config: ItemKnnConfig

    @classmethod
    def open(cls, folder: Path, config: ItemKnnConfig) -> "TransitionScores":
        values, items, offsets = (np.load(folder / name, mmap_mode="r") for name in FILES.values())
        num_items = len(offsets) - 1
        return cls(csr_array((values, items, offsets), shape=(num_items, num_items)), config)

    def scores(self, users: Users, item_idx: np.ndarray) -> np.ndarray:
        """0 where there is no item (-1). item_idx (B, C) -> (B, C) float32"""
        found = np.zeros(item_idx.shape, dtype=np.float32)
        for start in range(0, len(users), CHUNK_USERS):  # bounds the pairs that are held at a time
            rows = np.arange(start, min(start + CHUNK_USERS, len(users)))
            found[rows] = self._look_up(self._reached(users, rows), item_idx[rows])
        return np.log1p(found / np.float32(FLOOR))

    def _reached(self, users: Users, rows: np.ndarray) -> csr_array:
        """Summed similarities to all items that the newest ones of some users lead to. -> (rows, N)"""
        items, offsets = users.newest(rows, self.config.num_recent)
        lengths = np.diff(offsets)
        ages = np.repeat(offsets[1:], lengths) - np.arange(len(items))  # 1 is the newest
        known = items < self.similarity.shape[0]
        weights = (known * ages**-self.config.recency_decay).astype(np.float32)
        histories = csr_array((weights, np.where(known, items, 0), offsets), shape=(len(rows), self.similarity.shape[0]))
        reached = (histories @ self.similarity).tocsr()
        reached.sort_indices()
        return reached

    def _look_up(self, reached: csr_array, item_idx: np.ndarray) -> np.ndarray:
        """Entries of a sparse matrix by row. reached (B, N), item_idx (B, C) -> (B, C)"""
        num_rows, num_items = reached.shape
        inside = (item_idx >= 0) & (item_idx < num_items)
        if not reached.nnz:
            return np.zeros(item_idx.shape, dtype=np.float32)
        keys = np.repeat(np.arange(num_rows), np.diff(reached.indptr)) * num_items + reached.indices
        wanted = np.arange(num_rows)[:, None] * num_items + np.where(inside, item_idx, 0)
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(inside & (keys[place] == wanted), reached.data[place], np.float32(0.0))

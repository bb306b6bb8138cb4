"""Sequential item-kNN: what followed the items that a user met last, in the training histories of everybody.

    C[i, j] = sum over places of a training history, i before j at most `window` places apart, of 1 / gap ** gap_decay
              + backward_weight * the same with j before i
    S[i, j] = C[i, j] / (n_i ** source_power * n_j ** target_power + shrinkage),   n: training interactions
    score(j | history) = sum over its num_recent newest items i of S[i, j] / a ** recency_decay,   i the a-th newest

Validation and test items enter nothing but the histories asked about. Items that no recent one leads to stand below all
others, most trained-on first, so no list is short.

Writes       similarity_{values,items,offsets}.npy: S by rows, compressed
Guarantees   a function of catalogue and config, no randomness; ties go to the lower item_idx.
Cost         `window` sorts of the training interactions; memory for the pairs that occur, at most N x N. Scoring:
             a sparse product, and a pass over B x N scores, CHUNK_SCORES at a time.
"""

from pathlib import Path
from typing import Sequence

import numpy as np
from scipy.sparse import csr_array

from contrec_dist.config import Config, ItemKnnConfig
from contrec_dist.data.catalog import Histories, load_items
from contrec_dist.data.pairs import count_pairs
from contrec_dist.retrieval.top_k import empty_result

SECTIONS, INPUTS = ("item_knn",), ()
FILES = {"data": "similarity_values.npy", "indices": "similarity_items.npy", "indptr": "similarity_offsets.npy"}
CHUNK_SCORES = 2**24  # scores held at a time, 64 MiB


def settings(config: Config) -> dict:
    """Nothing outside the section `item_knn`."""
    return {}


def fit(config: Config, work: Path) -> tuple["ItemKnn", dict]:
    """Count pairs, normalise, save S in `work`."""
    catalog = config.folder("catalog")
    num_train = load_items(catalog)["num_train"].to_numpy()
    similarity = item_similarities(Histories.load(catalog), num_train, config.item_knn)
    for part, name in FILES.items():
        np.save(work / name, getattr(similarity, part))
    return ItemKnn(similarity, num_train, config.item_knn), {"num_similarities": int(similarity.nnz)}


def load_recommender(config: Config, folder: Path) -> "ItemKnn":
    """The finished baseline of a run. `config` must be the one that it was fitted with."""
    num_train = load_items(config.folder("catalog"))["num_train"].to_numpy()
    parts = tuple(np.load(Path(folder) / name) for name in FILES.values())
    return ItemKnn(csr_array(parts, shape=(len(num_train), len(num_train))), num_train, config.item_knn)


def item_similarities(histories: Histories, num_train: np.ndarray, config: ItemKnnConfig) -> csr_array:
    """S, of every row its `neighbours` largest. Shapes   num_train (N,) int64 -> (N, N) float32"""
    pairs = count_pairs(histories, len(num_train), config.window, config.gap_decay)
    if config.backward_weight:
        pairs = (pairs + np.float32(config.backward_weight) * pairs.T).tocsr()
    pairs.sort_indices()
    counts = num_train.astype(np.float64)
    sources = np.repeat(np.arange(len(counts)), np.diff(pairs.indptr))
    norm = counts[sources] ** config.source_power * counts[pairs.indices] ** config.target_power + config.shrinkage
    pairs.data = (pairs.data / norm).astype(np.float32)
    return keep_largest(pairs, config.neighbours) if config.neighbours else pairs


def keep_largest(matrix: csr_array, count: int) -> csr_array:
    """The `count` largest entries of every row, ties by lower column. Its indices are sorted, before and after."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    place = np.arange(len(order)) - matrix.indptr[rows]
    kept = np.sort(order[place < count])
    offsets = np.searchsorted(rows[kept], np.arange(matrix.shape[0] + 1))
    return csr_array((matrix.data[kept], matrix.indices[kept], offsets), shape=matrix.shape)


class ItemKnn:
    """The recommender of baselines/registry.py. Shapes   similarity (N, N), num_train (N,) int64"""

    def __init__(self, similarity: csr_array, num_train: np.ndarray, config: ItemKnnConfig):
        self.similarity, self.config = similarity, config
        by_popularity = np.lexsort((np.arange(len(num_train)), -num_train))
        self.unreached = np.empty(len(num_train), dtype=np.float32)
        self.unreached[by_popularity] = -np.arange(1, len(num_train) + 1)  # below every similarity, all different

    def recommend(self, histories: Sequence[np.ndarray], k: int, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores are sums of similarities; -r for the r-th most popular item where no recent one leads to it."""
        scores, items = empty_result(len(histories), k)
        width, step = min(k, len(self.unreached)), max(1, CHUNK_SCORES // max(1, len(self.unreached)))
        for start in range(0, len(histories) if width else 0, step):
            rows = slice(start, start + step)
            scores[rows, :width], items[rows, :width] = best_of_rows(self.score(histories[rows]), width)
        return items, scores

    def score(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Scores of the whole catalogue. -> (B, N) float32"""
        newest = [history[::-1][: self.config.num_recent] for history in histories]
        ages = np.concatenate([np.arange(1.0, len(one) + 1) for one in newest])
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in newest])])
        weights = (ages**-self.config.recency_decay).astype(np.float32)
        shape = (len(newest), len(self.unreached))
        reached = (csr_array((weights, np.concatenate(newest), offsets), shape=shape) @ self.similarity).tocoo()
        scores = np.repeat(self.unreached[None], len(newest), axis=0)
        scores[reached.coords] = reached.data
        return scores


def best_of_rows(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of every row, ties by lower column. Shapes   scores (B, N), k <= N -> (B, k), (B, k) int64"""
    cut = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k]
    rows, columns = np.nonzero(scores >= cut[:, None])  # more than k where the cut ties
    order = np.lexsort((columns, -scores[rows, columns], rows))
    place = np.arange(len(rows)) - np.searchsorted(rows, np.arange(len(scores)))[rows]
    items = columns[order[place < k]].reshape(len(scores), k)
    return np.take_along_axis(scores, items, axis=1), items

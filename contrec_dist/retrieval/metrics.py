"""Ranking metrics with one target a user, over the full catalogue: HR, NDCG, MRR, coverage, Gini, diversity, and their slices.

A rank is 1 for the first place and 0 for a target that is not in the list (a miss). Everything is a fraction in [0, 1], but
diversity, which is above 1 where the items of a list point away from each other.
"""

import numpy as np

from contrec_dist.errors import DataError

LIST_CUT = 10  # the cut-off of coverage, Gini, diversity and the slices
CHUNK_LISTS = 4096  # lists whose item vectors are held at a time


def rank_targets(item_idx: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Place of every user's target in the user's list, 1-based, 0 for a miss.

    Shapes   item_idx (B, k) int64 with -1 past the end, targets (B,) int64 -> (B,) int64
    """
    if item_idx.ndim != 2 or targets.shape != item_idx.shape[:1]:
        raise DataError("targets", f"lists {item_idx.shape} and targets {targets.shape}", "(B, k) and (B,)")
    hits = item_idx == targets[:, None]
    hits &= item_idx >= 0
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)


def hits_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """1.0 for users whose target is among the first k, else 0.0: (B,) float64; its mean is HR@k."""
    return ((ranks >= 1) & (ranks <= k)).astype(np.float64)


def gains_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """1 / log2(1 + rank) inside the first k, else 0: (B,) float64; its mean is NDCG@k (the ideal gain is 1)."""
    return np.where(hits_at(ranks, k) > 0, 1.0 / np.log2(1.0 + np.maximum(ranks, 1)), 0.0)


def reciprocal_ranks(ranks: np.ndarray) -> np.ndarray:
    """1 / rank, 0 for a miss: (B,) float64; its mean is MRR at the length of the lists."""
    return np.where(ranks >= 1, 1.0 / np.maximum(ranks, 1), 0.0)


def coverage_at(item_idx: np.ndarray, num_items: int, k: int) -> float:
    """Share of the catalogue that stands in at least one user's first k."""
    return float((_count_items(item_idx, num_items, k) > 0).mean())


def gini_at(item_idx: np.ndarray, num_items: int, k: int) -> float:
    """Gini coefficient of how often items stand in the first k: 0 when all equally often, near 1 when few get all."""
    counts = np.sort(_count_items(item_idx, num_items, k)).astype(np.float64)
    if counts.sum() == 0:
        return 0.0
    places = np.arange(1, num_items + 1)
    return float((2 * places - num_items - 1) @ counts / (num_items * counts.sum()))


def diversity_at(item_idx: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Mean of 1 - cosine over the pairs of every list's first k; 0 where there is no pair. An item without a vector has cosine 0.

    Shapes   item_idx (B, k') int64 with -1 past the end, vectors (N, E) -> (B,) float64
    Source   intra-list distance, Ziegler et al., WWW 2005
    """
    diversity = np.zeros(len(item_idx))
    for start in range(0, len(item_idx), CHUNK_LISTS):
        items = item_idx[start : start + CHUNK_LISTS, :k]
        listed = vectors[np.maximum(items, 0)].astype(np.float64)  # (b, k, E)
        lengths = np.linalg.norm(listed, axis=2, keepdims=True)
        listed = np.where((items >= 0)[:, :, None] & (lengths > 0), listed / np.maximum(lengths, 1e-30), 0.0)
        same = (listed**2).sum((1, 2))  # every item with itself
        cosines = (listed.sum(axis=1) ** 2).sum(axis=1) - same
        count = (items >= 0).sum(axis=1)
        pairs = count * (count - 1)
        diversity[start : start + CHUNK_LISTS] = np.where(pairs > 0, 1 - cosines / np.maximum(pairs, 1), 0.0)
    return diversity


def summarize_lists(
    item_idx: np.ndarray, targets: np.ndarray, num_items: int, ks: list[int], vectors: np.ndarray | None = None
) -> dict[str, float]:
    """Every metric of one set of lists: hr@k and ndcg@k for each k, mrr, coverage@10, gini@10; with item vectors diversity@10.

    Shapes   item_idx (B, k) int64, targets (B,) int64, vectors (N, E)
    Errors   DataError when there is no user, or a cut-off exceeds the length of the lists.
    """
    if not len(targets):
        raise DataError("targets", "no users", "at least one user with a held-out item")
    if max(ks) > item_idx.shape[1]:
        raise DataError("evaluate.ks", f"a cut-off of {max(ks)}", f"at most {item_idx.shape[1]}, the length of the lists")
    ranks = rank_targets(item_idx, targets)
    metrics = {f"hr@{k}": float(hits_at(ranks, k).mean()) for k in ks}
    metrics |= {f"ndcg@{k}": float(gains_at(ranks, k).mean()) for k in ks}
    metrics["mrr"] = float(reciprocal_ranks(ranks).mean())
    metrics[f"coverage@{LIST_CUT}"] = coverage_at(item_idx, num_items, LIST_CUT)
    metrics[f"gini@{LIST_CUT}"] = gini_at(item_idx, num_items, LIST_CUT)
    if vectors is not None:
        metrics[f"diversity@{LIST_CUT}"] = float(diversity_at(item_idx, vectors, LIST_CUT).mean())
    return metrics


def bucket_items(num_train: np.ndarray, num_buckets: int) -> np.ndarray:
    """Bucket of every item: 0 the rarest, num_buckets - 1 the most popular, equal shares of training interactions.

    An item belongs where the middle of its interactions falls; items without any are in bucket 0.

    Shapes   num_train (N,) int64 -> (N,) int64
    """
    order = np.lexsort((np.arange(len(num_train)), num_train))
    counts = num_train[order].astype(np.float64)
    middle = (np.cumsum(counts) - counts / 2) / max(1.0, counts.sum())
    buckets = np.empty(len(num_train), dtype=np.int64)
    buckets[order] = np.minimum((middle * num_buckets).astype(np.int64), num_buckets - 1)
    return buckets


def slice_by_popularity(ranks: np.ndarray, targets: np.ndarray, num_train: np.ndarray, num_buckets: int) -> list[dict]:
    """HR@10 and NDCG@10 by the popularity bucket of the target, with the counts of users and items."""
    buckets = bucket_items(num_train, num_buckets)
    rows = []
    for bucket in range(num_buckets):
        inside = num_train[buckets == bucket]
        if inside.size:
            span = {"num_items": int(inside.size), "min_train": int(inside.min()), "max_train": int(inside.max())}
        else:
            span = {"num_items": 0, "min_train": None, "max_train": None}
        rows.append({"bucket": bucket, **span, **_slice(ranks[buckets[targets] == bucket])})
    return rows


def slice_cold_start(ranks: np.ndarray, targets: np.ndarray, num_train: np.ndarray) -> dict:
    """HR@10 and NDCG@10 of users whose target has no training interaction, with the counts."""
    return {"num_items": int((num_train == 0).sum()), **_slice(ranks[num_train[targets] == 0])}


def bootstrap_interval(
    values: np.ndarray, seed: int, num_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over users.

    Resampling users is drawing counts of the distinct values from a multinomial, so the cost does not grow with users.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=num_resamples)
    low, high = np.quantile(draws @ distinct / len(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _slice(ranks: np.ndarray) -> dict:
    """HR and NDCG of some users; null where there are none."""
    if not ranks.size:
        return {"num_users": 0, f"hr@{LIST_CUT}": None, f"ndcg@{LIST_CUT}": None}
    hit_rate, gain = float(hits_at(ranks, LIST_CUT).mean()), float(gains_at(ranks, LIST_CUT).mean())
    return {"num_users": int(ranks.size), f"hr@{LIST_CUT}": hit_rate, f"ndcg@{LIST_CUT}": gain}


def _count_items(item_idx: np.ndarray, num_items: int, k: int) -> np.ndarray:
    """How often every item stands in the first k: (N,) int64."""
    listed = item_idx[:, :k]
    return np.bincount(listed[listed >= 0], minlength=num_items)

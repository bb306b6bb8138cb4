"""What happens to Top-K lists between search and recommendation: seen items leave, samples are fused, text has its say.

Pure numpy on the contract of top_k.py: lists are sorted best first, ties by lower item_idx, (-inf, -1) past the end.
Seen items come as one flat array with offsets: row b has seen[offsets[b]:offsets[b + 1]], in any order, repeats allowed.
"""

from typing import Sequence

import numpy as np

from contrec_dist.errors import DataError
from contrec_dist.retrieval.top_k import Search, best_first, empty_result

FIRST_OVERFETCH = 16  # seen items allowed for in the first search; rows that need more are searched again


def mask_seen(
    scores: np.ndarray, item_idx: np.ndarray, seen_flat: np.ndarray, seen_offsets: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Drop each row's seen items from its sorted candidates and keep the first k; a caller over-fetches, or gets -1.

    Shapes   scores (B, C), item_idx (B, C), seen_offsets (B + 1,) -> (B, k) float32, (B, k) int64
    """
    _check_offsets(seen_flat, seen_offsets, len(item_idx))
    stride = int(max(item_idx.max(initial=0), seen_flat.max(initial=0))) + 1
    seen_row = np.repeat(np.arange(len(item_idx), dtype=np.int64), np.diff(seen_offsets))
    candidate_keys = np.arange(len(item_idx), dtype=np.int64)[:, None] * stride + item_idx
    drop = (item_idx < 0) | np.isin(candidate_keys, seen_row * stride + seen_flat)
    order = np.argsort(drop, axis=1, kind="stable")[:, :k]
    kept_scores, kept_idx = empty_result(len(item_idx), k)
    dropped = np.take_along_axis(drop, order, axis=1)
    kept_idx[:, : order.shape[1]] = np.where(dropped, -1, np.take_along_axis(item_idx, order, axis=1))
    kept_scores[:, : order.shape[1]] = np.where(dropped, -np.inf, np.take_along_axis(scores, order, axis=1))
    return kept_scores, kept_idx


def search_unseen(
    search: Search, queries: np.ndarray, k: int, seen_flat: np.ndarray, seen_offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The k best items that a row has not seen: over-fetch, mask, and search again for the rows that came short.

    A row is short of k only when the catalogue (or an approximate index) has nothing more for it.

    Shapes   queries (B, Q) -> scores (B, k) float32, item_idx (B, k) int64
    """
    return search_views(search, queries, k, seen_flat, seen_offsets, ("masked",))["masked"]


def search_views(
    search: Search, queries: np.ndarray, k: int, seen_flat: np.ndarray, seen_offsets: np.ndarray, views: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The k best items of every row without those it has seen ('masked', as search_unseen) and with them ('kept').

    One search serves both: the longer list that masking needs begins with the list that keeps everything.
    Shapes   queries (B, Q) -> {view: (scores (B, k) float32, item_idx (B, k) int64)}
    """
    _check_offsets(seen_flat, seen_offsets, len(queries))
    num_seen = np.diff(seen_offsets)
    first = k + (int(min(num_seen.max(initial=0), FIRST_OVERFETCH)) if "masked" in views else 0)
    fetched_scores, fetched_idx = search(queries, first)
    found = {"kept": (fetched_scores[:, :k], fetched_idx[:, :k])}
    if "masked" in views:
        scores, item_idx = mask_seen(fetched_scores, fetched_idx, seen_flat, seen_offsets, k)
        short = np.flatnonzero((item_idx[:, -1] < 0) & (num_seen + k > first) & (fetched_idx[:, -1] >= 0))
        if short.size:
            flat, offsets = select_seen(seen_flat, seen_offsets, short)
            more_scores, more_idx = search(queries[short], k + int(num_seen[short].max()))
            scores[short], item_idx[short] = mask_seen(more_scores, more_idx, flat, offsets, k)
        found["masked"] = scores, item_idx
    return {view: found[view] for view in views}


def select_seen(seen_flat: np.ndarray, seen_offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The flat array and offsets of some rows, in their order."""
    lengths = np.diff(seen_offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    places = np.arange(offsets[-1]) + np.repeat(np.asarray(seen_offsets)[rows] - offsets[:-1], lengths)
    return seen_flat[places], offsets


def fuse_samples(
    scores: np.ndarray, item_idx: np.ndarray, k: int, temperature: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rank items by the density that S sampled latents put on them: log of the mean over samples of exp(score / temperature).

    With `scores` = -squared distance this is a Gaussian kernel of variance temperature / 2 around each sample. An item that
    is not among a sample's candidates gets nothing from that sample. The order of the samples is of no effect.
    temperature None: each row's own scale, the mean over its samples of the distance in score between the first and the
    last candidate, so that a far candidate of one sample counts about 1/e of its nearest.

    Shapes   scores (S, B, C), item_idx (S, B, C) -> (B, k) float32, (B, k) int64
    Errors   DataError for shapes that differ or a temperature that is not positive.
    """
    if scores.shape != item_idx.shape or scores.ndim != 3:
        raise DataError("samples", f"scores {scores.shape} and item_idx {item_idx.shape}", "one shape (S, B, C)")
    if temperature is not None and temperature <= 0:
        raise DataError("temperature", temperature, "a positive number")
    num_samples, num_rows, _ = scores.shape
    scale = _own_scale(scores, item_idx) if temperature is None else np.full(num_rows, float(temperature))
    energy = np.where(item_idx < 0, -np.inf, scores.astype(np.float64) / scale[:, None])
    energy = energy.transpose(1, 0, 2).reshape(num_rows, -1)  # (B, S * C)
    items = item_idx.transpose(1, 0, 2).reshape(num_rows, -1)
    order = np.lexsort((energy, items), axis=-1)  # one item's entries side by side, rising: a fixed order of summation
    items, energy = np.take_along_axis(items, order, axis=1), np.take_along_axis(energy, order, axis=1)
    fused, first = _log_sum_runs(energy, items)
    return best_first(fused - np.log(num_samples), np.where(first, items, -1), k)


def combine_scores(
    scores: np.ndarray, item_idx: np.ndarray, others: dict[str, tuple[float, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Re-rank candidates by score + sum of weight * other score, by name in `others`, with the contract's tie rule.

    Shapes   scores, item_idx and every other score (B, C) -> (B, k) float32, (B, k) int64
    Errors   DataError naming a score of another shape, or that is not finite
    """
    present, hybrid = item_idx >= 0, scores.astype(np.float64)
    for name, (weight, values) in others.items():
        if not scores.shape == item_idx.shape == values.shape:
            got = f"scores {scores.shape}, item_idx {item_idx.shape}, {name} {values.shape}"
            raise DataError("candidates", got, "one shape (B, C)")
        if not np.isfinite(values[present]).all():
            raise DataError(name, "NaN or infinity", "finite numbers")
        hybrid += weight * np.where(present, values, 0.0)
    return best_first(hybrid.astype(np.float32), item_idx, k)


def _own_scale(scores: np.ndarray, item_idx: np.ndarray) -> np.ndarray:
    """Mean over samples of (first - last candidate's score), at least a small positive number: (B,) float64."""
    present = item_idx >= 0
    best = np.where(present, scores, -np.inf).max(axis=2)
    worst = np.where(present, scores, np.inf).min(axis=2)
    spread = np.where(present.any(axis=2), best.astype(np.float64) - worst, 0.0)
    return np.maximum(spread.mean(axis=0), 1e-6)


def _log_sum_runs(energy: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log-sum-exp over runs of equal items in a row: the value at a run's first place, and a mask of these places."""
    first = np.ones(items.shape, dtype=bool)
    first[:, 1:] = items[:, 1:] != items[:, :-1]
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, items.size))
    peak = np.maximum.reduceat(energy.ravel(), starts)
    with np.errstate(invalid="ignore"):  # -inf - -inf of absent candidates, which best_first drops
        total = np.add.reduceat(np.exp(energy.ravel() - np.repeat(peak, lengths)), starts)
    fused = np.full(items.size, -np.inf)
    fused[starts] = peak + np.log(total)
    return fused.reshape(items.shape), first


def _check_offsets(seen_flat: np.ndarray, seen_offsets: np.ndarray, num_rows: int) -> None:
    if len(seen_offsets) != num_rows + 1 or seen_offsets[0] != 0 or seen_offsets[-1] != len(seen_flat):
        got = f"{len(seen_offsets)} offsets ending at {seen_offsets[-1] if len(seen_offsets) else None}"
        raise DataError("seen_offsets", got, f"{num_rows + 1} offsets from 0 to {len(seen_flat)}")

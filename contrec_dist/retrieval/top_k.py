"""The Top-K search contract and its exact reference.

    search(queries (B, Q) float32, k) -> (scores (B, k) float32, item_idx (B, k) int64)

Every search of this project keeps it: rows sorted best first, ties by the lower item_idx, (-inf, -1) past the end,
larger scores better for every metric ('l2' scores are NEGATIVE squared distances). A pair's score is summed in float64
in a fixed order and rounded to float32 once, so it is the same in whatever batch, chunk or shard the pair is met, and
equal vectors tie exactly.

Cost: one matrix product over the catalogue in chunks; memory is bounded by the chunk sizes below, not by B * N.
"""

from typing import Callable, Literal, Sequence

import numpy as np

from contrec_dist.errors import DataError

Metric = Literal["inner_product", "l2"]
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]

METRICS = ("inner_product", "l2")
SLACK_ROWS = 16  # fetched beyond k, so that a tie at the cut seldom needs a second fetch
CHUNK_ROWS = 16384  # catalogue rows of one matrix product
CHUNK_QUERIES = 256  # queries of one matrix product
CHUNK_NUMBERS = 2**17  # numbers gathered at a time when pairs are scored: they stay in a core's cache
CHUNK_CANDIDATES = 2**23  # candidates held at a time


def exact_top_k(
    queries: np.ndarray, vectors: np.ndarray, k: int, metric: Metric = "inner_product"
) -> tuple[np.ndarray, np.ndarray]:
    """Search all of `vectors`, whose row number is the item_idx: the reference of every index.

    Shapes   queries (B, Q), vectors (N, Q) -> scores (B, k) float32, item_idx (B, k) int64
    Errors   DataError for NaN or infinity, another width, k < 1 or an unknown metric.
    """
    check_metric(metric)
    vectors = check_vectors(vectors, "vectors")
    queries = check_queries(queries, vectors.shape[1], k)
    return refine_top_k(
        queries,
        k,
        fetch=lambda rows, count: _fetch_dense(rows, vectors, count, metric),
        gather=lambda idx: vectors[idx],
        num_rows=len(vectors),
        metric=metric,
        max_norm=largest_norm(vectors),
        fetch_epsilon=float(np.finfo(np.float64).eps),
    )


def refine_top_k(
    queries: np.ndarray,
    k: int,
    *,
    fetch: Search,
    gather: Callable[[np.ndarray], np.ndarray],
    num_rows: int,
    metric: Metric,
    max_norm: float,
    fetch_epsilon: float | None,
    ids: np.ndarray | None = None,
    removed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Turn a fast search with rounding errors and its own tie order into one that keeps the contract.

    `fetch(queries, count)` gives roughly the best `count` rows; `gather` their vectors. Candidates are scored again
    exactly. While a row that was not fetched might still belong to a query's k best, given the rounding error of an
    arithmetic with `fetch_epsilon`, more are fetched for that query. None: `fetch` is approximate by design, and more
    are fetched only where removed rows left a query short of k. ids (num_rows,) int64: what comes back, and breaks
    ties, instead of the row; removed (num_rows,) bool: never come back.
    """
    scores, found = empty_result(len(queries), k)
    num_live = num_rows if removed is None else num_rows - int(removed.sum())
    unsettled, count = np.arange(len(queries)), min(num_rows, -(-(k + SLACK_ROWS) * num_rows // max(1, num_live)))
    while unsettled.size and count and num_live:
        step, again = max(1, CHUNK_CANDIDATES // count), []
        for start in range(0, unsettled.size, step):
            rows = unsettled[start : start + step]
            rough, fetched = fetch(queries[rows], count)
            candidates = fetched if removed is None else np.where((fetched < 0) | removed[fetched], -1, fetched)
            exact = score_candidates(queries[rows], candidates, gather, metric)
            named = candidates if ids is None else np.where(candidates < 0, -1, ids[candidates])
            scores[rows], found[rows] = best_first(exact, named, k)
            if count < num_rows and fetch_epsilon is not None:
                margin = rounding_margin(queries[rows], max_norm, metric, fetch_epsilon)
                again.append(rows[scores[rows, -1] <= rough[:, -1] + margin])
            elif count < num_rows and removed is not None:
                again.append(rows[(found[rows, -1] < 0) & (fetched[:, -1] >= 0)])
        unsettled = np.concatenate(again) if again else unsettled[:0]
        count = min(num_rows, 4 * count)
    return scores, found


def score_candidates(
    queries: np.ndarray, candidates: np.ndarray, gather: Callable[[np.ndarray], np.ndarray], metric: Metric
) -> np.ndarray:
    """Exact scores of candidate rows; -inf where the candidate is -1.

    Shapes   queries (B, Q), candidates (B, C) int64 -> (B, C) float32
    """
    scores = np.empty(candidates.shape, dtype=np.float32)
    step = max(1, CHUNK_NUMBERS // max(1, queries.shape[1] * candidates.shape[1]))
    for start in range(0, len(queries), step):
        piece = candidates[start : start + step]
        left = queries[start : start + step].astype(np.float64)
        vectors = np.asarray(gather(np.maximum(piece, 0).ravel()))
        scores[start : start + step] = _score_pairs(left, vectors.reshape(*piece.shape, -1).astype(np.float64), metric)
    scores[candidates < 0] = -np.inf
    return scores


def best_first(scores: np.ndarray, item_idx: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort candidates by score, ties by lower item_idx, -1 last; cut or fill up to k.

    Shapes   scores (B, C), item_idx (B, C) -> (B, k) float32, (B, k) int64
    """
    absent = item_idx < 0
    tie_breaker = np.where(absent, np.iinfo(np.int64).max, item_idx)
    falling = np.where(absent, np.inf, -scores.astype(np.float64))
    order = np.lexsort((tie_breaker, falling, absent), axis=-1)[:, :k]
    sorted_scores, sorted_idx = empty_result(len(scores), k)
    width = order.shape[1]
    sorted_idx[:, :width] = np.take_along_axis(np.where(absent, -1, item_idx), order, axis=1)
    sorted_scores[:, :width] = np.take_along_axis(np.where(absent, -np.inf, scores), order, axis=1)
    return sorted_scores, sorted_idx


def merge_top_k(parts: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge the results of disjoint pieces of a catalogue into one, by the contract's order."""
    scores, item_idx = zip(*parts)
    return best_first(np.concatenate(scores, axis=1), np.concatenate(item_idx, axis=1), k)


def unite_rows(lists: Sequence[np.ndarray]) -> np.ndarray:
    """Every item that a row of any list has, once; -1 past the end.

    Shapes   (B, C) int64 each, -1 where there is none -> (B, U), U the most that a row has
    """
    united = np.sort(np.concatenate(lists, axis=1), axis=1)
    united[:, 1:][united[:, 1:] == united[:, :-1]] = -1
    united = np.sort(united, axis=1)[:, ::-1]
    return np.ascontiguousarray(united[:, : max(1, int((united >= 0).sum(axis=1).max(initial=0)))])


def in_same_row(item_idx: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which items are among those wanted of their own row; -1 never is. Shapes   (B, U), (B, C) -> (B, U) bool"""
    stride = int(max(item_idx.max(initial=0), wanted.max(initial=0))) + 1
    rows = np.arange(len(item_idx))[:, None] * stride
    return (item_idx >= 0) & np.isin(item_idx + rows, (wanted + rows)[wanted >= 0])


def empty_result(num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(-inf, -1) everywhere: scores (B, k) float32, item_idx (B, k) int64."""
    return np.full((num_queries, k), -np.inf, dtype=np.float32), np.full((num_queries, k), -1, dtype=np.int64)


def check_metric(metric: str) -> None:
    """Raise DataError for a metric that this project does not know."""
    if metric not in METRICS:
        raise DataError("metric", repr(metric), " or ".join(METRICS))


def check_queries(queries: np.ndarray, dim: int, k: int) -> np.ndarray:
    """The queries as contiguous float32, or a DataError that names what is wrong (FAISS would answer -1 to NaN)."""
    if k < 1:
        raise DataError("k", k, "at least 1")
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise DataError("queries", f"shape {queries.shape}", f"(B, {dim})")
    _check_finite(queries, "queries")
    return queries


def check_vectors(vectors: np.ndarray, where: str) -> np.ndarray:
    """Catalogue vectors as a float32 matrix of finite numbers, or a DataError that names `where`."""
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise DataError(where, f"shape {vectors.shape} of {vectors.dtype}", "shape (N, Q) of float32")
    for start in range(0, len(vectors), CHUNK_ROWS):
        _check_finite(vectors[start : start + CHUNK_ROWS], where, first_row=start)
    return vectors


def largest_norm(vectors: np.ndarray) -> float:
    """Largest Euclidean norm of the rows, chunked; 0 for no rows."""
    chunks = (vectors[start : start + CHUNK_ROWS] for start in range(0, len(vectors), CHUNK_ROWS))
    return max((float(np.linalg.norm(np.asarray(chunk, np.float64), axis=1).max()) for chunk in chunks), default=0.0)


def rounding_margin(queries: np.ndarray, max_norm: float, metric: Metric, epsilon: float) -> np.ndarray:
    """Bound on how far a score computed with `epsilon` can lie from the exact one: (B,) float64."""
    norms = np.linalg.norm(queries.astype(np.float64), axis=1)
    scale = norms * max_norm if metric == "inner_product" else (norms + max_norm) ** 2
    return scale * ((queries.shape[1] + 4) * epsilon + 2 * float(np.finfo(np.float32).eps))


def _check_finite(rows: np.ndarray, where: str, first_row: int = 0) -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise DataError(
            where, f"NaN or infinity in {bad.size} rows, the first is row {first_row + bad[0]}", "finite numbers"
        )


def _score_pairs(left: np.ndarray, right: np.ndarray, metric: Metric) -> np.ndarray:
    """Scores of every query with its own candidates, float64: (B, Q), (B, C, Q) -> (B, C). Writes into `right`."""
    if metric == "inner_product":
        return np.einsum("bcq,bq->bc", right, left)
    right -= left[:, None]
    return -np.einsum("bcq,bcq->bc", right, right)


def _fetch_dense(queries: np.ndarray, vectors: np.ndarray, count: int, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """The best `count` rows of `vectors` up to float64 rounding, unsorted but for the worst one, which is last."""
    scores, rows = np.empty((len(queries), count)), np.empty((len(queries), count), dtype=np.int64)
    for start in range(0, len(queries), CHUNK_QUERIES):
        piece = slice(start, start + CHUNK_QUERIES)
        scores[piece], rows[piece] = _fetch_dense_piece(queries[piece].astype(np.float64), vectors, count, metric)
    return scores, rows


def _fetch_dense_piece(queries, vectors, count, metric):
    scores, rows = np.empty((len(queries), 0)), np.empty((len(queries), 0), dtype=np.int64)
    for start in range(0, len(vectors), CHUNK_ROWS):
        chunk = np.asarray(vectors[start : start + CHUNK_ROWS], dtype=np.float64)
        new = queries @ chunk.T
        if metric == "l2":
            new = 2 * new - (queries**2).sum(axis=1)[:, None] - (chunk**2).sum(axis=1)
        new_rows = np.broadcast_to(np.arange(start, start + len(chunk)), new.shape)
        scores, rows = np.concatenate([scores, new], axis=1), np.concatenate([rows, new_rows], axis=1)
        keep = np.argpartition(-scores, min(count, scores.shape[1]) - 1, axis=1)[:, :count]
        scores, rows = np.take_along_axis(scores, keep, axis=1), np.take_along_axis(rows, keep, axis=1)
    return scores, rows

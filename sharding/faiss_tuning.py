"""The cheapest search that finds enough: parameters chosen at build time by measured recall@10 against exact search.

The choice is by an estimate of the bytes that a query reads and not by the clock, so the same vectors give the same
files.
"""

import itertools
from typing import Callable

import faiss
import numpy as np

import sharding.faiss_settings  # noqa: F401
from contrec_dist.errors import ConfigError, DataError
from contrec_dist.retrieval.top_k import SLACK_ROWS, Metric, best_first, check_queries, empty_result
from contrec_dist.retrieval.top_k import refine_top_k, score_candidates
from sharding.faiss_factory import estimate_cost, parameter_ladders, set_parameters
from sharding.faiss_groups import FLOAT32_EPSILON, Group

RECALL_AT = 10
FETCHED = RECALL_AT + SLACK_ROWS  # candidates that a search of the 10 best asks of FAISS
BLOCK_ROWS = 262_144  # rows of the catalogue that exact search holds at a time
FAISS_METRICS = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
Parameters = dict[str, int]


def tune_groups(
    groups: list[Group], factory: str, queries: np.ndarray, wanted: np.ndarray, min_recall: float
) -> tuple[Parameters, float]:
    """The cheapest parameters that reach min_recall, and the recall they give.

    Shapes   queries (P, Q) float32, wanted (P, 10) int64: the ids that exact search finds
    Errors   ConfigError with the figures when the largest parameters do not reach it
    """
    num_items, dim = sum(len(group.ids) for group in groups), queries.shape[1]
    cost = lambda one: estimate_cost(one, factory, num_items, dim, FETCHED)  # noqa: E731
    measure = JoinedRecall(groups, factory, queries, wanted)
    parameters, recall = find_cheapest(parameter_ladders(factory), measure, cost, min_recall)
    if recall < min_recall:
        got = f"recall@{RECALL_AT} {recall:.4f} of '{factory}' with {parameters} over {len(queries)} queries"
        raise ConfigError("index.min_recall", got, f"at least {min_recall}; name a finer index.factory")
    return parameters, recall


class JoinedRecall:
    """Recall@10 of the shards as one process searches them, joined, while they lie apart in memory-mapped files.

    Apart, each shard would score its own best again, and together they would look better than the joined index is. So
    the candidates of all shards are brought into the order of their rough scores first, as the joined index has them;
    what k_factor_rf lets through is scored again by stored vectors. One search at the largest k_factor_rf tells of all
    smaller ones.
    """

    def __init__(self, groups: list[Group], factory: str, queries: np.ndarray, wanted: np.ndarray):
        self.groups, self.queries, self.wanted = groups, queries, wanted
        self.lossless = factory.endswith("Flat")
        self.largest = FETCHED * parameter_ladders(factory).get("k_factor_rf", [1])[-1]
        self._searched: dict[tuple, tuple[np.ndarray, np.ndarray | None]] = {}

    def __call__(self, parameters: Parameters) -> float:
        coarse = {name: value for name, value in parameters.items() if name != "k_factor_rf"}
        key = tuple(coarse.values())
        if key not in self._searched:
            ids = self._search(coarse)
            self._searched[key] = ids, None if self.lossless else self._score_stored(ids)
        ids, stored = self._searched[key]
        count = FETCHED * parameters.get("k_factor_rf", 1)
        found = ids[:, :count] if stored is None else best_first(stored[:, :count], ids[:, :count], RECALL_AT)[1]
        return measure_recall(self.wanted, found)

    def _search(self, coarse: Parameters) -> np.ndarray:
        """Ids in the order of their rough scores, best first. -> (P, largest) int64"""
        parts = []
        for group in self.groups:
            index = group.index.base_index if isinstance(group.index, faiss.IndexRefine) else group.index
            set_parameters([index], coarse)
            values, rows = index.search(self.queries, min(self.largest, len(group.ids)))
            scores = values if group.metric == "inner_product" else -values
            parts.append((np.where(rows < 0, -np.inf, scores), np.where(rows < 0, -1, group.ids[rows])))
        scores, ids = (np.concatenate(both, axis=1) for both in zip(*parts))
        return best_first(scores, ids, min(self.largest, ids.shape[1]))[1]

    def _score_stored(self, ids: np.ndarray) -> np.ndarray:
        """Scores by the vectors that the index stores, which are not quite the given ones. (P, C) -> (P, C) float32"""
        scores = np.full(ids.shape, -np.inf, dtype=np.float32)
        for group in self.groups:
            rows = np.minimum(np.searchsorted(group.ids, ids), len(group.ids) - 1)
            here = (ids >= 0) & (group.ids[rows] == ids)
            width = int(here.sum(axis=1).max())
            places = np.argsort(~here, axis=1, kind="stable")[:, :width]  # the group's own, and few others
            own = np.where(np.take_along_axis(here, places, axis=1), np.take_along_axis(rows, places, axis=1), -1)
            found = score_candidates(self.queries, own, group.index.reconstruct_batch, group.metric)
            np.put_along_axis(scores, places, np.maximum(found, np.take_along_axis(scores, places, axis=1)), axis=1)
        return scores


def find_cheapest(
    ladders: dict[str, list[int]],
    measure: Callable[[Parameters], float],
    cost: Callable[[Parameters], float],
    min_recall: float,
) -> tuple[Parameters, float]:
    """The setting of lowest cost that reaches min_recall, or else the largest one; and the recall of it.

    Recall rises with every parameter, so each one's smallest useful value is found first, with the others at their
    largest, and a setting below one that failed is not measured.
    """
    largest = {name: values[-1] for name, values in ladders.items()}
    floors = {}
    for name, values in ladders.items():
        floors[name] = next((value for value in values if measure(largest | {name: value}) >= min_recall), None)
        if floors[name] is None:
            return largest, measure(largest)
    useful = [[value for value in values if value >= floors[name]] for name, values in ladders.items()]
    settings = sorted((dict(zip(ladders, values)) for values in itertools.product(*useful)), key=cost)
    failed = []
    for setting in settings:
        if any(all(setting[name] <= other[name] for name in setting) for other in failed):
            continue
        recall = measure(setting)
        if recall >= min_recall:
            return setting, recall
        failed.append(setting)
    return largest, measure(largest)


def measure_recall(wanted: np.ndarray, found: np.ndarray) -> float:
    """Share of the wanted ids (-1 are none) that were found. Shapes   both (P, k) int64"""
    hits = sum(np.isin(want[want >= 0], got).sum() for want, got in zip(wanted, found))
    return float(hits / max(1, (wanted >= 0).sum()))


def exact_ids(vectors: np.ndarray, ids: np.ndarray, queries: np.ndarray, metric: Metric, max_norm: float) -> np.ndarray:
    """The ids of the 10 best rows of every query; `vectors` may be memory-mapped, a block of them is held at a time.

    Shapes   vectors (N, Q), ids (N,), queries (P, Q) -> (P, 10) int64, -1 past the end
    Errors   DataError where there are no queries, or they are not finite or of another width
    """
    queries = check_queries(queries, vectors.shape[1], RECALL_AT)
    if not len(queries):
        raise DataError("queries_for_recall", "no queries", "at least one")
    _, found = refine_top_k(
        queries,
        RECALL_AT,
        fetch=lambda some, count: _fetch_blocks(some, vectors, count, metric),
        gather=lambda rows: vectors[rows],
        num_rows=len(vectors),
        metric=metric,
        max_norm=max_norm,
        fetch_epsilon=FLOAT32_EPSILON,
        ids=ids,
    )
    return found


def _fetch_blocks(
    queries: np.ndarray, vectors: np.ndarray, count: int, metric: Metric
) -> tuple[np.ndarray, np.ndarray]:
    """FAISS's exact search, block after block."""
    best = empty_result(len(queries), count)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = np.ascontiguousarray(vectors[start : start + BLOCK_ROWS], dtype=np.float32)
        values, rows = faiss.knn(queries, block, min(count, len(block)), metric=FAISS_METRICS[metric])
        scores = values if metric == "inner_product" else -values
        pair = zip(best, (scores, np.where(rows < 0, -1, rows + start)))
        best = best_first(*(np.concatenate(both, axis=1) for both in pair), count)
    return best

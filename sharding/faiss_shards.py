"""A catalogue of vectors split by item ranges into FAISS shards: build, save, open, search.

Stage `index` builds, `score` searches. Guarantees: `search` keeps the contract of contrec_dist/retrieval/top_k.py; the ids
that come back are the caller's int64 ids (item_idx), one a row, never repeated; with the factory 'Flat' any number of shards
gives the same bytes as exact_top_k, duplicated vectors included; any other factory has its recall@10 measured when it is
built and is refused below `min_recall`. An index that needs training is trained once, so all shards share one codebook.
The files are a function of vectors, ids and settings.

    folder/shards.json              metric, dim, factory, search parameters, recall, the shards' ranges
    folder/shard_000000.faiss       one FAISS file a shard
    folder/shard_000000.ids.npy     int64, rising: the id of every row of the shard

Cost: vectors in memory once more while building; a search runs one thread a shard, each with its part of the cores.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, TypeVar

import faiss
import numpy as np

import sharding.faiss_settings  # noqa: F401
from contrec_dist.config import IndexConfig
from contrec_dist.errors import ArtifactError, ConfigError, DataError
from contrec_dist.manifest import write_json
from contrec_dist.retrieval.top_k import Metric, check_metric, check_queries, check_vectors, empty_result
from contrec_dist.retrieval.top_k import exact_top_k, largest_norm, merge_top_k, refine_top_k
from sharding.faiss_devices import copy_to_gpus
from sharding.faiss_factory import (
    choose_factory,
    is_exact,
    largest_parameters,
    make_index,
    set_parameters,
    smallest_parameters,
    widen_parameters,
)

LAYOUT_NAME = "shards.json"
LAYOUT_FORMAT = 1
RECALL_AT = 10
MAX_GPU_K = 2048  # faiss-gpu selects no more; longer lists are searched on the CPU
FAISS_METRICS = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
Result = TypeVar("Result")


@dataclass(slots=True)
class Shard:
    """One item range: its index, the id of every row (rising), and what an exact search must know of its rounding."""

    index: faiss.Index
    ids: np.ndarray
    metric: Metric
    max_norm: float
    exact: bool
    gpu_index: faiss.Index | None = None

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The shard's k best by the contract, as ids. Shapes  (B, Q) -> (B, k) float32, (B, k) int64"""
        scores, rows = refine_top_k(
            queries,
            k,
            fetch=self._fetch,
            gather=self.index.reconstruct_batch,
            num_rows=len(self.ids),
            metric=self.metric,
            max_norm=self.max_norm,
            fetch_epsilon=float(np.finfo(np.float32).eps) if self.exact else None,
        )
        return scores, np.where(rows < 0, -1, self.ids[rows])

    def _fetch(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        on_gpu = self.gpu_index is not None and count <= MAX_GPU_K
        values, rows = (self.gpu_index if on_gpu else self.index).search(np.ascontiguousarray(queries), count)
        return (values if self.metric == "inner_product" else -values), rows


class FaissShards:
    """A searchable, saved catalogue. Make one with `build` or `open`."""

    def __init__(self, shards: list[Shard], layout: dict):
        self._shards, self.layout = shards, layout

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        ids: np.ndarray,
        folder: Path,
        config: IndexConfig,
        metric: Metric,
        queries_for_recall: np.ndarray,
    ) -> "FaissShards":
        """Build, measure and save the shards of a catalogue, and open them.

        Shapes   vectors (N, Q) float32, ids (N,) int64, queries_for_recall (P, Q) float32
        Errors   DataError for NaN, infinity, repeated or negative ids; ConfigError for a factory that FAISS refuses, more
                 shards than items, or a recall below config.min_recall (with the figures).
        """
        vectors, ids = _check_catalogue(vectors, ids, metric)
        if not 1 <= config.num_shards <= len(ids):
            raise ConfigError("index.num_shards", config.num_shards, f"1 to {len(ids)}, the number of items")
        factory = choose_factory(config.factory, len(ids))
        trained = _train(vectors, factory, metric, config.train_rows)
        cuts = np.linspace(0, len(ids), config.num_shards + 1).astype(np.int64)
        ranges = list(zip(cuts[:-1], cuts[1:]))
        shards = _fan_out(lambda span: _fill(trained, factory, metric, vectors, ids, *span), ranges)
        parameters, recall = _tune(shards, factory, vectors, ids, metric, config, queries_for_recall)
        layout = {
            "format": LAYOUT_FORMAT,
            "metric": metric,
            "dim": int(vectors.shape[1]),
            "num_items": len(ids),
            "factory": factory,
            "parameters": parameters,
            "recall": {"at": RECALL_AT, "num_queries": len(queries_for_recall), "value": recall},
        }
        _save(shards, Path(folder), layout)
        return cls.open(folder, config.device)

    @classmethod
    def open(cls, folder: Path, device: str = "auto") -> "FaissShards":
        """Open what `build` saved, on 'cpu', 'gpu' or 'auto' (a GPU where faiss-gpu and a GPU are there).

        Errors   ArtifactError naming the file that is missing or does not fit; ConfigError for 'gpu' without one.
        """
        path = Path(folder) / LAYOUT_NAME
        if not path.is_file():
            raise ArtifactError(path, "no such file", "an index written by this project")
        layout = json.loads(path.read_text())
        if layout.get("format") != LAYOUT_FORMAT:
            raise ArtifactError(path, f"format {layout.get('format')}", f"format {LAYOUT_FORMAT}")
        shards = [_open_shard(Path(folder), record, layout) for record in layout["shards"]]
        set_parameters([shard.index for shard in shards], layout["parameters"])
        copies = copy_to_gpus([shard.index for shard in shards], device, layout["parameters"])
        for shard, copy in zip(shards, copies):
            shard.gpu_index = copy
        return cls(shards, layout)

    @property
    def num_items(self) -> int:
        """Items that a search can return."""
        return self.layout["num_items"]

    @property
    def dim(self) -> int:
        """Q, the width of vectors and queries."""
        return self.layout["dim"]

    @property
    def recall(self) -> float:
        """Recall@10 against exact search, measured when it was built."""
        return self.layout["recall"]["value"]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of every query, by the contract of top_k.py.

        Shapes   queries (B, Q) float32 -> scores (B, k) float32, item_idx (B, k) int64
        Errors   DataError for NaN or infinity, another width, or k < 1.
        """
        queries = check_queries(queries, self.dim, k)
        return _search_shards(self._shards, queries, k)


def _search_shards(shards: list[Shard], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    if not len(queries):
        return empty_result(0, k)
    return merge_top_k(_fan_out(lambda shard: shard.search(queries, k), shards), k)


def _fan_out(function: Callable[..., Result], pieces: Iterable) -> list[Result]:
    """Apply `function` to every piece, one thread each, the cores divided between them; results in order."""
    pieces = list(pieces)
    if len(pieces) == 1:
        return [function(pieces[0])]
    threads = max(1, faiss.omp_get_max_threads() // len(pieces))

    def apply(piece):
        faiss.omp_set_num_threads(threads)  # holds for the calling thread only
        return function(piece)

    with ThreadPoolExecutor(max_workers=min(len(pieces), max(1, os.cpu_count() or 1))) as pool:
        return list(pool.map(apply, pieces))


def _check_catalogue(vectors: np.ndarray, ids: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and ids in the order of the ids."""
    check_metric(metric)
    vectors, ids = check_vectors(vectors, "vectors"), np.asarray(ids)
    if ids.shape != (len(vectors),) or ids.dtype != np.int64:
        raise DataError("ids", f"shape {ids.shape} of {ids.dtype}", f"shape ({len(vectors)},) of int64")
    if (np.diff(ids) <= 0).any():
        order = np.argsort(ids, kind="stable")
        vectors, ids = vectors[order], ids[order]
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if repeated.size:
        raise DataError("ids", f"{repeated.size} repeated ids, the first is {repeated[0]}", "every id once")
    if ids.size and ids[0] < 0:
        raise DataError("ids", int(ids[0]), "ids from 0")
    return vectors, ids


def _train(vectors: np.ndarray, factory: str, metric: Metric, train_rows: int) -> faiss.Index:
    """An empty index of this factory, trained on rows spread evenly over the catalogue."""
    index = make_index(vectors.shape[1], factory, FAISS_METRICS[metric])
    if not index.is_trained:
        rows = np.unique(np.linspace(0, len(vectors) - 1, min(train_rows, len(vectors))).astype(np.int64))
        try:
            index.train(np.ascontiguousarray(vectors[rows]))
        except RuntimeError as error:
            raise ConfigError("index.factory", f"'{factory}' ({error})", f"one that {len(rows)} rows can train") from None
    return index


def _fill(trained: faiss.Index, factory: str, metric: Metric, vectors, ids, start: int, stop: int) -> Shard:
    index, rows = faiss.clone_index(trained), np.ascontiguousarray(vectors[start:stop])
    threads = faiss.omp_get_max_threads()
    if "HNSW" in factory:
        faiss.omp_set_num_threads(1)  # the graph depends on the order in which threads insert
    index.add(rows)
    faiss.omp_set_num_threads(threads)
    shard = Shard(index, ids[start:stop], metric, largest_norm(rows), is_exact(factory))
    _prepare_reconstruction(shard, factory)
    return shard


def _prepare_reconstruction(shard: Shard, factory: str) -> None:
    """Make stored vectors readable by row, which exact scores need. Raises ConfigError where the factory cannot."""
    try:
        inverted = faiss.try_extract_index_ivf(shard.index)
        if inverted is not None:
            inverted.make_direct_map()
        shard.index.reconstruct_batch(np.zeros(1, dtype=np.int64))
    except RuntimeError as error:
        raise ConfigError("index.factory", f"'{factory}' ({error})", "one whose stored vectors can be read back") from None


def _tune(shards, factory, vectors, ids, metric, config: IndexConfig, queries) -> tuple[dict, float]:
    """Widen the search until recall reaches config.min_recall; the parameters and the recall they give."""
    queries = check_queries(queries, vectors.shape[1], RECALL_AT)
    if not len(queries):
        raise DataError("queries_for_recall", "no queries", "at least one")
    _, rows = exact_top_k(queries, vectors, RECALL_AT, metric)
    wanted = np.where(rows < 0, -1, ids[rows])
    parameters = smallest_parameters(factory)
    while True:
        set_parameters([shard.index for shard in shards], parameters)
        _, found = _search_shards(shards, queries, RECALL_AT)
        recall = _recall(wanted, found)
        if recall >= config.min_recall:
            return parameters, recall
        if parameters == largest_parameters(factory):
            got = f"recall@{RECALL_AT} {recall:.4f} of '{factory}' with {parameters} over {len(queries)} queries"
            raise ConfigError("index.min_recall", got, f"at least {config.min_recall}; name a finer index.factory")
        parameters = widen_parameters(factory, parameters)


def _recall(wanted: np.ndarray, found: np.ndarray) -> float:
    """Share of the wanted ids (-1 are none) that were found."""
    hits = [np.isin(want[want >= 0], got).sum() for want, got in zip(wanted, found)]
    return float(np.sum(hits) / max(1, (wanted >= 0).sum()))


def _save(shards: list[Shard], folder: Path, layout: dict) -> None:
    """Write every shard under a temporary name and rename it, the layout last."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, shard in enumerate(shards):
        record = {
            "file": f"shard_{number:06d}.faiss",
            "ids_file": f"shard_{number:06d}.ids.npy",
            "num_items": len(shard.ids),
            "first_id": int(shard.ids[0]),
            "last_id": int(shard.ids[-1]),
            "max_norm": shard.max_norm,
        }
        _write_renamed(folder / record["file"], lambda path: faiss.write_index(shard.index, path))
        _write_renamed(folder / record["ids_file"], lambda path: _write_ids(path, shard.ids))
        records.append(record)
    write_json(folder / LAYOUT_NAME, layout | {"shards": records})


def _write_ids(path: str, ids: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, ids)


def _write_renamed(path: Path, write: Callable[[str], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(str(temporary))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _open_shard(folder: Path, record: dict, layout: dict) -> Shard:
    path, ids_path = folder / record["file"], folder / record["ids_file"]
    try:
        index, ids = faiss.read_index(str(path)), np.load(ids_path, allow_pickle=False)
    except (RuntimeError, OSError, ValueError) as error:
        raise ArtifactError(path, str(error).splitlines()[0], "a FAISS file and its ids") from None
    if not index.ntotal == len(ids) == record["num_items"] or index.d != layout["dim"]:
        got = f"{index.ntotal} vectors of width {index.d} and {len(ids)} ids"
        raise ArtifactError(path, got, f"{record['num_items']} of width {layout['dim']}, as {LAYOUT_NAME} says")
    shard = Shard(index, ids, layout["metric"], record["max_norm"], is_exact(layout["factory"]))
    _prepare_reconstruction(shard, layout["factory"])
    return shard

"""Writing an index: trained once, then shard after shard filled, written and dropped.

Guarantees   all shards share one codebook; the files are a function of vectors, ids and settings; recall@10 is measured
             on what was written, and refused below `min_recall`.
Cost         memory: one shard, and the rows that train it; `vectors` may be a memory-mapped array of any size.
             Measuring maps the written shards into memory instead of loading them.
"""

from pathlib import Path

import faiss
import numpy as np

from contrec_dist.config import IndexConfig
from contrec_dist.errors import ConfigError, DataError
from contrec_dist.retrieval.top_k import Metric, check_metric, check_vectors, largest_norm
from sharding.faiss_factory import POINTS_PER_CENTROID, choose_factory, find_inverted, make_index, parameter_ladders
from sharding.faiss_files import LAYOUT_FORMAT, list_shards, read_trained, write_layout, write_shard, write_trained
from sharding.faiss_groups import open_groups, prepare_reconstruction
from sharding.faiss_tuning import FAISS_METRICS, RECALL_AT, exact_ids, tune_groups

ADD_ROWS = 131_072  # rows of the catalogue that are held while a shard is filled


def build_shards(
    vectors: np.ndarray,
    ids: np.ndarray,
    folder: Path,
    config: IndexConfig,
    metric: Metric,
    queries_for_recall: np.ndarray,
) -> dict:
    """Write the shards of a catalogue and, last, their layout, which is returned.

    Shapes   vectors (N, Q) float32, ids (N,) int64, queries_for_recall (P, Q) float32
    Errors   DataError for NaN, infinity, repeated or negative ids; ConfigError for a factory that FAISS refuses, more
             shards than items, a memory_bytes that nothing fits, or a recall below config.min_recall (with the
             figures).
    """
    order, ids = check_catalogue(vectors, ids, metric)
    if not 1 <= config.num_shards <= len(ids):
        raise ConfigError("index.num_shards", config.num_shards, f"1 to {len(ids)}, the number of items")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    factory = choose_factory(config.factory, len(ids), vectors.shape[1], metric, config.memory_bytes)
    trained = train_index(vectors, factory, metric, config.train_rows)
    write_trained(folder, trained)
    layout = {"format": LAYOUT_FORMAT, "metric": metric, "dim": int(vectors.shape[1]), "factory": factory}
    layout |= {"num_items": len(ids), "parameters": {}}
    layout["shards"] = fill_shards(trained, factory, vectors, order, ids, folder, config.num_shards)
    wanted = exact_ids(vectors, _original(ids, order), queries_for_recall, metric, _max_norm(layout))
    groups = open_groups(list_shards(folder, layout), layout, device="cpu", memory_map=True)
    queries = np.ascontiguousarray(queries_for_recall, dtype=np.float32)
    layout["parameters"], recall = tune_groups(groups, factory, queries, wanted, config.min_recall)
    layout["recall"] = {"at": RECALL_AT, "num_queries": len(queries), "value": recall}
    write_layout(folder, layout)
    return layout


def extend_shards(
    like: Path, layout: dict, vectors: np.ndarray, ids: np.ndarray, folder: Path, num_shards: int = 1
) -> dict:
    """Write further vectors as an index of their own with the codebook and the parameters of the index in `like`.

    Shapes   vectors (n, Q) float32, ids (n,) int64
    """
    order, ids = check_catalogue(vectors, ids, layout["metric"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained = read_trained(like)
    shards = fill_shards(trained, layout["factory"], vectors, order, ids, folder, min(num_shards, len(ids)))
    extended = layout | {"num_items": len(ids), "shards": shards}
    write_layout(folder, extended)
    return extended


def check_catalogue(vectors: np.ndarray, ids: np.ndarray, metric: str) -> tuple[np.ndarray | None, np.ndarray]:
    """The order that sorts the rows by id (None: they are), and the sorted ids.

    Errors   DataError for vectors that are not finite float32, and ids that are repeated, negative or not int64
    """
    check_metric(metric)
    vectors, ids = check_vectors(vectors, "vectors"), np.asarray(ids)
    if ids.shape != (len(vectors),) or ids.dtype != np.int64:
        raise DataError("ids", f"shape {ids.shape} of {ids.dtype}", f"shape ({len(vectors)},) of int64")
    order = None
    if (np.diff(ids) <= 0).any():
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if repeated.size:
        raise DataError("ids", f"{repeated.size} repeated ids, the first is {repeated[0]}", "every id once")
    if ids.size and ids[0] < 0:
        raise DataError("ids", int(ids[0]), "ids from 0")
    return order, ids


def train_index(vectors: np.ndarray, factory: str, metric: Metric, train_rows: int) -> faiss.Index:
    """An empty index, trained on rows spread evenly over the catalogue: 64 a centroid, at most train_rows."""
    index = make_index(vectors.shape[1], factory, FAISS_METRICS[metric])
    if not index.is_trained:
        num_lists = parameter_ladders(factory).get("nprobe", [0])[-1]
        enough = max(train_rows if not num_lists else POINTS_PER_CENTROID * num_lists, POINTS_PER_CENTROID * 256)
        rows = np.unique(np.linspace(0, len(vectors) - 1, min(enough, train_rows, len(vectors))).astype(np.int64))
        try:
            index.train(np.ascontiguousarray(vectors[rows]))
        except RuntimeError as error:
            raise ConfigError(
                "index.factory", f"'{factory}' ({error})", f"one that {len(rows)} rows can train"
            ) from None
    return index


def fill_shards(
    trained: faiss.Index,
    factory: str,
    vectors: np.ndarray,
    order: np.ndarray | None,
    ids: np.ndarray,
    folder: Path,
    num_shards: int,
) -> list[dict]:
    """Write the shards, equal ranges of ids, one after another; returns their records. `order`: the row of each id."""
    cuts = np.linspace(0, len(ids), num_shards + 1).astype(np.int64)
    records = []
    for number, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:])):
        index, norm = faiss.clone_index(trained), 0.0
        for first in range(start, stop, ADD_ROWS):
            span = slice(first, min(first + ADD_ROWS, stop))
            rows = np.ascontiguousarray(vectors[span] if order is None else vectors[order[span]])
            _add_in_order(index, rows, factory)
            norm = max(norm, largest_norm(rows))
        if number == 0 and find_inverted(index) is None:
            prepare_reconstruction(index, factory)
        records.append(write_shard(folder, number, index, ids[start:stop], norm))
    return records


def _add_in_order(index: faiss.Index, rows: np.ndarray, factory: str) -> None:
    """Add rows. A graph depends on the order in which threads insert: one thread."""
    threads = faiss.omp_get_max_threads()
    if "HNSW" in factory.split(",")[0] and not factory.startswith("IVF"):
        faiss.omp_set_num_threads(1)
    index.add(rows)
    faiss.omp_set_num_threads(threads)


def _original(ids: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """The ids by row of the vectors as they were given."""
    if order is None:
        return ids
    by_row = np.empty_like(ids)
    by_row[order] = ids
    return by_row


def _max_norm(layout: dict) -> float:
    return max(record["max_norm"] for record in layout["shards"])

"""What one process searches as one index: the shards that it holds, joined where FAISS can join them.

Shards are how a catalogue is cut for writing and for placing it on machines. Inside one process a cut costs: the coarse
quantiser runs once a shard, and each shard scores candidates again. So shards of one codebook are joined when they are
opened, and any number of them answers with the speed and the bits of one. Not joined are graphs (HNSW), memory-mapped
files, which nothing may be added to, and copies on GPUs, one a shard, spread over the GPUs: there the search fans out
and the results are merged.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable, Iterable, TypeVar

import faiss
import numpy as np

from contrec_dist.errors import ConfigError
from contrec_dist.progress import get_logger
from contrec_dist.retrieval.top_k import Metric, empty_result, merge_top_k, refine_top_k
from sharding.faiss_devices import copy_to_gpus, will_use_gpus
from sharding.faiss_factory import find_inverted, is_exact, set_parameters
from sharding.faiss_files import ShardFile, read_shard

MAX_GPU_K = 2048  # faiss-gpu selects no more; longer lists are searched on the CPU
MIN_QUERIES_PER_THREAD = 16
FLOAT32_EPSILON = float(np.finfo(np.float32).eps)
Piece, Result = TypeVar("Piece"), TypeVar("Result")


@dataclass(slots=True)
class Group:
    """One searchable index: every row's id, whether it is removed, and what exact search must know of its rounding."""

    index: faiss.Index
    ids: np.ndarray
    metric: Metric
    max_norm: float
    exact: bool
    removed: np.ndarray | None = None
    "(rows,) bool, or None where every row may come back"
    gpu_index: faiss.Index | None = None

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The group's k best by the contract, as ids. Shapes  (B, Q) -> (B, k) float32, (B, k) int64

        An exact search is one matrix product over all queries; any other is cut into one piece a thread, so that every
        step of it, and not FAISS's alone, runs on all cores.
        """
        num_threads = faiss.omp_get_max_threads()
        num_pieces = 1 if self.exact else max(1, min(num_threads, len(queries) // MIN_QUERIES_PER_THREAD))
        cuts = np.linspace(0, len(queries), num_pieces + 1).astype(np.int64)
        pieces = fan_out(lambda span: self._search_piece(queries[slice(*span)], k), list(zip(cuts[:-1], cuts[1:])))
        scores, found = zip(*pieces)
        return np.concatenate(scores), np.concatenate(found)

    def _search_piece(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return refine_top_k(
            queries,
            k,
            fetch=self._fetch,
            gather=self.index.reconstruct_batch,
            num_rows=len(self.ids),
            metric=self.metric,
            max_norm=self.max_norm,
            fetch_epsilon=FLOAT32_EPSILON if self.exact else None,
            ids=self.ids,
            removed=self.removed,
        )

    def _fetch(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        on_gpu = self.gpu_index is not None and count <= MAX_GPU_K
        values, rows = (self.gpu_index if on_gpu else self.index).search(np.ascontiguousarray(queries), count)
        return (values if self.metric == "inner_product" else -values), rows


def open_groups(files: list[ShardFile], layout: dict, *, device: str = "auto", memory_map: bool = False) -> list[Group]:
    """Open shards of one layout as few groups as can be.

    Errors   ArtifactError naming the file that is missing or does not fit; ConfigError for 'gpu' without one.
    """
    on_gpus = will_use_gpus(device, layout["factory"])
    groups = []
    for file in files:
        group = _open_group(file, layout, memory_map)
        if groups and not memory_map and not on_gpus and _join(groups[-1], group):
            continue
        groups.append(group)
    for group in groups:
        prepare_reconstruction(group.index, layout["factory"])
    indexes = [group.index for group in groups]
    set_parameters(indexes, layout["parameters"])
    if on_gpus:
        for group, copy in zip(groups, copy_to_gpus(indexes, device, layout["parameters"])):
            group.gpu_index = copy
    else:
        line = "search on CPU: %d shards as %d, %d threads"
        get_logger("index").info(line, len(files), len(groups), faiss.omp_get_max_threads())
    return groups


def search_groups(groups: list[Group], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search every group, one thread each, and merge. Shapes  (B, Q) -> (B, k) float32, (B, k) int64"""
    if not len(queries) or not groups:
        return empty_result(len(queries), k)
    parts = fan_out(lambda group: group.search(queries, k), groups)
    return parts[0] if len(parts) == 1 else merge_top_k(parts, k)


def fan_out(function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
    """Apply `function` to every piece, one thread each, the cores divided between them; results in order."""
    pieces = list(pieces)
    if len(pieces) == 1:
        return [function(pieces[0])]
    threads = max(1, faiss.omp_get_max_threads() // len(pieces))

    def apply(piece: Piece) -> Result:
        faiss.omp_set_num_threads(threads)  # holds for the calling thread only
        return function(piece)

    with ThreadPoolExecutor(max_workers=min(len(pieces), max(1, os.cpu_count() or 1))) as pool:
        return list(pool.map(apply, pieces))


def prepare_reconstruction(index: faiss.Index, factory: str) -> None:
    """Make stored vectors readable by row, which exact scores need. Raises ConfigError where the factory cannot."""
    try:
        inverted = find_inverted(index)
        if inverted is not None and not isinstance(index, faiss.IndexRefine):
            inverted.make_direct_map()
        if index.ntotal:
            index.reconstruct_batch(np.zeros(1, dtype=np.int64))
    except RuntimeError as error:
        raise ConfigError(
            "index.factory", f"'{factory}' ({error})", "one whose stored vectors can be read back"
        ) from None


def _open_group(file: ShardFile, layout: dict, memory_map: bool) -> Group:
    index, ids = read_shard(file, layout["dim"], memory_map=memory_map)
    removed = np.isin(ids, file.removed, assume_unique=True) if len(file.removed) else None
    return Group(
        index, ids, layout["metric"], file.max_norm, is_exact(layout["factory"]),
        removed if removed is not None and removed.any() else None,
    )  # fmt: skip


def _join(group: Group, other: Group) -> bool:
    """Move `other` to the end of `group`. False, and nothing moved, where FAISS has no way to."""
    first, second = _parts(group.index), _parts(other.index)
    if any(isinstance(part, faiss.IndexHNSW) for part in first) or group.index.ntotal == 0 or other.index.ntotal == 0:
        return False
    for one, two in zip(first, second):
        has_lists = find_inverted(one) is not None
        if has_lists:
            move_aligned_lists(one, two, len(group.ids))
        one.merge_from(two, *([len(group.ids)] if has_lists else []))
    group.index.ntotal = len(group.ids) + len(other.ids)
    if group.removed is not None or other.removed is not None:
        group.removed = np.concatenate([_removed_rows(group), _removed_rows(other)])
    group.ids = np.concatenate([group.ids, other.ids])
    group.max_norm = max(group.max_norm, other.max_norm)
    return True


def move_aligned_lists(one: faiss.IndexIVF, two: faiss.IndexIVF, first_id: int) -> None:
    """Move to `one` those lists of `two` that FAISS's merge would write beyond the end of.

    BlockInvertedLists::add_entries (faiss 1.15) asks whether a list's length is a multiple of its block's bytes where rows are
    meant, and copies as many blocks as the whole list then has. Such a list ends with a full block: the other's follow it.
    """
    mine, theirs = (faiss.downcast_InvertedLists(index.invlists) for index in (one, two))
    if not isinstance(mine, faiss.BlockInvertedLists):
        return
    for number in range(mine.nlist):
        size, more = mine.list_size(number), theirs.list_size(number)
        if not size or not more or size % mine.block_size:
            continue
        mine.resize(number, size + more)
        block_bytes = -(-more // mine.n_per_block) * mine.block_size
        full_bytes = size // mine.n_per_block * mine.block_size
        codes = faiss.rev_swig_ptr(mine.get_codes(number), full_bytes + block_bytes)
        codes[full_bytes:] = faiss.rev_swig_ptr(theirs.get_codes(number), block_bytes)
        ids = faiss.rev_swig_ptr(mine.get_ids(number), size + more)
        ids[size:] = faiss.rev_swig_ptr(theirs.get_ids(number), more) + first_id
        theirs.resize(number, 0)


def _parts(index: faiss.Index) -> list[faiss.Index]:
    """The indexes that hold rows: two where candidates are scored again by a second one."""
    if isinstance(index, faiss.IndexRefine):
        return [faiss.downcast_index(index.base_index), faiss.downcast_index(index.refine_index)]
    return [index]


def _removed_rows(group: Group) -> np.ndarray:
    return np.zeros(len(group.ids), dtype=bool) if group.removed is None else group.removed

"""A catalogue of vectors split by item ranges into FAISS shards: build, open, search.

Stage `index` builds, `score` searches. Guarantees: `search` keeps the contract of contrec_dist/retrieval/top_k.py; the
ids that come back are the caller's int64 ids (item_idx), one a row, never repeated; with the factory 'Flat' any number
of shards gives the same bytes as exact_top_k, duplicated vectors included; any other factory has its recall@10 measured
when it is built and is refused below `min_recall`. An index that needs training is trained once, so all shards share
one codebook, and one process searches them as one index (faiss_groups.py).

Files: faiss_files.py. How they are written: faiss_build.py. Over machines: faiss_actors.py.
"""

from pathlib import Path
from typing import Sequence

import numpy as np

from contrec_dist.config import IndexConfig
from contrec_dist.retrieval.top_k import Metric, check_queries
from sharding.faiss_build import build_shards
from sharding.faiss_devices import will_use_gpus
from sharding.faiss_files import ShardFile, list_shards, read_layout
from sharding.faiss_groups import Group, open_groups, search_groups


class FaissShards:
    """A searchable catalogue. Make one with `build`, `open` or `open_files`."""

    def __init__(self, groups: list[Group], layout: dict, num_items: int):
        self._groups, self.layout, self.num_items = groups, layout, num_items

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
        """Build, measure and save the shards of a catalogue, and open them. See faiss_build.build_shards."""
        will_use_gpus(config.device, config.factory)  # a device that is not there is refused before hours of building
        build_shards(vectors, ids, folder, config, metric, queries_for_recall)
        return cls.open(folder, config.device, memory_map=config.memory_map)

    @classmethod
    def open(cls, folder: Path, device: str = "auto", *, memory_map: bool = False) -> "FaissShards":
        """Open what `build` saved, on 'cpu', 'gpu' or 'auto' (a GPU where faiss-gpu and a GPU are there).

        memory_map: vectors stay in the files, pages are read when a search asks for them, and processes share them.
        Errors   ArtifactError naming the file that is missing or does not fit; ConfigError for 'gpu' without one.
        """
        layout = read_layout(folder)
        return cls.open_files(list_shards(folder, layout), layout, device, memory_map=memory_map)

    @classmethod
    def open_files(
        cls, files: Sequence[ShardFile], layout: dict, device: str = "auto", *, memory_map: bool = False
    ) -> "FaissShards":
        """Open shards of one codebook, from whatever folders; removed ids never come back."""
        groups = open_groups(list(files), layout, device=device, memory_map=memory_map)
        num_items = sum(len(group.ids) - (0 if group.removed is None else int(group.removed.sum())) for group in groups)
        return cls(groups, layout, num_items)

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
        return search_groups(self._groups, check_queries(queries, self.dim, k), k)

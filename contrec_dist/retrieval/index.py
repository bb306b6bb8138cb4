"""The stage `index`: the catalogue's vectors, as `score` searches them, in FAISS shards.

    space     vectors                                                      metric          folder
    query     model/item_vectors.npy (N, Q + 1), last column the bias      inner product   index/query/
    latent    normalised item latents, flattened (N, K * Z)                L2              index/latent/

Guarantees: the ids are the catalogue's item_idx; every space's recall@10 against exact search is measured and refused
below `index.min_recall`. Cost: one shard in memory, and the rows that train it; the disk holds the vectors once more
meanwhile.

What joins, leaves and is replaced later lies beside the folder, which is never changed: live_index.py.
"""

import time
from pathlib import Path
from typing import Callable

import numpy as np
import polars as pl

from contrec_dist.config import Config
from contrec_dist.data.latents import item_latents_path
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import Manifest, run_stage
from sharding.faiss_build import build_shards
from sharding.faiss_devices import will_use_gpus

CHUNK_ROWS = 65_536


def run(config: Config) -> Manifest:
    """Build the index of every space that the config names."""
    unknown = [space for space in config.index.spaces if space not in SPACES]
    if unknown or not config.index.spaces:
        raise ConfigError("index.spaces", config.index.spaces, f"some of {sorted(SPACES)}")
    will_use_gpus(
        config.index.device, config.index.factory
    )  # a device that is not there is refused before the building
    return run_stage(
        config,
        stage="index",
        folder="index",
        sections=("index",),
        inputs=("tokens", "model", "catalog"),
        build=_build,
        extra_identity={"memory_bytes": config.index.memory_bytes} if config.index.memory_bytes else None,
    )


class SpaceRows:
    """The catalogue's vectors in one space, read by row number from memory-mapped files.

    Shapes   read: (n,) int64 or a slice -> (n, width) float32
    """

    def __init__(self, stored: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]):
        self._stored, self.convert = stored, convert
        self.num_rows, self.width = len(stored), convert(stored[:0]).shape[1]

    def read(self, rows: np.ndarray | slice) -> np.ndarray:
        return self.convert(self._stored[rows])

    def materialise(self, path: Path) -> np.ndarray:
        """All rows as a memory-mapped array of their own; the caller removes the file."""
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(self.num_rows, self.width))
        for start in range(0, self.num_rows, CHUNK_ROWS):
            array[start : start + CHUNK_ROWS] = self.read(slice(start, start + CHUNK_ROWS))
        return array


def open_query_space(config: Config) -> tuple[SpaceRows, np.ndarray]:
    """Item vectors and the queries on which recall is measured: probe users' if training left some, else item vectors.

    Shapes   -> (N, Q + 1), queries (P, Q + 1) float32
    """
    rows = SpaceRows(_load_matrix(config.folder("model") / "item_vectors.npy"), np.asarray)
    probes = config.folder("model") / "probe_queries.npy"
    if probes.is_file():
        queries = _load_matrix(probes)
        return rows, np.array(queries[_sample_rows(len(queries), config)])
    queries = np.array(rows.read(_sample_rows(rows.num_rows, config)))
    queries[:, -1] = 1.0  # what a query has against the bias column
    return rows, queries


def open_latent_space(config: Config) -> tuple[SpaceRows, np.ndarray]:
    """Normalised latents of the items, and a sample of them as recall queries.

    Shapes   -> (N, K * Z), queries (P, K * Z) float32
    Errors   ArtifactError for statistics that cannot be divided by
    """
    folder = config.folder("tokens")
    mean, std = (np.load(folder / f"{name}.npy") for name in ("latent_mean", "latent_std"))
    if not (np.isfinite(std).all() and (std > 0).all()):
        raise ArtifactError(
            folder / "latent_std.npy", "a standard deviation that is 0 or not finite", "positive numbers"
        )

    def normalise(latents: np.ndarray) -> np.ndarray:
        return ((latents - mean) / std).astype(np.float32, copy=False).reshape(len(latents), mean.size)

    rows = SpaceRows(np.load(item_latents_path(config), mmap_mode="r"), normalise)
    return rows, rows.read(_sample_rows(rows.num_rows, config))


def normalise_latents(config: Config, latents: np.ndarray) -> np.ndarray:
    """Raw latents of further items as the index holds them. Shapes   (n, K, Z) -> (n, K * Z) float32"""
    rows, _ = open_latent_space(config)
    return rows.convert(latents)


SPACES = {"query": (open_query_space, "inner_product"), "latent": (open_latent_space, "l2")}


def _build(config: Config, work: Path) -> dict:
    num_items = pl.scan_parquet(config.folder("catalog") / "items.parquet").select(pl.len()).collect().item()
    facts = {}
    for space in config.index.spaces:
        started = time.monotonic()
        open_space, metric = SPACES[space]
        rows, queries = open_space(config)
        if rows.num_rows != num_items:
            raise ArtifactError(config.folder("index") / space, f"{rows.num_rows} vectors", f"{num_items}, one an item")
        vectors_path = work / f".{space}.npy"
        vectors = rows.materialise(vectors_path)
        ids = np.arange(num_items, dtype=np.int64)
        layout = build_shards(vectors, ids, work / space, config.index, metric, queries)
        vectors_path.unlink()
        facts[space] = _describe(layout, work / space) | {"seconds": round(time.monotonic() - started, 3)}
    return facts


def _describe(layout: dict, folder: Path) -> dict:
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    described = {key: layout[key] for key in ("factory", "parameters", "metric", "dim", "num_items")}
    return described | {"recall": layout["recall"]["value"], "num_shards": len(layout["shards"]), "bytes": num_bytes}


def _sample_rows(num_rows: int, config: Config) -> np.ndarray:
    """Rows of the recall sample, rising, by the run's seed."""
    count = min(config.index.recall_queries, num_rows)
    return np.sort(np.random.default_rng(config.seed).choice(num_rows, size=count, replace=False))


def _load_matrix(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ArtifactError(path, "no such file", "an array that training exports")
    matrix = np.load(path, mmap_mode="r")
    if matrix.ndim != 2 or matrix.dtype != np.float32:
        raise ArtifactError(path, f"shape {matrix.shape} of {matrix.dtype}", "a float32 matrix")
    return matrix

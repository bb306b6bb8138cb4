"""The stage `index`: the catalogue's vectors, as `score` searches them, in FAISS shards.

    space     vectors                                                      metric          folder
    query     model/item_vectors.npy (N, Q + 1), last column the bias      inner product   index/query/
    latent    normalised item latents, flattened (N, K * Z)                L2              index/latent/

Guarantees: the ids are the catalogue's item_idx; every space's recall@10 against exact search is measured and refused below
`index.min_recall`. Cost: the vectors in memory once or twice; a Flat index writes them, a trained one trains first.
"""

import time
from pathlib import Path

import numpy as np
import polars as pl

from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import Manifest, run_stage
from sharding.faiss_shards import FaissShards


def run(config: Config) -> Manifest:
    """Build the index of every space that the config names."""
    unknown = [space for space in config.index.spaces if space not in SPACES]
    if unknown or not config.index.spaces:
        raise ConfigError("index.spaces", config.index.spaces, f"some of {sorted(SPACES)}")
    return run_stage(
        config, stage="index", folder="index", sections=("index",), inputs=("tokens", "model", "catalog"), build=_build
    )


def load_query_space(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Item vectors and the queries on which recall is measured: probe users' if training left some, else item vectors.

    Shapes   -> vectors (N, Q + 1) float32, queries (P, Q + 1) float32
    """
    vectors = _load_matrix(config.folder("model") / "item_vectors.npy")
    probes = config.folder("model") / "probe_queries.npy"
    if probes.is_file():
        queries = _load_matrix(probes)
        return vectors, queries[_sample_rows(len(queries), config)]
    queries = vectors[_sample_rows(len(vectors), config)].copy()
    queries[:, -1] = 1.0  # what a query has against the bias column
    return vectors, queries


def load_latent_space(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Normalised latents of the items, and a sample of them as recall queries.

    Shapes   -> vectors (N, K * Z) float32, queries (P, K * Z) float32
    """
    folder = config.folder("tokens")
    latents, mean, std = (np.load(folder / f"{name}.npy") for name in ("item_latents", "latent_mean", "latent_std"))
    if not (np.isfinite(std).all() and (std > 0).all()):
        raise ArtifactError(folder / "latent_std.npy", "a standard deviation that is 0 or not finite", "positive numbers")
    vectors = ((latents - mean) / std).astype(np.float32).reshape(len(latents), -1)
    return vectors, vectors[_sample_rows(len(vectors), config)]


SPACES = {"query": (load_query_space, "inner_product"), "latent": (load_latent_space, "l2")}


def _build(config: Config, work: Path) -> dict:
    num_items = pl.scan_parquet(config.folder("catalog") / "items.parquet").select(pl.len()).collect().item()
    facts = {}
    for space in config.index.spaces:
        started = time.monotonic()
        load_space, metric = SPACES[space]
        vectors, queries = load_space(config)
        if len(vectors) != num_items:
            raise ArtifactError(config.folder("index") / space, f"{len(vectors)} vectors", f"{num_items}, one an item")
        ids = np.arange(num_items, dtype=np.int64)
        shards = FaissShards.build(vectors, ids, work / space, config.index, metric, queries)
        facts[space] = _describe(shards, work / space) | {"seconds": round(time.monotonic() - started, 3)}
    return facts


def _describe(shards: FaissShards, folder: Path) -> dict:
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    described = {key: shards.layout[key] for key in ("factory", "parameters", "metric", "dim", "num_items")}
    return described | {"recall": shards.recall, "num_shards": len(shards.layout["shards"]), "bytes": num_bytes}


def _sample_rows(num_rows: int, config: Config) -> np.ndarray:
    """Rows of the recall sample, rising, by the run's seed."""
    count = min(config.index.recall_queries, num_rows)
    return np.sort(np.random.default_rng(config.seed).choice(num_rows, size=count, replace=False))


def _load_matrix(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ArtifactError(path, "no such file", "an array that training exports")
    matrix = np.load(path)
    if matrix.ndim != 2 or matrix.dtype != np.float32:
        raise ArtifactError(path, f"shape {matrix.shape} of {matrix.dtype}", "a float32 matrix")
    return matrix

"""The files of an index: shards, their ids, and the layout that names them. All appear complete or not at all.

    folder/shards.json              metric, dim, factory, search parameters, recall, the shards' ranges
    folder/shard_000000.faiss       one FAISS file a shard
    folder/shard_000000.ids.npy     int64, rising: the id of every row of the shard
    folder/trained.faiss            the codebook without a row: what further shards are filled from
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import faiss
import numpy as np

import sharding.faiss_settings  # noqa: F401
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import write_json

LAYOUT_NAME = "shards.json"
TRAINED_NAME = "trained.faiss"
LAYOUT_FORMAT = 1
NO_IDS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard that lies on disk. Small: it goes to other processes as it is."""

    index_path: Path
    ids_path: Path
    num_items: int
    max_norm: float
    removed: np.ndarray = field(default_factory=lambda: NO_IDS)
    "(m,) int64, rising: ids of this shard's folder that no search returns"


def write_shard(folder: Path, number: int, index: faiss.Index, ids: np.ndarray, max_norm: float) -> dict:
    """Write one shard; returns its record in the layout."""
    record = {
        "file": f"shard_{number:06d}.faiss",
        "ids_file": f"shard_{number:06d}.ids.npy",
        "num_items": len(ids),
        "first_id": int(ids[0]),
        "last_id": int(ids[-1]),
        "max_norm": max_norm,
    }
    _write_renamed(folder / record["file"], lambda path: faiss.write_index(index, path))
    _write_renamed(folder / record["ids_file"], lambda path: _write_ids(path, ids))
    return record


def write_trained(folder: Path, index: faiss.Index) -> None:
    """Write the trained index that every shard starts from."""
    _write_renamed(folder / TRAINED_NAME, lambda path: faiss.write_index(index, path))


def read_trained(folder: Path) -> faiss.Index:
    """The trained index without a row. Raises ArtifactError naming the file where it is missing or torn."""
    path = Path(folder) / TRAINED_NAME
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise ArtifactError(
            path, str(error).splitlines()[0], "the codebook that stage index writes; run it again"
        ) from None


def write_layout(folder: Path, layout: dict) -> None:
    """Write the layout, last: a folder that has one is complete."""
    write_json(folder / LAYOUT_NAME, layout)


def read_layout(folder: Path) -> dict:
    """The layout of an index folder. Raises ArtifactError naming the file that is missing or of another format."""
    path = Path(folder) / LAYOUT_NAME
    if not path.is_file():
        raise ArtifactError(path, "no such file", "an index written by this project")
    layout = json.loads(path.read_text())
    if layout.get("format") != LAYOUT_FORMAT:
        raise ArtifactError(path, f"format {layout.get('format')}", f"format {LAYOUT_FORMAT}")
    return layout


def list_shards(folder: Path, layout: dict, removed: np.ndarray = NO_IDS) -> list[ShardFile]:
    """The shards of a folder, `removed` ids left out of every search."""
    folder = Path(folder)
    return [
        ShardFile(
            folder / record["file"], folder / record["ids_file"], record["num_items"], record["max_norm"], removed
        )
        for record in layout["shards"]
    ]


def read_shard(shard: ShardFile, dim: int, *, memory_map: bool = False) -> tuple[faiss.Index, np.ndarray]:
    """The index and the ids of a shard; memory-mapped: vectors stay in the file and are read when asked for.

    Errors   ArtifactError naming the file that is missing or does not fit
    """
    try:
        index = faiss.read_index(str(shard.index_path), faiss.IO_FLAG_MMAP_IFC if memory_map else 0)
        ids = np.load(shard.ids_path, allow_pickle=False)
    except (RuntimeError, OSError, ValueError) as error:
        raise ArtifactError(shard.index_path, str(error).splitlines()[0], "a FAISS file and its ids") from None
    if not index.ntotal == len(ids) == shard.num_items or index.d != dim:
        got = f"{index.ntotal} vectors of width {index.d} and {len(ids)} ids"
        raise ArtifactError(shard.index_path, got, f"{shard.num_items} of width {dim}, as {LAYOUT_NAME} says")
    return index, ids


def _write_ids(path: str, ids: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, ids)


def _write_renamed(path: Path, write: Callable[[str], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(str(temporary))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)

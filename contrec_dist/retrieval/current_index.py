"""What is searched now: the newest version of the living index, with its item table. Read in score.

    index = open_current(config, ["query"])
    scores, item_idx = index.spaces["query"].search(queries, k)
    index.items["item_id"].gather(...)      row i is item_idx i; items that left stay in the table, `live` false
    index.version                           12 letters of its content hash: what a recommendation names

Where `contrec index add` and its sisters were never used, that is what stage `index` wrote. Changes to an index that
has been built again since are not searched: a warning names both hashes, and `contrec index replay` brings them over.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Sequence

import numpy as np
import polars as pl

from contrec_dist.config import Config
from contrec_dist.data.catalog import load_items
from contrec_dist.data.latents import item_latents_path
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest
from contrec_dist.progress import get_logger
from sharding.faiss_shards import FaissShards
from sharding.faiss_versions import BASE, ForeignVersion, IndexVersion, Segment, VersionStore

LIVE_FOLDER = "index_live"
ENCODED = "encoded"
VERSION_LETTERS = 12


class SearchesItems(Protocol):
    """What FaissShards and RayFaissShards have in common: the contract of top_k.py."""

    num_items: int

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True, slots=True)
class CurrentIndex:
    """One version, opened: nothing that happens to the index later changes it."""

    version: str
    number: int
    spaces: dict[str, SearchesItems]
    items: pl.DataFrame
    "[item_idx, item_id, title, category, brand, text, num_train, live]; row i is item_idx i"
    latents: "OverlaidRows"
    "raw latents by item_idx: (n,) -> (n, K, Z)"
    embeddings: "OverlaidRows"
    "embeddings by item_idx: (n,) -> (n, E)"


class OverlaidRows:
    """Rows of an array by item_idx; some, and those past its end, from somewhere else. Read as a numpy array is.

    Shapes   base (N, ...), overlay (m, ...), overlay_idx (m,) int64, rising
    """

    def __init__(self, base: np.ndarray, overlay_idx: np.ndarray, overlay: np.ndarray):
        self.base, self.overlay_idx, self.overlay = base, overlay_idx, overlay
        num_rows = max(len(base), int(overlay_idx[-1]) + 1 if len(overlay_idx) else 0)
        self.shape, self.dtype = (num_rows, *base.shape[1:]), base.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, item_idx: np.ndarray) -> np.ndarray:
        """Rows of whole numbers of any shape; negative ones count from the end of `base`, as in numpy."""
        item_idx = np.asarray(item_idx)
        if not len(self.overlay_idx):
            return self.base[item_idx]
        place = np.minimum(np.searchsorted(self.overlay_idx, item_idx), len(self.overlay_idx) - 1)
        overlaid = self.overlay_idx[place] == item_idx
        rows = np.array(self.base[np.where(overlaid, 0, item_idx)])
        rows[overlaid] = self.overlay[place[overlaid]]
        return rows


def open_store(config: Config) -> VersionStore:
    """The versions beside the run's index folder. Raises ArtifactError where stage `index` is not complete."""
    manifest = Manifest.load(config.folder("index"))
    facts = next(manifest.facts[space] for space in manifest.config["index"]["spaces"])
    folder, kept = config.folder(LIVE_FOLDER), config.index.kept_versions
    return VersionStore(folder, config.folder("index"), manifest.content_hash, facts["num_items"], kept)


def open_current(config: Config, spaces: Sequence[str] | None = None, *, number: int | None = None) -> CurrentIndex:
    """Open a version in some spaces (None: all of the index; none of them: item table and arrays alone).

    number: the version of a job that began with it, so that all its workers, and those that start again, search the
    same; None: the newest. index.search says by what: this process, or Ray actors of the session that is running.
    Errors   ArtifactError when the index is not complete, a space is not in it, or that version is no longer kept
    """
    store = open_store(config)
    there = Manifest.load(config.folder("index")).config["index"]["spaces"]
    wanted = there if spaces is None else spaces
    for space in wanted:
        if space not in there:
            raise ArtifactError(config.folder("index") / space, "no such index", f"index.spaces with '{space}'")
    if number is not None:
        return _open_version(config, store, store.version(number), wanted)
    try:
        return store.open_current(lambda version: _open_version(config, store, version, wanted))
    except ForeignVersion as error:
        get_logger("index").warning("changes to the index are not searched: %s; see `contrec index replay`", error)
        return _open_version(config, store, store.version_0, wanted)


def current_version(config: Config) -> tuple[int, str]:
    """Number and name of the version that open_current would open, without opening it."""
    store = open_store(config)
    try:
        version = store.current()
    except ForeignVersion:
        version = store.version_0
    return version.number, version.content_hash[:VERSION_LETTERS]


def load_item_table(config: Config, store: VersionStore, version: IndexVersion) -> pl.DataFrame:
    """Every item that the version knows, those that left included. Row i is item_idx i."""
    items = load_items(config.folder("catalog")).with_columns(live=pl.lit(True))
    if not version.items_file:
        return items
    changed = pl.read_parquet(store.folder / version.items_file)
    joined = changed.filter(pl.col("item_idx") >= len(items))
    columns = [name for name in changed.columns if name != "item_idx"]
    return pl.concat([items.update(changed.select("item_idx", *columns), on="item_idx"), joined.select(items.columns)])


def load_encoded(store: VersionStore, segments: Sequence[Segment], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """What was encoded for items that joined or were replaced: their item_idx, rising, and the newest rows of an array.

    Items that left are still described: somebody's history may hold them.
    """
    folders = [store.segment_folder(segment) / ENCODED for segment in segments if segment.name != BASE]
    if not folders:
        return None
    idx = np.concatenate([np.load(folder / "item_idx.npy") for folder in folders])
    rows = np.concatenate([np.load(folder / f"{name}.npy") for folder in folders])
    newest = len(idx) - 1 - np.unique(idx[::-1], return_index=True)[1]
    return idx[newest], rows[newest]


def _open_version(config: Config, store: VersionStore, version: IndexVersion, spaces: Sequence[str]) -> CurrentIndex:
    return CurrentIndex(
        version=version.content_hash[:VERSION_LETTERS],
        number=version.number,
        spaces={space: _open_space(config, store, version, space) for space in spaces},
        items=load_item_table(config, store, version),
        latents=_overlay(item_latents_path(config), store, version, "latents"),
        embeddings=_overlay(config.folder("embeddings") / "items.npy", store, version, "embeddings"),
    )


def _open_space(config: Config, store: VersionStore, version: IndexVersion, space: str) -> SearchesItems:
    files, layout = store.list_files(version, space)
    if config.index.search == "ray":
        from sharding.faiss_actors import RayFaissShards

        return RayFaissShards.open_files(files, layout, config.index, config.ray)
    return FaissShards.open_files(files, layout, config.index.device, memory_map=config.index.memory_map)


def _overlay(path: Path, store: VersionStore, version: IndexVersion, name: str) -> OverlaidRows:
    base = np.load(path, mmap_mode="r")
    encoded = load_encoded(store, version.segments, name)
    if encoded is None:
        encoded = np.empty(0, dtype=np.int64), base[:0]
    return OverlaidRows(base, *encoded)

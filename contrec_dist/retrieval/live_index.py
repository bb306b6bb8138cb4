"""Changes to the living index: items join, leave, are replaced; segments are written again without what left.

Each change is one new version of every space at once (sharding/faiss_versions.py), made from the stage's output and
never by touching it, and is refused as a whole where a single item of it is wrong. An item_id keeps its item_idx for
ever: new items continue after the catalogue, and one that comes back gets the number that it had.

    index_live/segments/000003/{query,latent}/    the FAISS shards of the rows that joined
    index_live/segments/000003/ids.npy            their item_idx, rising
    index_live/segments/000003/encoded/           item_idx, embeddings, latents, vectors (.npy) of items of a file
    index_live/changes/000003.parquet             what was asked: kind, item_id, title, category, brand, text
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np
import polars as pl

from contrec_dist.config import Config
from contrec_dist.data.latents import item_latents_path
from contrec_dist.data.sources.raw import ITEM_COLUMNS
from contrec_dist.errors import ArtifactError, DataError
from contrec_dist.manifest import hash_file, hash_json
from contrec_dist.progress import get_logger
from contrec_dist.retrieval.current_index import ENCODED, load_encoded, load_item_table, open_store
from contrec_dist.retrieval.index import SPACES, normalise_latents
from contrec_dist.retrieval.new_items import EncodedItems, encode_items
from sharding.faiss_build import extend_shards
from sharding.faiss_files import NO_IDS, read_layout
from sharding.faiss_versions import BASE, Change, IndexVersion, Segment, VersionStore

CHUNK_ROWS = 65_536
MAX_SEGMENTS = 32


@dataclass
class LiveIndex:
    """The one writer of a run's living index. The caller holds lock_folder(config, LIVE_FOLDER)."""

    config: Config
    store: VersionStore

    @classmethod
    def open(cls, config: Config) -> "LiveIndex":
        """Errors   ArtifactError with both hashes when the changes belong to an index that is no longer there"""
        store = open_store(config)
        try:
            store.current()
        except ArtifactError as error:
            expected = f"{error.expected}; `contrec index replay` makes them again on it"
            raise ArtifactError(error.path, error.got, expected) from None
        return cls(config, store)

    def add(self, items: pl.DataFrame) -> IndexVersion:
        """Let items join. items: [item_id, title, category, brand, text]

        Errors   DataError listing every id that is searched already
        """
        table = self._table()
        known = table.filter("live").join(items, on="item_id", how="semi")["item_id"].to_list()
        if known:
            raise DataError(
                "items", f"{len(known)} ids that are in the index: {', '.join(known)}", "new ids, or `index replace`"
            )
        return self._join("add", items, table)

    def replace(self, items: pl.DataFrame) -> IndexVersion:
        """Give items another text, in one version: what they were is never missing and never beside what they are.

        Errors   DataError listing every id that is not searched
        """
        table = self._table()
        unknown = items.join(table.filter("live"), on="item_id", how="anti", maintain_order="left")["item_id"].to_list()
        if unknown:
            raise DataError(
                "items", f"{len(unknown)} unknown ids: {', '.join(unknown)}", "ids of the index, or `index add`"
            )
        return self._join("replace", items, table)

    def remove(self, item_ids: Sequence[str], *, missing_ok: bool = False) -> IndexVersion:
        """Let items leave: no search returns them again.

        Errors   DataError listing every id that is not searched, unless missing_ok; these are left out then
        """
        table = self._table()
        asked = pl.DataFrame({"item_id": list(item_ids)}, schema={"item_id": pl.String})
        found = asked.join(table.filter("live"), on="item_id", how="inner", maintain_order="left")
        unknown = asked.join(found, on="item_id", how="anti", maintain_order="left")["item_id"].to_list()
        if unknown and not missing_ok:
            raise DataError(
                "items", f"{len(unknown)} unknown ids: {', '.join(unknown)}", "ids of the index, or --missing_ok"
            )
        if unknown:
            get_logger("index").info("%d ids are not in the index", len(unknown))
        if found.is_empty():
            return self.store.current()
        change = self.store.begin(self.store.current())
        segments = self._leave_out(change, found["item_idx"].to_numpy())
        rows = found.select(table.columns).with_columns(live=pl.lit(False))
        return self._publish(change, segments, change.version.next_id, rows, "remove")

    def compact(self, *, everything: bool = False) -> IndexVersion:
        """Write segments again without the rows that left: those above index.max_tombstone_ratio (`everything`: with
        any such row, and all that joined), and those that joined when they are more than 32.

        Cost     memory: one shard; time and disk: as building them, without training
        """
        version = self.store.current()
        limit = 0.0 if everything else self.config.index.max_tombstone_ratio
        joined = [segment for segment in version.segments if segment.name != BASE]
        chosen = {segment.name for segment in version.segments if segment.removed_ratio > limit}
        if len(joined) > (1 if everything else MAX_SEGMENTS):
            chosen |= {segment.name for segment in joined}
        old = [segment for segment in version.segments if segment.name in chosen]
        kept = [np.setdiff1d(self._segment_ids(one), self.store.removed_ids(one)) for one in old]
        if not sum(map(len, kept)):
            get_logger("index").info("nothing to compact: no segment has more than %.0f%% removed rows", 100 * limit)
            return version
        change = self.store.begin(version)
        new = self._rewrite(change, old, np.sort(np.concatenate(kept)))
        others = [segment for segment in version.segments if segment.name not in chosen]
        return self._publish(change, [*others, new], version.next_id, None, "compact")

    def _table(self) -> pl.DataFrame:
        return load_item_table(self.config, self.store, self.store.current())

    def _join(self, kind: str, items: pl.DataFrame, table: pl.DataFrame) -> IndexVersion:
        """One new segment; rows of the same items in older segments are left out."""
        version = self.store.current()
        change = self.store.begin(version)
        encoded = encode_items(self.config, items)
        rows = items.join(
            table.select("item_id", "item_idx", "num_train"), on="item_id", how="left", maintain_order="left"
        )
        is_new = rows["item_idx"].is_null()
        numbers = version.next_id + is_new.cum_sum().cast(pl.Int64) - 1
        item_idx = rows["item_idx"].zip_with(~is_new, numbers)
        rows = rows.with_columns(item_idx, pl.col("num_train").fill_null(0), live=pl.lit(True)).select(table.columns)
        segments = self._leave_out(change, item_idx.to_numpy())
        new = self._write_segment(change, item_idx.to_numpy(), encoded)
        return self._publish(change, [*segments, new], version.next_id + int(is_new.sum()), rows, kind)

    def _leave_out(self, change: Change, item_idx: np.ndarray) -> list[Segment]:
        """The version's segments without these items."""
        return [change.leave_out(one, self._segment_ids(one), item_idx) for one in change.version.segments]

    def _segment_ids(self, segment: Segment) -> np.ndarray:
        """(rows,) int64, rising."""
        if segment.name == BASE:
            return np.arange(segment.num_rows, dtype=np.int64)
        return np.load(self.store.segment_folder(segment) / "ids.npy")

    def _write_segment(self, change: Change, item_idx: np.ndarray, encoded: EncodedItems) -> Segment:
        """The shards of items that join, in every space, and what they were made from."""
        order = np.argsort(item_idx)
        arrays = {"embeddings": encoded.embeddings, "latents": encoded.latents, "vectors": encoded.vectors}
        arrays = {"item_idx": item_idx} | arrays
        arrays = {name: array[order] for name, array in arrays.items()}
        spaces = {"query": arrays["vectors"], "latent": normalise_latents(self.config, arrays["latents"])}
        return self._write(change, arrays["item_idx"], spaces, arrays, num_shards=1)

    def _rewrite(self, change: Change, old: list[Segment], ids: np.ndarray) -> Segment:
        """One segment of what is left of some, ids rising, from the vectors that they were made from."""
        joined = {name: load_encoded(self.store, old, name) for name in ("embeddings", "latents", "vectors")}
        arrays = {name: pair[1] for name, pair in joined.items() if pair is not None}
        if arrays:
            arrays["item_idx"] = joined["latents"][0]
        change.new_segment.mkdir(parents=True)
        paths = {space: change.new_segment / f".{space}.npy" for space in self._spaces()}
        spaces = {space: self._gather(space, arrays, ids, path) for space, path in paths.items()}
        num_shards = max(1, round(self.config.index.num_shards * len(ids) / self.store.version_0.num_items))
        segment = self._write(change, ids, spaces, arrays, num_shards)
        for path in paths.values():
            path.unlink()
        return segment

    def _gather(self, space: str, arrays: dict[str, np.ndarray], ids: np.ndarray, path: Path) -> np.ndarray:
        """Vectors of a space by item_idx, of the stage or of items of a file, as a memory-mapped array at `path`."""
        stage, _ = SPACES[space][0](self.config)
        overlay_idx = arrays.get("item_idx", NO_IDS)
        overlay = stage.read(slice(0, 0))
        if len(overlay_idx):
            overlay = arrays["vectors"] if space == "query" else normalise_latents(self.config, arrays["latents"])
        target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(ids), stage.width))
        for start in range(0, len(ids), CHUNK_ROWS):
            some = ids[start : start + CHUNK_ROWS]
            of_file = np.isin(some, overlay_idx)
            rows = stage.read(np.where(of_file, 0, some))
            rows = np.where(of_file[:, None], 0, rows)
            rows[of_file] = overlay[np.searchsorted(overlay_idx, some[of_file])]
            target[start : start + CHUNK_ROWS] = rows
        return target

    def _write(
        self,
        change: Change,
        ids: np.ndarray,
        spaces: dict[str, np.ndarray],
        arrays: dict[str, np.ndarray],
        num_shards: int,
    ) -> Segment:
        """Write a segment's folder. ids rise; spaces: their vectors; arrays: what items of files were encoded to."""
        folder = change.new_segment
        (folder / ENCODED).mkdir(parents=True, exist_ok=True)
        for space in self._spaces():
            base = self.store.base_folder / space
            extend_shards(base, read_layout(base), spaces[space], ids, folder / space, num_shards)
        np.save(folder / "ids.npy", ids)
        for name, array in (arrays or self._no_arrays()).items():
            np.save(folder / ENCODED / f"{name}.npy", array)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        digest = hash_json({path.relative_to(folder).as_posix(): hash_file(path) for path in files})
        return Segment(change.name, len(ids), digest)

    def _no_arrays(self) -> dict[str, np.ndarray]:
        """Encoded arrays of no item."""
        like = {
            "embeddings": self.config.folder("embeddings") / "items.npy",
            "latents": item_latents_path(self.config),
            "vectors": self.config.folder("model") / "item_vectors.npy",
        }
        return {"item_idx": NO_IDS} | {name: np.load(path, mmap_mode="r")[:0] for name, path in like.items()}

    def _spaces(self) -> list[str]:
        return [space for space in SPACES if (self.store.base_folder / space).is_dir()]

    def _publish(
        self, change: Change, segments: list[Segment], next_id: int, rows: pl.DataFrame | None, kind: str
    ) -> IndexVersion:
        """Write item table and log, then switch."""
        before = change.version.items_file
        tables = [pl.read_parquet(self.store.folder / before)] if before else []
        if rows is not None:
            tables = [table.join(rows, on="item_idx", how="anti") for table in tables] + [rows]
            log = rows.select("item_id", *ITEM_COLUMNS)
            log.with_columns(kind=pl.lit(kind)).write_parquet(change.log_path)
        pl.concat(tables).sort("item_idx").write_parquet(change.items_path)
        note = {"kind": kind, "items": 0 if rows is None else len(rows)}
        version = change.publish(segments, next_id, note)
        line = "version %d (%s): %s of %d items; %d are searched, in %d segments"
        get_logger("index").info(
            line, version.number, version.content_hash[:12], kind, note["items"], version.num_items, len(segments)
        )
        return version

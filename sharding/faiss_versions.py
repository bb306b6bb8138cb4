"""Versions of a living index: what each one searches, and the switch from one to the next.

    live/CURRENT                    {"version", "content_hash"}: the one file that is ever replaced
    live/versions/000003.json       a version: its segments, what is removed from each, its item table; never changed
    live/segments/000003/           rows that joined with version 3: an index folder a space, and what made them
    live/removed/000003-<segment>.npy   rising ids that version 3 leaves out of a segment
    live/items/000003.parquet       every item that joined, changed or left since version 0

Version 0 is the folder that stage `index` wrote; its segment is called "base" and is never touched. Files of a version
carry its number and are complete before CURRENT names it, so a reader finds the old version or the new one, whole; one
that opened a version goes on with it. A process killed before the switch leaves files that no version names and that
the next change with that number removes. Files that none of the last `kept_versions` names are removed after the
switch.

One writer at a time: the caller holds a lock.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Callable, TypeVar

import numpy as np

from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import hash_file, hash_json, write_json
from sharding.faiss_files import NO_IDS, ShardFile, list_shards, read_layout

CURRENT_NAME, BASE = "CURRENT", "base"
FORMAT = 1
OPEN_ATTEMPTS = 20
Opened = TypeVar("Opened")


class ForeignVersion(ArtifactError):
    """Versions that continue another index than the one that is there."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows that were written together, and which of them a version leaves out."""

    name: str
    num_rows: int
    content_hash: str
    num_removed: int = 0
    removed_file: str = ""
    "relative to the live folder; empty: none"
    removed_hash: str = ""
    "sha256 of that file"

    @property
    def removed_ratio(self) -> float:
        """Share of rows that are left out."""
        return self.num_removed / self.num_rows if self.num_rows else 0.0


@dataclass(frozen=True, slots=True)
class IndexVersion:
    """What one version searches."""

    number: int
    base_hash: str
    "content hash of the stage's folder, which names model and tokens in turn"
    segments: tuple[Segment, ...]
    next_id: int
    "the item_idx that the next new item gets; none is given twice"
    items_file: str = ""
    "relative to the live folder; empty: the catalogue's items as they are"
    changes: tuple[dict, ...] = field(default_factory=tuple)
    "what was done since version 0, oldest first"

    @property
    def num_items(self) -> int:
        """Items that a search can return."""
        return sum(segment.num_rows - segment.num_removed for segment in self.segments)

    @property
    def content_hash(self) -> str:
        """Hash of what is searched; of version 0: the stage's."""
        if self.number == 0:
            return self.base_hash
        return hash_json(
            {"base": self.base_hash, "segments": [asdict(one) for one in self.segments], "number": self.number}
        )


class VersionStore:
    """The versions beside one stage folder."""

    def __init__(self, folder: Path, base_folder: Path, base_hash: str, num_base_items: int, kept_versions: int):
        self.folder, self.base_folder, self.kept_versions = Path(folder), Path(base_folder), max(2, kept_versions)
        self.version_0 = IndexVersion(0, base_hash, (Segment(BASE, num_base_items, base_hash),), num_base_items)

    def current(self) -> IndexVersion:
        """The newest version. Raises ForeignVersion with both hashes where it continues another base than this one."""
        for _ in range(OPEN_ATTEMPTS):
            pointer = self.folder / CURRENT_NAME
            if not pointer.is_file():
                return self.version_0
            named = json.loads(pointer.read_text())
            try:
                return self._check_base(self._read(named["version"]))
            except FileNotFoundError:  # several changes ago by now
                continue
        raise ArtifactError(self.folder / CURRENT_NAME, "a version without its file", "a complete version")

    def version(self, number: int) -> IndexVersion:
        """A version that is still kept. Raises ArtifactError where it is not, ForeignVersion as `current` does."""
        if number == 0:
            return self.version_0
        try:
            return self._check_base(self._read(number))
        except FileNotFoundError:
            path = self._version_path(number)
            raise ArtifactError(path, "a version that is gone", "one of the newest; see index.kept_versions") from None

    def open_current(self, open_version: Callable[[IndexVersion], Opened]) -> Opened:
        """`open_version(current())`; once more where its files were replaced by two newer versions meanwhile."""
        for _ in range(OPEN_ATTEMPTS):
            version = self.current()
            try:
                return open_version(version)
            except (ArtifactError, OSError):
                if self.current().number == version.number:
                    raise
        raise ArtifactError(
            self.folder, "versions that change faster than they can be opened", "one that stays a moment"
        )

    def segment_folder(self, segment: Segment | str) -> Path:
        """Where a segment lies."""
        name = segment if isinstance(segment, str) else segment.name
        return self.base_folder if name == BASE else self.folder / "segments" / name

    def removed_ids(self, segment: Segment) -> np.ndarray:
        """(m,) int64, rising: ids that the version leaves out of the segment."""
        return np.load(self.folder / segment.removed_file) if segment.removed_file else NO_IDS

    def list_files(self, version: IndexVersion, space: str) -> tuple[list[ShardFile], dict]:
        """Every shard that the version searches in a space, and the layout of their common codebook."""
        files = []
        for segment in version.segments:
            folder = self.segment_folder(segment) / space
            files += list_shards(folder, read_layout(folder), self.removed_ids(segment))
        return files, read_layout(self.base_folder / space)

    def begin(self, version: IndexVersion) -> "Change":
        """Start the change that follows `version`; what a killed one of the same number left is removed."""
        name = f"{version.number + 1:06d}"
        for part in ("segments", "removed", "items", "changes", "versions"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
            for leftover in (self.folder / part).glob(f"{name}*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return Change(self, version, name)

    def publish(self, version: IndexVersion) -> None:
        """Write the version and switch to it. Everything that it names is complete."""
        record = {"format": FORMAT, "content_hash": version.content_hash, **asdict(version)}
        write_json(self._version_path(version.number), record)
        write_json(self.folder / CURRENT_NAME, {"version": version.number, "content_hash": version.content_hash})
        self._prune(version)

    def set_aside(self) -> Path:
        """Rename the whole live folder after the base that it belongs to; returns where it is now."""
        named = json.loads((self.folder / CURRENT_NAME).read_text())
        target = self.folder.with_name(f"{self.folder.name}-{self._read(named['version']).base_hash[:12]}")
        self.folder.rename(target)
        return target

    def _read(self, number: int) -> IndexVersion:
        record = json.loads(self._version_path(number).read_text())
        if record.pop("format") != FORMAT:
            raise ArtifactError(self._version_path(number), "another format", f"format {FORMAT}")
        del record["content_hash"]
        segments = tuple(Segment(**one) for one in record.pop("segments"))
        return IndexVersion(segments=segments, changes=tuple(record.pop("changes")), **record)

    def _check_base(self, version: IndexVersion) -> IndexVersion:
        if version.base_hash != self.version_0.base_hash:
            got, expected = (
                f"changes to index {version.base_hash[:16]}",
                f"index {self.version_0.base_hash[:16]}, which is there now",
            )
            raise ForeignVersion(self.folder, got, f"changes to {expected}")
        return version

    def _version_path(self, number: int) -> Path:
        return self.folder / "versions" / f"{number:06d}.json"

    def _prune(self, newest: IndexVersion) -> None:
        """Remove what the last versions do not name; the log of changes stays."""
        paths = sorted((self.folder / "versions").glob("[0-9]*.json"))
        kept = [self._read(int(path.stem)) for path in paths if int(path.stem) > newest.number - self.kept_versions]
        segments = {segment.name for version in kept for segment in version.segments}
        files = {segment.removed_file for version in kept for segment in version.segments}
        files |= {version.items_file for version in kept}
        for path in paths:
            if int(path.stem) <= newest.number - self.kept_versions:
                path.unlink()
        for path in (self.folder / "segments").iterdir():
            if path.name not in segments:
                shutil.rmtree(path)
        for path in [*(self.folder / "removed").iterdir(), *(self.folder / "items").iterdir()]:
            if path.relative_to(self.folder).as_posix() not in files:
                path.unlink()


@dataclass
class Change:
    """The next version while it is made: add a segment, leave ids out of the others, then publish."""

    store: VersionStore
    version: IndexVersion
    name: str

    @property
    def new_segment(self) -> Path:
        """Folder for the rows that join."""
        return self.store.folder / "segments" / self.name

    @property
    def items_path(self) -> Path:
        """File for the item table."""
        return self.store.folder / "items" / f"{self.name}.parquet"

    @property
    def log_path(self) -> Path:
        """File for what was asked, which a rebuilt index can be given again."""
        return self.store.folder / "changes" / f"{self.name}.parquet"

    def leave_out(self, segment: Segment, segment_ids: np.ndarray, removed: np.ndarray) -> Segment:
        """The segment without `removed` ids, beside those that are left out already."""
        before = self.store.removed_ids(segment)
        after = np.union1d(before, segment_ids[np.isin(segment_ids, removed)])
        if len(after) == len(before):
            return segment
        path = f"removed/{self.name}-{segment.name}.npy"
        np.save(self.store.folder / path, after)
        digest = hash_file(self.store.folder / path)
        return replace(segment, num_removed=len(after), removed_file=path, removed_hash=digest)

    def publish(self, segments: list[Segment], next_id: int, note: dict) -> IndexVersion:
        """Make the version current; returns it."""
        version = replace(
            self.version,
            number=self.version.number + 1,
            segments=tuple(segments),
            next_id=next_id,
            items_file=f"items/{self.name}.parquet",
            changes=(*self.version.changes, {"version": self.version.number + 1, **note}),
        )
        self.store.publish(version)
        return version

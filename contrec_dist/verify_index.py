"""The living index against what its versions say (sharding/faiss_versions.py). Part of verify.py."""

import json
from functools import partial
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
import polars as pl

from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError, ContRecError
from contrec_dist.manifest import check_file, hash_file, hash_json
from contrec_dist.retrieval.current_index import LIVE_FOLDER, open_store
from sharding.faiss_files import list_shards, read_layout, read_shard
from sharding.faiss_versions import BASE, CURRENT_NAME, IndexVersion, Segment, VersionStore

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OSError, pl.exceptions.PolarsError)
Check = Callable[[], None]


def list_checks(config: Config, *, quick: bool) -> tuple[list[Check], list[str]]:
    """Checks of every kept version, its segments, removed ids and item table, each raising what is wrong; and notes.

    Errors   ArtifactError when CURRENT or the versions themselves cannot be read, or continue another index
    """
    store = open_store(config)
    current = _reading(store.folder / CURRENT_NAME, store.current)
    paths = sorted((store.folder / "versions").glob("[0-9]*.json"))
    versions = [_reading(path, partial(store.version, int(path.stem))) for path in paths]
    checks = [partial(_check_hash, path, version) for path, version in zip(paths, versions)]
    if (store.folder / CURRENT_NAME).is_file():
        checks.append(partial(_check_hash, store.folder / CURRENT_NAME, current))
    segments = {one.name: one for version in versions for one in version.segments if one.name != BASE}
    checks += [partial(_check_segment, store, one, quick) for one in segments.values()]
    removed = {one.removed_file: one for version in versions for one in version.segments if one.removed_file}
    checks += [
        partial(check_file, store.folder / name, {"sha256": one.removed_hash}, deep=not quick) for name, one in removed.items()
    ]
    tables = {version.items_file for version in versions if version.items_file}
    tables |= {path.relative_to(store.folder).as_posix() for path in store.folder.glob("changes/*.parquet")}
    checks += [partial(_check_table, store.folder / name, quick) for name in sorted(tables)]
    named = {*removed, *tables, *(f"segments/{name}" for name in segments)}
    return checks, [f"{path} is in no kept version; the next change removes it" for path in _list_unnamed(store.folder, named)]


def _reading(path: Path, read: Callable[[], IndexVersion]) -> IndexVersion:
    try:
        return read()
    except UNREADABLE as error:
        raise ArtifactError(path, f"an unreadable version ({type(error).__name__} {error})", "one as this project writes it") from None


def _check_hash(path: Path, version: IndexVersion) -> None:
    written = json.loads(path.read_text()).get("content_hash")
    if written != version.content_hash:
        raise ArtifactError(path, f"content hash {written}", f"{version.content_hash}, that of what it names")


def _check_segment(store: VersionStore, segment: Segment, quick: bool) -> None:
    """The files of a segment have one hash together; the file that is broken is looked for where it differs."""
    folder = store.segment_folder(segment)
    broken = list(_list_broken(folder, deep=False))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    digest = segment.content_hash
    if not broken and not quick:
        digest = hash_json({path.relative_to(folder).as_posix(): hash_file(path) for path in files})
        broken = list(_list_broken(folder, deep=True)) if digest != segment.content_hash else []
    if broken or digest != segment.content_hash:
        got = "; ".join(broken) or "other content, in a file that can be read"
        raise ArtifactError(folder, got, f"files of content hash {segment.content_hash}")


def _list_broken(folder: Path, *, deep: bool) -> Iterable[str]:
    """Files of a segment that are missing, or, `deep`, cannot be read."""
    spaces = sorted(path for path in folder.glob("*") if path.is_dir() and path.name != "encoded")
    if not spaces:
        yield f"{folder}: got no index folder"
    for space in spaces:
        try:
            layout = read_layout(space)
            for shard in list_shards(space, layout):
                for path in (shard.index_path, shard.ids_path):
                    if not path.is_file():
                        yield f"{path}: got no such file"
                if deep:
                    read_shard(shard, layout["dim"])
        except ContRecError as error:
            yield str(error)
        except UNREADABLE as error:
            yield f"{space}: got {type(error).__name__} {error}"
    for path in [folder / "ids.npy", *sorted(folder.glob("*/*.npy"))]:
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except UNREADABLE as error:
            yield f"{path}: got {type(error).__name__} {error}"


def _check_table(path: Path, quick: bool) -> None:
    if not path.is_file():
        raise ArtifactError(path, "no such file", "the items of a version")
    if not quick:
        try:
            pl.read_parquet(path)
        except UNREADABLE as error:
            raise ArtifactError(path, f"an unreadable table ({' '.join(str(error).split())})", "Parquet") from None


def _list_unnamed(folder: Path, named: set[str]) -> list[Path]:
    paths = [path for part in ("segments", "removed", "items") for path in sorted((folder / part).glob("*"))]
    return [path for path in paths if path.relative_to(folder).as_posix() not in named]

"""Where the files of token shards lie: in a folder of this machine, or behind a URL (remote_shards.py).

Stage    read by train; `contrec verify` checks the same files.
Promise  Both kinds answer the same three questions (ShardFiles), so a reader does not know which one it has. What the
         manifest of tokens/ says of a shard is what its file must be.
"""

import os
from pathlib import Path
from typing import Mapping, Protocol

from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, check_file
from sharding.token_writer import shard_name


class ShardFiles(Protocol):
    """The shards of one tokens folder, by number. May be forked and pickled."""

    def open(self, shard: int) -> tuple[int, Path]:
        """Descriptor and path of a shard's file. Errors   OSError that names the file, or ArtifactError"""

    def renew(self, shard: int) -> bool:
        """After a sample that is not what the index says: whether the file, opened again, may be a better one."""

    def check(self, shard: int, *, deep: bool = False) -> None:
        """Compare a file with its record: presence and size, with `deep` the content too. Errors   ArtifactError"""


class LocalShards:
    """Shards that lie in a folder, read where they are."""

    def __init__(self, folder: Path, records: Mapping[int, dict] | None = None):
        """`records`: read_records of the tokens folder; only `check` needs them."""
        self.folder, self.records = Path(folder), records or {}

    def open(self, shard: int) -> tuple[int, Path]:
        path = self.folder / shard_name(shard)
        return os.open(path, os.O_RDONLY), path

    def renew(self, shard: int) -> bool:
        return False

    def check(self, shard: int, *, deep: bool = False) -> None:
        check_file(self.folder / shard_name(shard), self.records[shard], deep=deep)


def read_records(tokens_folder: Path, manifest: Manifest) -> dict[int, dict]:
    """What the manifest says of every shard, {"bytes", "sha256"}. Errors   ArtifactError for one that it leaves out"""
    records = {}
    for shard in range(manifest.facts["num_shards"]):
        record = manifest.files.get(shard_name(shard))
        if record is None:
            raise ArtifactError(tokens_folder, f"a manifest without {shard_name(shard)}", "one that names every shard")
        records[shard] = {"bytes": record["bytes"], "sha256": record["sha256"]}
    return records


def open_shards(config: Config) -> ShardFiles:
    """The shards of a run's tokens folder, where shards.url says that they lie.

    Errors   ArtifactError without a manifest; ConfigError for a URL that fsspec does not take
    """
    tokens, url = config.folder("tokens"), config.shards.url
    records = read_records(tokens, Manifest.load(tokens))
    if "://" not in url:
        return LocalShards(Path(url) if url else tokens, records)
    from sharding.remote_shards import RemoteShards

    cache = Path(config.shards.cache_dir) if config.shards.cache_dir else config.folder("shard_cache")
    return RemoteShards(config.shards, cache.absolute(), records)

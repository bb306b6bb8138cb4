"""Token shards behind a URL (S3, GCS, HTTP, what else fsspec knows), through a cache of files on this machine.

    cache_dir/000003-<16 letters of the sha256>.tar    a shard; complete and right, since it got this name after it was hashed
    cache_dir/.000003-<...>.tar.<a try>.tmp            one on its way
    cache_dir/.000003-<...>.tar.lock, .room.lock       one process fetches a shard, the others wait for it

Promise  A file is what the manifest says: size and sha256 are compared before it gets its name, its size whenever it is
         opened, and its content again when a sample in it turns out wrong; what is not right is fetched once more.
         Processes, forked and pickled readers and runs may share a cache: other content has another name.
         A transfer that fails or stalls is tried again, with growing waits; the last failure is told with the URL.
Cost     Reading is what it is from a folder. Fetching: the transfer, one sha256 and one fsync.
         On disk: cache_bytes, the shards on their way, and those that were dropped while readers had them open (16 each).
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Mapping
from uuid import uuid4

import fsspec
from filelock import FileLock
from fsspec.callbacks import Callback
from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt, wait_exponential, wait_random

from contrec_dist.config import ShardsConfig
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import check_file, hash_file
from contrec_dist.progress import get_logger
from sharding.token_writer import shard_name

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
LOOKS_A_TIMEOUT = 4
OPEN_ATTEMPTS = 5
FINAL_ERRORS = (FileNotFoundError, PermissionError)
NAMED_LETTERS = 16
BOOLEANS = {"true": True, "false": False}


class TransferError(Exception):
    """A transfer that stalled, or brought something else than the shard."""


class RemoteShards:
    """ShardFiles behind shards.url."""

    def __init__(self, settings: ShardsConfig, cache: Path, records: Mapping[int, dict]):
        """`records`: {"bytes", "sha256"} of every shard.

        Errors   ConfigError for a URL that fsspec does not take, or a cache with no room for a shard
        """
        self.settings, self.cache, self.records = settings, Path(cache), records
        self._failed: dict[int, ArtifactError] = {}
        largest = max((record["bytes"] for record in records.values()), default=0)
        if 0 < settings.cache_bytes < largest:
            raise ConfigError("shards.cache_bytes", settings.cache_bytes, f"at least {largest}, the largest shard, or 0")
        try:
            fsspec.core.url_to_fs(settings.url, **transfer_options(settings))
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigError("shards.url", settings.url, f"a URL that fsspec opens here ({error})") from None
        self.cache.mkdir(parents=True, exist_ok=True)

    def open(self, shard: int) -> tuple[int, Path]:
        """Descriptor and path; fetched first where it is not there or of another size.

        Errors   ArtifactError naming the URL, what happened in the last try and how many tries there were. A shard that
                 could not be had is not asked for again by this process.
        """
        path = self._path(shard)
        for _ in range(OPEN_ATTEMPTS):  # another process may drop it before it is open
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                if os.fstat(descriptor).st_size == self.records[shard]["bytes"]:
                    os.utime(descriptor)  # what was used last is dropped last
                    return descriptor, path
                os.close(descriptor)
            self._fetch(shard, deep=False)
        raise ArtifactError(path, "a shard that is dropped as soon as it is fetched", "shards.cache_bytes with more room")

    def renew(self, shard: int) -> bool:
        """Fetch a shard again unless its content is right by now. Errors   ArtifactError as `open` does"""
        self._fetch(shard, deep=True)
        return True

    def check(self, shard: int, *, deep: bool = False) -> None:
        """Have the shard in the cache; `deep`: hash one that is there already. Errors   ArtifactError as `open` does"""
        self._fetch(shard, deep=deep)

    def url(self, shard: int) -> str:
        """Where a shard comes from."""
        return f"{self.settings.url.rstrip('/')}/{shard_name(shard)}"

    def _path(self, shard: int) -> Path:
        return self.cache / f"{shard:06d}-{self.records[shard]['sha256'][:NAMED_LETTERS]}.tar"

    def _fetch(self, shard: int, *, deep: bool) -> None:
        """Bring a shard into the cache unless a good one is there; one process at a time."""
        if shard in self._failed:
            raise self._failed[shard]
        path = self._path(shard)
        with FileLock(path.with_name(f".{path.name}.lock")):
            try:
                check_file(path, self.records[shard], deep=deep)
                return
            except ArtifactError as error:
                if path.exists():
                    get_logger("shards").warning("fetched again: %s", error)
            for leftover in self.cache.glob(f".{path.name}.*.tmp"):  # of a killed process: this one holds the lock
                leftover.unlink()
            try:
                self._download(shard, path)
            except ArtifactError as error:
                self._failed[shard] = error
                raise

    def _download(self, shard: int, path: Path) -> None:
        url, record = self.url(shard), self.records[shard]
        tries = Retrying(
            stop=stop_after_attempt(1 + self.settings.retries),
            wait=wait_exponential(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS) + wait_random(0, FIRST_WAIT_SECONDS),
            retry=retry_if_not_exception_type(FINAL_ERRORS),
            before_sleep=lambda state: get_logger("shards").warning(
                "%s: try %d failed: %s", url, state.attempt_number, _describe(state.outcome.exception())
            ),
            reraise=True,
        )
        try:
            tries(self._try_once, url, path, record)
        except Exception as error:
            count = tries.statistics["attempt_number"]
            got = f"{_describe(error)} in the last of {count} tries" if count > 1 else f"{_describe(error)} in 1 try"
            raise ArtifactError(url, got, f"{record['bytes']} bytes with sha256 {record['sha256']}") from None

    def _try_once(self, url: str, path: Path, record: dict) -> None:
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")  # another one a try: a stalled one may yet wake up
        try:
            transfer(url, temporary, self.settings)
            num_bytes, sha256 = temporary.stat().st_size, hash_file(temporary)
            if (num_bytes, sha256) != (record["bytes"], record["sha256"]):
                raise TransferError(f"{num_bytes} bytes with sha256 {sha256}")
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            with FileLock(self.cache / ".room.lock"):
                self._make_room(num_bytes, beside=path)
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int, beside: Path) -> None:
        """Drop what was used longest ago until so many bytes fit below cache_bytes."""
        if not self.settings.cache_bytes:
            return
        files = []
        for path in self.cache.glob("*.tar"):
            with suppress(FileNotFoundError):
                state = path.stat()
                files.append((state.st_mtime_ns, path.name, state.st_size))
        room = self.settings.cache_bytes - sum(size for _, name, size in files if name != beside.name)
        for _, name, size in sorted(files):
            if room >= num_bytes:
                return
            if name != beside.name:
                (self.cache / name).unlink(missing_ok=True)
                room += size


class _Abort(Callback):
    """Ends a transfer that nobody waits for any more, when it next brings something."""

    def __init__(self):
        super().__init__()
        self.abandoned = False

    def call(self, *_, **__) -> None:
        if self.abandoned:
            raise TransferError("abandoned")


def transfer(url: str, target: Path, settings: ShardsConfig) -> None:
    """Copy one file to `target`.

    The transfer runs in a thread of its own, whose file is watched: whatever the protocol's own timeouts, one whose file
    does not grow for timeout_seconds (checked four times in that span) has stalled, and is left to its end.
    Errors   TransferError for one that stalled; whatever the protocol raises
    """
    filesystem, path = fsspec.core.url_to_fs(url, **transfer_options(settings))
    abort, errors, done = _Abort(), [], threading.Event()

    def copy() -> None:
        try:
            filesystem.get_file(path, str(target), callback=abort)
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=copy, daemon=True).start()
    size, moved = -1, time.monotonic()
    while not done.wait(settings.timeout_seconds / LOOKS_A_TIMEOUT):
        now, new_size = time.monotonic(), target.stat().st_size if target.exists() else -1
        if new_size != size:
            size, moved = new_size, now
        elif now - moved >= settings.timeout_seconds:
            abort.abandoned = True
            raise TransferError(f"stalled: nothing for {settings.timeout_seconds:g} s after {max(size, 0)} bytes")
    if errors:
        raise errors[0]


def transfer_options(settings: ShardsConfig) -> dict:
    """What fsspec takes beside the URL: storage_options, "true" and "false" as booleans; over HTTP the timeouts too."""
    options = {name: BOOLEANS.get(value.lower(), value) for name, value in settings.storage_options.items()}
    if settings.url.startswith(("http://", "https://")):
        import aiohttp

        seconds = settings.timeout_seconds
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)}
    return options


def _describe(error: BaseException) -> str:
    """The error in one line, with its kind where it would say nothing without."""
    text = " ".join(str(error).split())
    return text if isinstance(error, TransferError) else f"{type(error).__name__} {text}".rstrip()

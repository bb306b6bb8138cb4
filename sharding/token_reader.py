"""Random access to the training samples of a tokens folder.

Stage    read by train, score and evaluate.
Promise  Strict: what is returned is what was written (names, sizes, array headers and a crc32 are compared with the
         index), anything else is an ArtifactError that names the file and the sample. Files open at the first read and
         reads carry their own offset, so one reader may be forked or pickled into DataLoader workers; in threads, use
         one reader each. Where the files lie, and whether a damaged one can be had anew: shard_files.py.
Cost     One system call a sample, 10 to 20 microseconds while the page cache holds it.
         The index is held in memory, 128 bytes a user.
"""

import io
import math
import os
import zlib
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Iterator, NamedTuple

import numpy as np
import polars as pl

from contrec_dist.errors import ArtifactError
from sharding.shard_files import LocalShards, ShardFiles
from sharding.token_writer import INDEX_COLUMNS, TokenSample, sample_key

IndexRow = NamedTuple("IndexRow", [(name, int) for name in INDEX_COLUMNS])


class TokenReader:
    """Samples by user_idx.

    Arrays with one entry a user: `shard`, `num_items` (H), `num_train`, `validation_pos`, `test_pos`, all int64.
    """

    def __init__(self, tokens_folder: str | Path, max_open_shards: int = 16, shards: ShardFiles | None = None):
        """`shards`: where the shards lie; None: in the tokens folder.

        Errors   ArtifactError when index.parquet or latent_mean.npy is missing or not what this project writes.
        """
        self.folder = Path(tokens_folder)
        self.shards = shards or LocalShards(self.folder)
        self.max_open_shards = max_open_shards
        self._index = _load_index(self.folder / "index.parquet")
        for name in ("shard", "num_items", "num_train", "validation_pos", "test_pos"):
            setattr(self, name, self._index[:, INDEX_COLUMNS.index(name)].copy())
        self.num_item_tokens, self.latent_dim = _load_latent_shape(self.folder / "latent_mean.npy")
        self._open: OrderedDict[int, tuple[int, Path]] = OrderedDict()  # by shard, least recently used first

    def __reduce__(self):
        return TokenReader, (self.folder, self.max_open_shards, self.shards)

    def __del__(self):
        self.close()

    @property
    def num_samples(self) -> int:
        """U, users of the catalogue."""
        return len(self.shard)

    @property
    def num_shards(self) -> int:
        """Shard files."""
        return int(self.shard[-1]) + 1 if self.num_samples else 0

    def close(self) -> None:
        """Close the shards; the next read opens its own again."""
        for descriptor, _ in getattr(self, "_open", {}).values():
            os.close(descriptor)
        self._open = OrderedDict()

    def read(self, user_idx: int) -> TokenSample:
        """The sample of one user; its arrays belong to the caller.

        Errors   ArtifactError naming shard and sample when the shard is missing, cut off or not what the index says;
                 IndexError when there is no such user.
        """
        user_idx = int(user_idx)
        if not 0 <= user_idx < self.num_samples:
            raise IndexError(f"user_idx {user_idx}, expected 0..{self.num_samples - 1}")
        row = IndexRow(*self._index[user_idx].tolist())
        try:
            return self._read_row(row)
        except ArtifactError:
            could_be_had = row.shard in self._open
            if not could_be_had or not self.shards.renew(row.shard):
                raise
        os.close(self._open.pop(row.shard)[0])
        return self._read_row(row)

    def _read_row(self, row: IndexRow) -> TokenSample:
        descriptor, path = self._open_shard(row)
        start = row.items_offset - BLOCKSIZE
        data = bytearray(row.latents_offset + row.latents_bytes - start)
        try:
            num_read = os.preadv(descriptor, [data], start)
        except OSError as error:
            raise ArtifactError(path, error.strerror, f"sample {sample_key(row.user_idx)}") from None
        if num_read != len(data):
            expected = f"{len(data)} bytes from byte {start} for sample {sample_key(row.user_idx)}"
            raise ArtifactError(path, f"a file that ends after {start + num_read} bytes", expected)
        return self._parse(path, row, data)

    def iter_shard(self, shard: int) -> Iterator[TokenSample]:
        """The samples of one shard in order, read front to back."""
        first, end = np.searchsorted(self.shard, [shard, shard + 1])
        if first == end:
            raise ArtifactError(self.folder, f"no shard {shard}", f"a shard in 0..{self.num_shards - 1}")
        for user_idx in range(first, end):
            yield self.read(user_idx)

    def _open_shard(self, row: IndexRow) -> tuple[int, Path]:
        """File descriptor and path of a shard; the least recently used one is closed when too many are open."""
        if row.shard in self._open:
            self._open.move_to_end(row.shard)
            return self._open[row.shard]
        try:
            self._open[row.shard] = self.shards.open(row.shard)
        except OSError as error:
            raise ArtifactError(error.filename, error.strerror, f"the shard of sample {sample_key(row.user_idx)}") from None
        if len(self._open) > self.max_open_shards:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[row.shard]

    def _parse(self, path: Path, row: IndexRow, data: bytearray) -> TokenSample:
        """Cut the two arrays out of the bytes from the items' tar header to the end of the latents."""
        key = sample_key(row.user_idx)
        latents_start = row.latents_offset - row.items_offset  # of that member's tar header in `data`
        shape = (row.num_items, self.num_item_tokens, self.latent_dim)
        items = _member(path, f"{key}.items.npy", data, 0, row.items_bytes)
        latents = _member(path, f"{key}.latents.npy", data, latents_start, row.latents_bytes)
        if zlib.crc32(latents, zlib.crc32(items)) != row.crc32:
            raise ArtifactError(path, f"other content in sample {key}", f"crc32 {row.crc32}")
        return TokenSample(
            row.user_idx,
            _array(path, f"{key}.items.npy", items, np.dtype(np.int32), (row.num_items,)),
            _array(path, f"{key}.latents.npy", latents, np.dtype(np.float16), shape),
            row.num_train,
            row.validation_pos,
            row.test_pos,
        )


def _member(path: Path, name: str, data: bytearray, start: int, num_bytes: int) -> memoryview:
    """Data of the tar member whose header stands at `start`, after comparing name and size with the index."""
    header = data[start : start + BLOCKSIZE]
    if not header.startswith(name.encode() + b"\0") or header[124:136] != b"%011o\0" % num_bytes:
        got = bytes(header[:100]).rstrip(b"\0")
        raise ArtifactError(path, f"a tar header {got!r}", f"that of {name} with {num_bytes} bytes")
    return memoryview(data)[start + BLOCKSIZE : start + BLOCKSIZE + num_bytes]


def _array(path: Path, name: str, data: memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array of an .npy file whose dtype and shape are known."""
    header_bytes = len(data) - dtype.itemsize * math.prod(shape)
    got = _parse_npy_header(bytes(data[: max(header_bytes, 0)]))
    if got != (dtype, shape):
        raise ArtifactError(path, f"an array header {got} in {name}", f"{(dtype, shape)}")
    return np.frombuffer(data, dtype, offset=header_bytes).reshape(shape)


@lru_cache(maxsize=4096)
def _parse_npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]] | None:
    """(dtype, shape) of an .npy header that ends with these bytes; None when they are no such header."""
    file = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        return None
    return None if fortran_order or file.tell() != len(header) else (dtype, shape)


def _load_index(path: Path) -> np.ndarray:
    """Rows of index.parquet (U, columns) int64, row number = user_idx."""
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(path, f"an unreadable file ({error})", "the index that precompute writes") from None
    if tuple(frame.columns) != INDEX_COLUMNS or set(frame.dtypes) != {pl.Int64}:
        raise ArtifactError(path, f"columns {dict(frame.schema)}", f"int64 {INDEX_COLUMNS}")
    users = frame["user_idx"].to_numpy()
    wrong = np.flatnonzero(users != np.arange(len(users)))
    if len(wrong):
        raise ArtifactError(path, f"user_idx {users[wrong[0]]} in row {wrong[0]}", "user_idx = row number")
    return frame.to_numpy(order="c")


def _load_latent_shape(path: Path) -> tuple[int, int]:
    """(K, Z)."""
    try:
        shape = np.load(path, mmap_mode="r").shape
    except (OSError, ValueError) as error:
        raise ArtifactError(path, f"an unreadable file ({error})", "(K, Z) float32") from None
    if len(shape) != 2:
        raise ArtifactError(path, f"shape {shape}", "(K, Z)")
    return shape

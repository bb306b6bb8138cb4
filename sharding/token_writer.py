"""Writes one WebDataset shard of training samples, and the index rows that find them again.

Stage    precompute. One sample a user, members in this order, `key` = 12-digit user_idx:
             key.json          {"user_id", "num_train", "validation_pos", "test_pos"}
             key.items.npy     (H,) int32, the whole history in time order
             key.latents.npy   (H, K, Z) float16, the continuous tokens of those items
Promise  The bytes are a function of the samples alone: USTAR, owner 0, time 0, names zero-padded.
Cost     About 40 us of one core a sample; one sample in memory at a time. tarfile opens and ends the file and gives the
         blank header, but takes 20 us for a header, three times a sample: here a name and a size are filled in.
"""

import io
import json
import tarfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Iterable, NamedTuple

import numpy as np
import polars as pl

from contrec_dist.errors import DataError

INDEX_COLUMNS = (
    "user_idx",
    "shard",
    "num_items",
    "num_train",
    "validation_pos",
    "test_pos",
    "items_offset",
    "latents_offset",
    "items_bytes",
    "latents_bytes",
    "crc32",
)
"""Columns of index.parquet, all int64. An offset is that of the member's first data byte in the tar; crc32 covers
the data of items.npy, then that of latents.npy."""


class TokenSample(NamedTuple):
    """One user's history. Shapes: items (H,) int32, latents (H, K, Z) float16."""

    user_idx: int
    items: np.ndarray
    latents: np.ndarray
    num_train: int
    validation_pos: int
    test_pos: int


def sample_key(user_idx: int) -> str:
    """Name of a sample inside its shard."""
    return f"{user_idx:012d}"


def shard_name(shard: int) -> str:
    """Path of a shard relative to the tokens folder."""
    return f"shards/{shard:06d}.tar"


def write_shard(path: Path, shard: int, samples: Iterable[tuple[str, TokenSample]]) -> pl.DataFrame:
    """Write (user_id, sample) pairs to the tar `path` and return their index rows, INDEX_COLUMNS in that order.

    Errors   DataError naming the sample when its shapes or dtypes are not those of TokenSample, when a latent is not
             finite, or when user_idx does not ascend.
    """
    rows, previous = [], -1
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for user_id, sample in samples:
            _check_sample(sample, previous)
            rows.append(_write_sample(tar, shard, user_id, sample))
            previous = sample.user_idx
    return pl.DataFrame(rows, schema=dict.fromkeys(INDEX_COLUMNS, pl.Int64), orient="row")


def _write_sample(tar: tarfile.TarFile, shard: int, user_id: str, sample: TokenSample) -> tuple[int, ...]:
    """Append the three members of a sample; return its index row."""
    key = sample_key(sample.user_idx)
    places = {"num_train": sample.num_train, "validation_pos": sample.validation_pos, "test_pos": sample.test_pos}
    items, latents = _npy_bytes(sample.items), _npy_bytes(sample.latents)
    _, items_offset, latents_offset = _add_members(
        tar,
        (f"{key}.json", json.dumps({"user_id": user_id, **places}).encode()),
        (f"{key}.items.npy", items),
        (f"{key}.latents.npy", latents),
    )
    offsets = (items_offset, latents_offset, len(items), len(latents), zlib.crc32(latents, zlib.crc32(items)))
    return (sample.user_idx, shard, len(sample.items), *places.values(), *offsets)


def _add_members(tar: tarfile.TarFile, *members: tuple[str, bytes]) -> list[int]:
    """Append (name, data) members owned by nobody at time 0; return the offsets of their data."""
    pieces, offsets, end = [], [], tar.offset
    for name, data in members:
        padding = -len(data) % tarfile.BLOCKSIZE
        pieces += (_tar_header(name, len(data)), data, bytes(padding))
        offsets.append(end + tarfile.BLOCKSIZE)  # USTAR: one header block
        end += tarfile.BLOCKSIZE + len(data) + padding
    tar.fileobj.write(b"".join(pieces))
    tar.offset = end
    return offsets


_BLANK_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)


def _tar_header(name: str, size: int) -> bytes:
    """What tarfile writes for TarInfo(name) of this size: name at 0, size at 124, checksum at 148."""
    header = bytearray(_BLANK_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8  # what the checksum counts in its own place
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def _npy_bytes(array: np.ndarray) -> bytes:
    """The .npy file of an array."""
    return _npy_header(array.shape, array.dtype) + array.tobytes()


@lru_cache(maxsize=4096)
def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Its header, which few shapes share."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _check_sample(sample: TokenSample, previous: int) -> None:
    """Refuse what the reader would not find again."""
    where = f"sample {sample_key(sample.user_idx)}"
    if sample.user_idx <= previous:
        raise DataError(where, f"user_idx {sample.user_idx} after {previous}", "ascending user_idx")
    items, latents = sample.items, sample.latents
    if items.dtype != np.int32 or items.ndim != 1:
        raise DataError(where, f"items {items.shape} {items.dtype}", "(H,) int32")
    if latents.dtype != np.float16 or latents.ndim != 3 or len(latents) != len(items):
        raise DataError(where, f"latents {latents.shape} {latents.dtype}", f"({len(items)}, K, Z) float16")
    if not np.isfinite(latents).all():
        row = int(np.argmin(np.isfinite(latents).all(axis=(1, 2))))
        raise DataError(where, f"a latent of item {int(items[row])} that is no finite float16", "finite latents")

"""Text files, plain or gz: found, opened and split at a separator of any length.

Text is UTF-8, and latin-1 where it is not valid UTF-8 (MovieLens and parts of HetRec are). Line numbers are kept:
row r of a frame is line r + 1 of the file, blank lines included.
"""

import gzip
import io
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterator, Sequence

import polars as pl

from contrec_dist.config import Config
from contrec_dist.data.sources.raw import RawTable, locate_by_line
from contrec_dist.errors import ConfigError, DataError


def find_file(config: Config, key: str, name: str) -> Path:
    """Path of a source file; `<name>.gz` serves where `name` is absent.

    Errors   ConfigError naming `key`, the path, and the files that lie there.
    """
    folder = Path(config.source.path)
    if not config.source.path or not folder.is_dir():
        raise ConfigError("source.path", repr(config.source.path), "a folder that exists and holds the source's files")
    if not name:
        raise ConfigError(key, "nothing", f"a file in {folder}")
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    present = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file())[:20]) or "no files"
    raise ConfigError(key, f"{folder / name}, which does not exist", f"a file in that folder, which holds: {present}")


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressing *.gz.

    Errors   DataError naming a file that is cut off, damaged or unreadable.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(str(path), f"an unreadable file ({error})", "a whole file") from None


def decode(data: bytes) -> bytes:
    """Bytes as UTF-8: as they are where they are valid, else taken as latin-1."""
    try:
        data.decode("utf-8")
        return data
    except UnicodeDecodeError:
        return data.decode("latin-1").encode("utf-8")


def read_separated(
    path: Path, columns: Sequence[str], *, separator: str, header: bool = False, num_required: int | None = None
) -> RawTable:
    """Read lines of fields without quoting, for example MovieLens' `1::1193::5::978300760`.

    A line with more fields than `columns`, or fewer than `num_required` (all unless given), is a fault.
    """
    lines = _read_lines(path).slice(1 if header else 0)
    blank = lines["text"].is_null() | (lines["text"] == "")
    lines = lines.filter(~blank)
    parts = lines["text"].str.split(separator)
    wrong = ~parts.list.len().is_between(num_required or len(columns), len(columns))
    fields = {name: parts.list.get(i, null_on_oob=True) for i, name in enumerate(columns)}
    fault = pl.when(pl.Series(wrong)).then(pl.lit(f"not {len(columns)} fields")).otherwise(None)
    frame = pl.DataFrame({"row": lines["row"], **fields}).with_columns(fault=fault)
    return RawTable(frame=frame, path=path, locate=locate_by_line(path, first_line=1), num_blank=int(blank.sum()))


def _read_lines(path: Path) -> pl.DataFrame:
    """All lines as [row, text]; a separator that no text holds makes polars' CSV reader a fast line reader."""
    with open_binary(path) as file:
        data = decode(file.read())
    if not data:
        raise DataError(str(path), "an empty file", "at least one line")
    lines = pl.read_csv(
        io.BytesIO(data), separator="\x01", quote_char=None, has_header=False, infer_schema=False, new_columns=["text"]
    )
    return lines.select(pl.int_range(pl.len(), dtype=pl.Int64).alias("row"), pl.col("text").str.strip_chars("\r"))

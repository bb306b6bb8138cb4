"""JSON Lines, plain or gz: one object a line, valid JSON or (Amazon 2014) a Python literal.

Interactions take the fast road: polars parses blocks of lines, and a block that it refuses is parsed line by line, so
one broken line costs one row. Items are parsed line by line, since their fields are nested (about 100,000 lines a
second; a Python literal about ten times slower).
"""

import ast
import io
import json
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator, Sequence

import polars as pl

from contrec_dist.data.sources.raw import RawTable, locate_by_line
from contrec_dist.data.sources.text_files import open_binary
from contrec_dist.errors import DataError

BLOCK_LINES = 200_000
UNREADABLE = "unreadable line"


def parse_line(line: bytes) -> dict | None:
    """The object on a line, or None where there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        try:
            value = ast.literal_eval(line.decode("utf-8").strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def first_keys(path: Path) -> list[str]:
    """Field names that the first thousand lines have, sorted.

    Errors   DataError where no line of the first thousand is an object.
    """
    with open_binary(path) as file:
        records = [parse_line(line) for line in islice(file, 1000)]
    keys = sorted({key for record in records if record for key in record})
    if keys:
        return keys
    raise DataError(str(path), "no line that is an object", "one JSON object a line")


def read_fields(path: Path, fields: Sequence[str]) -> RawTable:
    """Read flat fields as text, null where a line has none."""
    blocks, num_blank, start = [], 0, 0
    for lines in _blocks(path):
        rows = [start + i for i, line in enumerate(lines) if line.strip()]
        num_blank += len(lines) - len(rows)
        kept = lines if len(rows) == len(lines) else [lines[row - start] for row in rows]
        block = _parse_block(kept, fields)
        blocks.append(block.insert_column(0, pl.Series("row", rows, dtype=pl.Int64)))
        start += len(lines)
    schema = {"row": pl.Int64, **{name: pl.String for name in fields}, "fault": pl.String}
    frame = pl.concat(blocks, rechunk=True) if blocks else pl.DataFrame(schema=schema)
    return RawTable(frame=frame, path=path, locate=locate_by_line(path, first_line=1), num_blank=num_blank)


def read_records(path: Path, columns: Sequence[str], convert: Callable[[dict], Sequence[str | None]]) -> RawTable:
    """Read every line as an object and let `convert` draw the values of `columns` from it."""
    names = ("row", *columns, "fault")
    rows, num_blank = [], 0
    with open_binary(path) as file:
        for row, line in enumerate(file):
            if not line.strip():
                num_blank += 1
                continue
            record = parse_line(line)
            values = [None] * len(columns) if record is None else convert(record)
            rows.append((row, *values, UNREADABLE if record is None else None))
    schema = {name: pl.Int64 if name == "row" else pl.String for name in names}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return RawTable(frame=frame, path=path, locate=locate_by_line(path, first_line=1), num_blank=num_blank)


def as_text(value: object, *, joiner: str = " ") -> str | None:
    """A field's value as text: lists joined, null kept."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return joiner.join(text for text in (as_text(part, joiner=joiner) for part in value) if text)
    return json.dumps(value)


def _blocks(path: Path) -> Iterator[list[bytes]]:
    with open_binary(path) as file:
        while lines := list(islice(file, BLOCK_LINES)):
            yield lines


def _parse_block(lines: list[bytes], fields: Sequence[str]) -> pl.DataFrame:
    """[*fields, fault] of a block of non-blank lines."""
    schema = {name: pl.String for name in fields}
    try:
        frame = pl.read_ndjson(io.BytesIO(b"".join(lines)), schema=schema)
        if len(frame) == len(lines):
            return frame.with_columns(pl.lit(None, dtype=pl.String).alias("fault"))
    except pl.exceptions.PolarsError:
        pass  # some line is not JSON: the slow road finds which
    records = [parse_line(line) for line in lines]
    columns = {name: [as_text(record.get(name)) if record else None for record in records] for name in fields}
    faults = [UNREADABLE if record is None else None for record in records]
    return pl.DataFrame({**columns, "fault": faults}, schema={**schema, "fault": pl.String})

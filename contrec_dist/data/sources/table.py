"""Any CSV, TSV, Parquet or JSON Lines file (gz too), or folder of Parquet files, whose columns the config names.

Guarantees: text columns are read as text, so ids keep leading zeros; a row with too many fields is a fault, a row with
too few has empty ones; line numbers are those of the file, quoted line breaks included. Cost: one CSV file is held in
memory, decompressed, while it is parsed (1 M rows a second or so).
"""

import csv
import io
import shutil
import sys
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Iterator

import polars as pl

from contrec_dist.config import Config, SourceConfig
from contrec_dist.data.sources import json_lines
from contrec_dist.data.sources.raw import ITEM_COLUMNS, Locator, RawLogs, RawTable, locate_by_row
from contrec_dist.data.sources.text_files import find_file, open_binary
from contrec_dist.errors import ConfigError, DataError

OVERFLOW = "__too_many_fields"
INTERACTIONS_KEY, ITEMS_KEY = "source.interactions_file", "source.items_file"
NUMBERS = ("time", "order", "rating")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


def source_files(config: Config) -> dict[str, Path]:
    """The interactions file and, if named, the item file; of a folder, each of its files under the key and its name."""
    return {label: path for files in _named_files(config).values() for label, path in files.items()}


def read(config: Config) -> RawLogs:
    """Read both files by the columns that the config names."""
    columns = {INTERACTIONS_KEY: interaction_columns(config.source)}
    files = _named_files(config)
    if ITEMS_KEY in files:
        columns[ITEMS_KEY] = item_columns(config.source)
    tables = {}
    for key, named in columns.items():
        tables[key] = _join_tables([read_table(path, named, key) for path in files[key].values()])
    return RawLogs(interactions=tables[INTERACTIONS_KEY], items=tables.get(ITEMS_KEY))


def _named_files(config: Config) -> dict[str, dict[str, Path]]:
    """{config key: {label: path}} of the file that the key names, or of the Parquet files in that folder."""
    source, files = config.source, {}
    for key, name in ((INTERACTIONS_KEY, source.interactions_file), (ITEMS_KEY, source.items_file)):
        folder = Path(source.path) / name
        if name and source.path and folder.is_dir():
            paths = sorted(folder.glob("*.parquet"))
            if not paths:
                raise ConfigError(key, f"{folder}, a folder without *.parquet", "a file, or a folder of Parquet files")
            files[key] = {f"{key}/{path.name}": path for path in paths}
        elif name or key == INTERACTIONS_KEY:
            files[key] = {key: find_file(config, key, name)}
    return files


def _join_tables(tables: list[RawTable]) -> RawTable:
    """Files of one folder as one table: the rows of a file follow those of the files before it."""
    if len(tables) == 1:
        return tables[0]
    stops = list(accumulate(len(table.frame) for table in tables))
    frames = [table.frame.with_columns(pl.col("row") + stop - len(table.frame)) for table, stop in zip(tables, stops)]

    def locate(rows: list[int]) -> list[str]:
        places = [(bisect_right(stops, row), row) for row in rows]
        return [tables[file].locate([row - stops[file] + len(tables[file].frame)])[0] for file, row in places]

    return RawTable(frame=pl.concat(frames), path=tables[0].path.parent, locate=locate)


def interaction_columns(source: SourceConfig) -> dict[str, tuple[str, str]]:
    """{canonical column: (config key, the file's column)} of the interactions file."""
    keys = {"user_id": "user", "item_id": "item", "time": "timestamp", "order": "order", "rating": "rating"}
    return _named_columns(source, keys)


def item_columns(source: SourceConfig) -> dict[str, tuple[str, str]]:
    """{canonical column: (config key, the file's column)} of the item file."""
    return _named_columns(source, {"item_id": "item", **{name: name for name in ITEM_COLUMNS}})


def _named_columns(source: SourceConfig, keys: dict[str, str]) -> dict[str, tuple[str, str]]:
    named = {name: (f"source.{key}_column", getattr(source, f"{key}_column")) for name, key in keys.items()}
    for name in ("user_id", "item_id"):
        if name in named and not named[name][1]:
            raise ConfigError(named[name][0], "nothing", "the name of a column")
    return {name: pair for name, pair in named.items() if pair[1]}


def read_table(path: Path, columns: dict[str, tuple[str, str]], key: str = INTERACTIONS_KEY) -> RawTable:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix in SEPARATORS:
        return _read_delimited(path, columns, SEPARATORS[suffix])
    if suffix == ".parquet":
        return _read_parquet(path, columns)
    if suffix in JSON_SUFFIXES:
        return _read_json_lines(path, columns)
    raise ConfigError(key, path.name, "a name that ends in .csv, .tsv, .parquet, .jsonl or .json, .gz allowed behind")


def _check_columns(path: Path, columns: dict[str, tuple[str, str]], present: list[str]) -> None:
    for key, name in columns.values():
        if name not in present:
            raise ConfigError(key, repr(name), f"a column of {path}, which has: {', '.join(present)} (empty: none)")


def _read_delimited(path: Path, columns: dict[str, tuple[str, str]], separator: str) -> RawTable:
    with open_binary(path) as file:
        first = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
        header = next(csv.reader([first], delimiter=separator), [])
        _check_columns(path, columns, header)
        # One column more than the header has: what lands in it shows a row with too many fields.
        buffer = io.BytesIO()
        buffer.write(separator.join([*(f"c{i}" for i in range(len(header))), OVERFLOW]).encode() + b"\n")
        shutil.copyfileobj(file, buffer)
    frame = _parse_delimited(path, buffer, separator)
    blank = pl.all_horizontal(pl.all().is_null())
    num_blank = frame.select(blank.sum()).item()
    fault = pl.when(pl.col(OVERFLOW).is_not_null()).then(pl.lit(f"more than {len(header)} fields"))
    picked = [pl.col(f"c{header.index(column)}").alias(name) for name, (_, column) in columns.items()]
    row = pl.int_range(pl.len(), dtype=pl.Int64).alias("row")
    frame = frame.select(row, *picked, fault.otherwise(None).alias("fault"), blank.alias("blank"))
    frame = frame.filter(~pl.col("blank")).drop("blank")
    return RawTable(frame=frame, path=path, locate=_locate_in_csv(path, separator), num_blank=num_blank)


def _parse_delimited(path: Path, buffer: io.BytesIO, separator: str) -> pl.DataFrame:
    buffer.seek(0)
    try:
        return pl.read_csv(buffer, separator=separator, infer_schema=False, truncate_ragged_lines=True)
    except pl.exceptions.PolarsError as error:
        got = f"a file that cannot be parsed ({error})"
        raise DataError(str(path), got, f"rows separated by {separator!r}") from None


def _locate_in_csv(path: Path, separator: str) -> Locator:
    """Locator that counts lines again, since a quoted field may hold line breaks."""

    def locate(rows: list[int]) -> list[str]:
        with open_binary(path) as file:
            starts = _record_lines(io.TextIOWrapper(file, "utf-8", errors="replace", newline=""), separator)
            wanted = set(rows)
            lines = {row: line for row, line in zip(range(max(rows) + 1), starts) if row in wanted}
        return [f"{path}:{lines.get(row, '?')}" for row in rows]

    return locate


def _record_lines(file: io.TextIOWrapper, separator: str) -> Iterator[int]:
    """The line on which each record after the header begins."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(file, delimiter=separator)
        next(reader)
        start = reader.line_num + 1
        for _ in reader:
            yield start
            start = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, columns: dict[str, tuple[str, str]]) -> RawTable:
    try:
        _check_columns(path, columns, pl.read_parquet_schema(path).names())
        frame = pl.read_parquet(path, columns=sorted({column for _, column in columns.values()}))
    except pl.exceptions.PolarsError as error:
        raise DataError(str(path), f"a file that cannot be read ({error})", "a Parquet file") from None
    picked = [_plain_column(frame[column], name) for name, (_, column) in columns.items()]
    row = pl.int_range(len(frame), dtype=pl.Int64, eager=True).alias("row")
    fault = pl.lit(None, dtype=pl.String).alias("fault")
    frame = pl.DataFrame([row, *picked]).with_columns(fault)
    return RawTable(frame=frame, path=path, locate=locate_by_row(path))


def _plain_column(column: pl.Series, name: str) -> pl.Series:
    """Text for all but times and what is a number already; lists are joined."""
    if isinstance(column.dtype, pl.List):
        joined = column.cast(pl.List(pl.String)).list.join(" > " if name == "category" else " ")
        return joined.alias(name)
    keep = name == "time" and column.dtype.is_temporal() or name in NUMBERS and column.dtype.is_numeric()
    return (column if keep else column.cast(pl.String)).alias(name)


def _read_json_lines(path: Path, columns: dict[str, tuple[str, str]]) -> RawTable:
    _check_columns(path, columns, json_lines.first_keys(path))
    names = {name: column for name, (_, column) in columns.items()}
    if "user_id" not in names:  # items: nested fields allowed
        joiners = [(column, " > " if name == "category" else " ") for name, column in names.items()]
        convert = lambda record: [json_lines.as_text(record.get(c), joiner=joiner) for c, joiner in joiners]
        return json_lines.read_records(path, list(names), convert)
    raw = json_lines.read_fields(path, sorted(set(names.values())))
    raw.frame = raw.frame.select("row", *(pl.col(column).alias(name) for name, column in names.items()), "fault")
    return raw

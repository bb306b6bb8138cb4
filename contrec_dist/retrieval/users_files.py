"""Users that somebody names in a file: a subset of the catalogue's, or new ones with nothing but a history.

    score.users_file       a column user_id; every one must be a user of the catalogue
    score.histories_file   user_id and item_ids (a list, oldest first; in CSV separated by blanks), one row a user,
                           or user_id and item_id, one row an interaction, in the user's order

CSV, TSV, Parquet or JSON Lines, gz too. Both become one Parquet file as scored_users.py reads it, sorted by user_id.
Guarantees: every item id that the catalogue does not have, and every row without a user, is counted and shown with file and
row; above source.max_bad_ratio that is an error, below it they are left out with a warning and stand in the manifest.
Cost: the file is held in memory once, some 100 bytes an interaction.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from contrec_dist.config import Config
from contrec_dist.data.catalog import HISTORIES_FILE, USERS_FILE
from contrec_dist.data.sources import json_lines
from contrec_dist.data.sources.raw import RawTable, locate_by_row
from contrec_dist.data.sources.table import JSON_SUFFIXES, SEPARATORS, read_table
from contrec_dist.data.sources.text_files import open_binary
from contrec_dist.errors import ConfigError, DataError
from contrec_dist.progress import get_logger
from contrec_dist.retrieval.current_index import open_current
from contrec_dist.retrieval.scored_users import ScoredUsers

USERS_KEY, HISTORIES_KEY = "score.users_file", "score.histories_file"
NUM_SHOWN = 5
ROW_GROUP_ROWS = 65_536
BETWEEN_IDS = "\x1f"  # between the ids of a JSON list, which may hold blanks


@dataclass(frozen=True)
class NamedUsers:
    """Users brought into the form of scored_users.py, and what was left out on the way."""

    users: ScoredUsers
    facts: dict


def pick_users(config: Config, target: Path) -> NamedUsers:
    """The users of score.users_file, sorted by user_id, written to `target`.

    Errors   DataError naming the first that the catalogue does not have, rows without a user, or an empty file
    """
    path = _existing(config.score.users_file, USERS_KEY)
    table = read_table(path, {"user_id": (USERS_KEY, "user_id")}, USERS_KEY)
    _refuse_faults(table, ["user_id"])
    wanted = table.frame.select("user_id").unique()
    catalog = config.folder("catalog")
    known = pl.scan_parquet(catalog / USERS_FILE).join(wanted.lazy(), on="user_id", how="semi").collect()
    unknown = table.frame.filter(~pl.col("user_id").is_in(known["user_id"].implode()))
    if wanted.is_empty():
        raise DataError(str(path), "no user", "at least one")
    if len(unknown):
        shown = f"{unknown['user_id'].n_unique()} users that the catalogue does not have, the first: {_show(unknown, table, 'user_id')}"
        raise DataError(str(path), shown, f"user_id as in {catalog / USERS_FILE}")
    histories = pl.scan_parquet(catalog / HISTORIES_FILE).join(known.lazy(), on="user_idx", how="inner").collect()
    _write(histories.select("user_id", "user_idx", "items", "num_train", "validation_pos", "test_pos"), target)
    num_repeated = len(table.frame) - len(wanted)
    if num_repeated:
        get_logger("score").warning("%s: %d rows repeat a user, who is scored once", path, num_repeated)
    return NamedUsers(ScoredUsers(target, target), {"users": len(known), "repeated_rows": num_repeated})


def read_histories(config: Config, target: Path) -> NamedUsers:
    """The users of score.histories_file with their histories, sorted by user_id, written to `target`.

    Errors   DataError naming file and row of the first wrong entries where they are more than source.max_bad_ratio, a user
             with two lists, or an empty file; ConfigError for a file without these columns.
    """
    path = _existing(config.score.histories_file, HISTORIES_KEY)
    table, listed = _read_entries(path)
    items = open_current(config, []).items.select("item_id", "item_idx")
    entries = table.frame.join(items, on="item_id", how="left", maintain_order="left")
    wrong = entries.filter(_is_wrong())
    facts = _judge(wrong, len(entries), table, config.source.max_bad_ratio)
    found = pl.when(~_is_wrong()).then(pl.col("item_idx")).drop_nulls().alias("items")
    histories = entries.filter(pl.col("user_id").is_not_null()).group_by("user_id", maintain_order=True).agg(found)
    if histories.is_empty():
        raise DataError(str(path), "no user", "at least one row with a user_id")
    num_empty = histories.filter(pl.col("items").list.len() == 0).height
    if num_empty:
        get_logger("score").warning("%s: %d users have no known item; they are scored with an empty history", path, num_empty)
    length = pl.col("items").list.len().cast(pl.Int64)
    none = pl.lit(-1, dtype=pl.Int64)
    columns = {"user_idx": none, "num_train": length, "validation_pos": none, "test_pos": none}
    _write(histories.with_columns(**columns), target)
    facts |= {"users": len(histories), "users_without_items": num_empty, "one_row_a_user": listed}
    return NamedUsers(ScoredUsers(target, target), facts)


def _read_entries(path: Path) -> tuple[RawTable, bool]:
    """[row, user_id, item_id, fault], one row an item in the user's order, and whether the file has lists."""
    names = _column_names(path)
    if "item_ids" not in names:
        columns = {name: (HISTORIES_KEY, name) for name in ("user_id", "item_id")}
        return read_table(path, columns, HISTORIES_KEY), False
    if "user_id" not in names:
        raise ConfigError(HISTORIES_KEY, str(path), f"a column 'user_id'; there are: {', '.join(names)}")
    table = _read_lists(path)
    repeated = table.frame.filter(pl.col("user_id").is_not_null() & pl.col("user_id").is_duplicated())
    if len(repeated):
        raise DataError(str(path), f"users with two lists: {_show(repeated, table, 'user_id')}", "one list a user")
    exploded = table.frame.explode("item_id", empty_as_null=True)
    table.frame = exploded.with_columns(pl.col("item_id").replace({"": None}))
    return table, True


def _read_lists(path: Path) -> RawTable:
    """[row, user_id, item_id (list of text), fault]; a user without items keeps a row."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        frame = pl.read_parquet(path, columns=["user_id", "item_ids"])
        row = pl.int_range(pl.len(), dtype=pl.Int64).alias("row")
        lists = pl.col("item_ids").cast(pl.List(pl.String)).alias("item_id")
        fault = pl.lit(None, dtype=pl.String).alias("fault")
        return RawTable(frame=frame.select(row, pl.col("user_id").cast(pl.String), lists, fault), path=path, locate=locate_by_row(path))
    if suffix in JSON_SUFFIXES:
        ids = lambda record: json_lines.as_text(record.get("item_ids"), joiner=BETWEEN_IDS)  # noqa: E731
        convert = lambda record: [json_lines.as_text(record.get("user_id")), ids(record)]  # noqa: E731
        table, separator = json_lines.read_records(path, ["user_id", "item_id"], convert), BETWEEN_IDS
    else:
        columns = {"user_id": (HISTORIES_KEY, "user_id"), "item_id": (HISTORIES_KEY, "item_ids")}
        table, separator = read_table(path, columns, HISTORIES_KEY), " "
    table.frame = table.frame.with_columns(pl.col("item_id").fill_null("").str.split(separator))
    return table


def _is_wrong() -> pl.Expr:
    """An entry that cannot be used; an empty list's one row, which names no item, is none."""
    return pl.col("user_id").is_null() | pl.col("fault").is_not_null() | (
        pl.col("item_id").is_not_null() & pl.col("item_idx").is_null()
    )  # fmt: skip


def _judge(wrong: pl.DataFrame, num_entries: int, table: RawTable, max_bad_ratio: float) -> dict:
    """Refuse too many wrong entries, tell of few."""
    if wrong.is_empty():
        return {"wrong_entries": 0}
    unknown = wrong.filter(pl.col("user_id").is_not_null() & pl.col("fault").is_null())
    shown = _show(unknown, table, "item_id") if len(unknown) else _show(wrong, table, "user_id")
    got = (
        f"{len(wrong)} of {num_entries} entries wrong, {len(unknown)} of them item ids that the catalogue does not have; "
        f"the first: {shown}"
    )
    if len(wrong) > max_bad_ratio * num_entries:
        raise DataError(str(table.path), got, f"at most {max_bad_ratio:.2%} wrong (source.max_bad_ratio)")
    get_logger("score").warning("%s: left out, %s", table.path, got)
    return {"wrong_entries": len(wrong), "unknown_items": len(unknown)}


def _show(rows: pl.DataFrame, table: RawTable, column: str) -> str:
    """The first few values with their places: 'x' (file.csv:7)."""
    first = rows.head(NUM_SHOWN)
    places = table.locate(first["row"].to_list())
    shown = ", ".join(f"'{value}' ({place})" for value, place in zip(first[column], places))
    return shown + (", ..." if len(rows) > NUM_SHOWN else "")


def _refuse_faults(table: RawTable, columns: list[str]) -> None:
    missing = pl.any_horizontal(pl.col(name).is_null() for name in columns)
    faulty = table.frame.filter(pl.col("fault").is_not_null() | missing)
    if len(faulty):
        raise DataError(str(table.path), f"{len(faulty)} unreadable rows: {_show(faulty, table, columns[0])}", "a user_id in each")


def _write(frame: pl.DataFrame, target: Path) -> None:
    frame.sort("user_id").write_parquet(target, row_group_size=ROW_GROUP_ROWS)


def _existing(name: str, key: str) -> Path:
    if not Path(name).is_file():
        raise ConfigError(key, name, "a file that exists")
    return Path(name)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _column_names(path: Path) -> list[str]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        return pl.read_parquet_schema(path).names()
    if suffix in JSON_SUFFIXES:
        return json_lines.first_keys(path)
    if suffix not in SEPARATORS:
        raise ConfigError(HISTORIES_KEY, path.name, "a name that ends in .csv, .tsv, .parquet, .jsonl or .json, .gz allowed behind")
    with open_binary(path) as file:
        first = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    return next(csv.reader([first], delimiter=SEPARATORS[suffix]), [])

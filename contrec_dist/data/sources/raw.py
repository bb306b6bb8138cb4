"""What every reader returns: raw rows as text, and how to find a row again in its file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

import polars as pl

ITEM_COLUMNS = ("title", "category", "brand", "text")
Locator = Callable[[list[int]], list[str]]


@dataclass(kw_only=True, slots=True)
class RawTable:
    """Rows of one file, in the file's order.

    `frame` has `row` (int64, the record's 0-based place in the file), the named columns, and `fault` (why the reader
    could not read the row; null where it could). `locate` turns rows into texts like "reviews.json.gz:17".
    """

    frame: pl.DataFrame
    path: Path
    locate: Locator
    num_blank: int = 0


@dataclass(kw_only=True, slots=True)
class RawLogs:
    """Interactions and items as the source has them.

    `interactions` has user_id and item_id, and, where the source has them, time, order and rating.
    `items` has item_id and ITEM_COLUMNS; None where there is no item file.
    `further_rows`, where given, says that only the first-listed row of a (user, item) is an interaction, and under
    which reason the others are counted.
    """

    interactions: RawTable
    items: RawTable | None
    time_unit: Literal["auto", "s", "ms"] = "auto"
    further_rows: str = ""


def locate_by_line(path: Path, *, first_line: int) -> Locator:
    """Locator of a file that has one record a line, the first one on `first_line`."""
    return lambda rows: [f"{path}:{row + first_line}" for row in rows]


def locate_by_row(path: Path) -> Locator:
    """Locator of a file without lines (Parquet)."""
    return lambda rows: [f"{path} row {row}" for row in rows]

"""Canonical cleaning: raw rows to ordered, de-duplicated, k-core filtered interactions (stage prepare).

Guarantees: every row that is left out is counted under a reason; wrong rows are shown with file and line; the order
inside a user is by the order column where there is one, else by time, and ties keep the source's order; users and
items are numbered by first appearance among the readable rows of the interactions file. Cost: a few int64 columns and
one sort; 1 M rows take about a second; memory, while the ids are text and repeats are sought, 350 bytes a row.
"""

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from contrec_dist.config import SourceConfig
from contrec_dist.data.fields import clean_category, clean_text, parse_number, parse_time_ms
from contrec_dist.data.sources.raw import ITEM_COLUMNS, RawLogs, RawTable
from contrec_dist.errors import ConfigError, DataError

NUM_EXAMPLES = 10
BLANK = "blank row"


@dataclass(kw_only=True, slots=True)
class BadRows:
    """Wrong rows of one file: how many of how many, why, and the first ten of them."""

    num_rows: int
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass(kw_only=True, slots=True)
class CleanLogs:
    """Interactions in canonical form.

    `interactions` is [user_idx, item_idx, time_ms, time_known], sorted by user and then by the user's own order.
    `user_ids` and `item_ids` are indexed by those numbers. `items` is [item_id, title, category, brand, text] of the
    item file, or None. `drops` counts rows left out by reason, wrong ones included; `bad` holds the wrong ones.
    """

    interactions: pl.DataFrame
    user_ids: pl.Series
    item_ids: pl.Series
    items: pl.DataFrame | None
    drops: dict[str, int]
    bad: dict[str, BadRows]


def clean_logs(raw: RawLogs, source: SourceConfig) -> CleanLogs:
    """Bring raw logs into canonical form.

    Errors   DataError where more than max_bad_ratio of a file's rows are wrong (with counts and examples), or where
             nothing is left; ConfigError where min_rating is set and the source has no rating.
    """
    drops, bad, items = {}, {}, None
    if raw.items is not None:
        items = clean_items(raw.items, source.max_bad_ratio, drops, bad)
    rows = _parse_interactions(raw, source)
    rows = _mark_unknown_items(rows, items)
    rows = take_good_rows(rows, raw.interactions, "interactions", source.max_bad_ratio, drops, bad)
    rows = _take_first_listed(rows, raw.further_rows, drops)
    rows = _filter_rating(rows, source, drops).drop("fault", "rating")  # what follows copies the table several times
    rows, user_ids, item_ids = _number_ids(rows)
    rows = deduplicate(sort_by_user(rows).drop("row"), source.deduplicate, drops)
    users, items_seen = rows["user_idx"].to_numpy(), rows["item_idx"].to_numpy()
    keep = k_core_mask(users, items_seen, source.min_user_interactions, source.min_item_interactions)
    _count(drops, "k-core", len(rows) - int(keep.sum()))
    rows = rows.filter(pl.Series(keep))
    if rows.is_empty():
        raise DataError(str(raw.interactions.path), f"no interaction left after {_show_counts(drops)}", "at least one")
    user_idx, user_ids = _renumber(rows["user_idx"], user_ids)
    item_idx, item_ids = _renumber(rows["item_idx"], item_ids)
    rows = rows.with_columns(user_idx, item_idx).select("user_idx", "item_idx", "time_ms", "time_known")
    return CleanLogs(interactions=rows, user_ids=user_ids, item_ids=item_ids, items=items, drops=drops, bad=bad)


def clean_items(table: RawTable, max_bad_ratio: float, drops: dict[str, int], bad: dict[str, BadRows]) -> pl.DataFrame:
    """[item_id, title, category, brand, text], text cleaned, the first row of an item kept, further ones counted."""
    cleaners = {"category": clean_category}
    columns = [
        cleaners.get(name, clean_text)(table.frame[name]).alias(name)
        if name in table.frame.columns
        else pl.repeat("", len(table.frame), eager=True).alias(name)
        for name in ITEM_COLUMNS
    ]
    frame = table.frame.select("row", "fault", _clean_id("item_id")).with_columns(*columns)
    frame = frame.with_columns(_first_fault({"missing item id": pl.col("item_id").is_null()}))
    frame = take_good_rows(frame, table, "items", max_bad_ratio, drops, bad)
    first = frame.filter(pl.col("item_id").is_first_distinct())
    _count(drops, "items: further row of the same item", len(frame) - len(first))
    return first.select("item_id", *ITEM_COLUMNS)


def take_good_rows(
    rows: pl.DataFrame, table: RawTable, name: str, max_bad_ratio: float, drops: dict[str, int], bad: dict[str, BadRows]
) -> pl.DataFrame:
    """Rows without a fault; the others are counted in `drops` and described in `bad[name]`.

    Errors   DataError above max_bad_ratio, with the counts and the first ten rows.
    """
    _count(drops, f"{name}: {BLANK}", table.num_blank)
    wrong = rows.filter(pl.col("fault").is_not_null()).sort("row")
    counts = dict(sorted(wrong["fault"].value_counts().iter_rows()))
    shown = wrong.head(NUM_EXAMPLES)
    places = table.locate(shown["row"].to_list()) if len(shown) else []
    bad[name] = BadRows(
        num_rows=len(rows),
        counts=counts,
        examples=[f"{place}: {fault}" for place, fault in zip(places, shown["fault"])],
    )
    for fault, count in counts.items():
        _count(drops, f"{name}: {fault}", count)
    _check_bad_ratio(table, bad[name], max_bad_ratio)
    return rows.filter(pl.col("fault").is_null())


def sort_by_user(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows by user, inside a user by `order`, ties in the source's order."""
    return rows.sort("user_idx", "order", "row")


def deduplicate(rows: pl.DataFrame, kind: str, drops: dict[str, int]) -> pl.DataFrame:
    """Drop repeats from rows in the users' own order.

    'exact': of equal (user, item, time, place in the order) the first in the source stays. 'first': the first
    interaction of a user with an item stays. 'none': all stay.
    """
    if kind == "none":
        return rows
    keys = ["user_idx", "item_idx"] + (["time_ms", "order"] if kind == "exact" else [])
    kept = rows.unique(keys, keep="first", maintain_order=True)
    _count(drops, f"duplicate ({kind})", len(rows) - len(kept))
    return kept


def k_core_mask(users: np.ndarray, items: np.ndarray, min_user: int, min_item: int) -> np.ndarray:
    """The largest set of interactions in which every user has min_user of them and every item min_item.

    Shapes   users, items: (M,) int64 -> (M,) bool
    """
    kept = np.arange(len(users))
    while len(kept):
        user_counts, item_counts = np.bincount(users[kept]), np.bincount(items[kept])
        stays = (user_counts[users[kept]] >= min_user) & (item_counts[items[kept]] >= min_item)
        if stays.all():
            break
        kept = kept[stays]
    mask = np.zeros(len(users), dtype=bool)
    mask[kept] = True
    return mask


def _parse_interactions(raw: RawLogs, source: SourceConfig) -> pl.DataFrame:
    """[row, user_id, item_id, time_ms, time_known, order, rating, fault]."""
    frame = raw.interactions.frame
    faults = {"missing user id": pl.col("user_id").is_null(), "missing item id": pl.col("item_id").is_null()}
    columns = [pl.lit(None, dtype=pl.Int64).alias("time_ms"), pl.lit(None, dtype=pl.Float64).alias("rating")]
    if "time" in frame.columns:
        time = frame["time"] if frame["time"].dtype.is_temporal() else _null_if_empty(frame["time"])
        columns.append(parse_time_ms(time, raw.time_unit).alias("time_ms"))
        needed = "order" not in frame.columns
        faults["bad time"] = pl.col("time_ms").is_null() & pl.Series(time.is_not_null() | needed)
    if "order" in frame.columns:
        columns.append(parse_number(frame["order"]).alias("order"))
        faults["bad order"] = pl.col("order").is_null()
    if "rating" in frame.columns:
        columns.append(parse_number(frame["rating"]).alias("rating"))
        if source.min_rating is not None:
            faults["bad rating"] = pl.col("rating").is_null()
    rows = frame.select("row", "fault", _clean_id("user_id"), _clean_id("item_id"))
    for column in columns:
        rows = rows.with_columns(column)
    rows = rows.with_columns(pl.col("time_ms").is_not_null().alias("time_known"), _first_fault(faults))
    if "order" not in rows.columns:
        rows = rows.with_columns(pl.col("time_ms").alias("order"))
    return rows.with_columns(pl.col("time_ms").fill_null(0))


def _clean_id(name: str) -> pl.Expr:
    text = pl.col(name).cast(pl.String).str.strip_chars()
    return pl.when(text == "").then(None).otherwise(text).alias(name)


def _null_if_empty(column: pl.Series) -> pl.Series:
    if column.dtype != pl.String:
        return column
    return column.to_frame("time").select(pl.when(pl.col("time").str.strip_chars() != "").then("time"))["time"]


def _first_fault(faults: dict[str, pl.Expr]) -> pl.Expr:
    """The reader's fault, else the first of `faults` that holds."""
    named = [pl.when(wrong).then(pl.lit(reason)).otherwise(None) for reason, wrong in faults.items()]
    return pl.coalesce(pl.col("fault"), *named).alias("fault")


def _mark_unknown_items(rows: pl.DataFrame, items: pl.DataFrame | None) -> pl.DataFrame:
    if items is None:
        return rows
    known = pl.col("item_id").is_in(items["item_id"].implode())
    return rows.with_columns(_first_fault({"item not in the item file": ~known}))


def _take_first_listed(rows: pl.DataFrame, reason: str, drops: dict[str, int]) -> pl.DataFrame:
    """The first-listed row of every (user, item), where the format asks for it by naming a `reason`."""
    if not reason:
        return rows
    kept = rows.filter(pl.struct("user_id", "item_id").is_first_distinct())
    _count(drops, reason, len(rows) - len(kept))
    return kept


def _filter_rating(rows: pl.DataFrame, source: SourceConfig, drops: dict[str, int]) -> pl.DataFrame:
    if source.min_rating is None:
        return rows
    if rows["rating"].null_count() == len(rows):
        expected = "null: the source has no rating (see source.rating_column)"
        raise ConfigError("source.min_rating", source.min_rating, expected)
    kept = rows.filter(pl.col("rating") >= source.min_rating)
    _count(drops, f"rating below {source.min_rating:g}", len(rows) - len(kept))
    return kept


def _number_ids(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series, pl.Series]:
    """Replace ids by numbers in order of first appearance."""
    ids = {}
    for name, number in (("user_id", "user_idx"), ("item_id", "item_idx")):
        ids[name] = rows[name].unique(maintain_order=True)
        table = ids[name].to_frame().with_row_index(number).with_columns(pl.col(number).cast(pl.Int64))
        rows = rows.join(table, on=name, how="left", maintain_order="left").drop(name)
    return rows, ids["user_id"], ids["item_id"]


def _renumber(numbers: pl.Series, ids: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Close the gaps that filters left; the order of the numbers stays."""
    kept, dense = np.unique(numbers.to_numpy(), return_inverse=True)
    return pl.Series(numbers.name, dense.astype(np.int64)), ids.gather(kept)


def _count(drops: dict[str, int], reason: str, number: int) -> None:
    if number:
        drops[reason] = drops.get(reason, 0) + number


def _show_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} x {reason}" for reason, number in counts.items()) or "no drops"


def _check_bad_ratio(table: RawTable, bad: BadRows, max_bad_ratio: float) -> None:
    if bad.total <= max_bad_ratio * bad.num_rows:
        return
    examples = "".join(f"\n  {example}" for example in bad.examples)
    got = f"{bad.total} wrong rows of {bad.num_rows} ({_show_counts(bad.counts)})"
    expected = f"at most a share of {max_bad_ratio:g} (source.max_bad_ratio); the first:{examples}"
    raise DataError(str(table.path), got, expected)

"""Amazon reviews and metadata of 2014, 2018 and 2023: one object a line, plain or gz.

The release is seen from the field names. 2014 and 2018: reviewerID, asin, overall, unixReviewTime (seconds); metadata
asin, title, brand, description and `categories` (2014, a list of paths) or `category` (2018, one path). 2023: user_id,
parent_asin, rating, timestamp (milliseconds); metadata parent_asin, title, store, description, `categories` (one path).
Lines that are Python literals instead of JSON (2014) are read too. The rating-only CSV files are for kind 'table'.
"""

from pathlib import Path

from contrec_dist.config import Config
from contrec_dist.data.sources.json_lines import as_text, first_keys, read_fields, read_records
from contrec_dist.data.sources.raw import ITEM_COLUMNS, RawLogs, RawTable
from contrec_dist.data.sources.table import source_files as table_source_files
from contrec_dist.errors import DataError

REVIEW_FIELDS = {
    "s": {"user_id": "reviewerID", "item_id": "asin", "rating": "overall", "time": "unixReviewTime"},
    "ms": {"user_id": "user_id", "item_id": "parent_asin", "rating": "rating", "time": "timestamp"},
}


def source_files(config: Config) -> dict[str, Path]:
    """The review file and, if named, the metadata file."""
    return table_source_files(config)


def read(config: Config) -> RawLogs:
    """Read reviews and metadata of whichever release."""
    files = source_files(config)
    reviews_path = files["source.interactions_file"]
    unit = _time_unit(reviews_path)
    fields = REVIEW_FIELDS[unit]
    reviews = read_fields(reviews_path, list(fields.values()))
    reviews.frame = reviews.frame.rename({field: name for name, field in fields.items()})
    items = _read_metadata(files["source.items_file"]) if "source.items_file" in files else None
    return RawLogs(interactions=reviews, items=items, time_unit=unit)


def _time_unit(path: Path) -> str:
    """The release, as the unit of its times."""
    keys = first_keys(path)
    for unit, fields in REVIEW_FIELDS.items():
        if all(fields[name] in keys for name in ("user_id", "item_id", "time")):
            return unit
    expected = "reviewerID, asin, unixReviewTime (2014, 2018) or user_id, parent_asin, timestamp (2023)"
    raise DataError(str(path), f"fields {', '.join(keys)}", expected)


def _read_metadata(path: Path) -> RawTable:
    keys = first_keys(path)
    if not {"asin", "parent_asin"} & set(keys):
        raise DataError(str(path), f"fields {', '.join(keys)}", "asin (2014, 2018) or parent_asin (2023)")
    return read_records(path, ["item_id", *ITEM_COLUMNS], _item_values)


def _item_values(record: dict) -> list[str | None]:
    item_id = record.get("parent_asin") or record.get("asin")
    brand = record.get("brand") or record.get("store")
    values = [item_id, record.get("title"), _category(record), brand, record.get("description")]
    return [as_text(value) for value in values]


def _category(record: dict) -> str:
    """Paths: " > " between levels, " | " between alternatives."""
    levels = record.get("categories") or record.get("category") or record.get("main_category") or []
    if isinstance(levels, str):
        return levels
    paths = levels if levels and isinstance(levels[0], list) else [levels]
    return " | ".join(as_text(path, joiner=" > ") or "" for path in paths)

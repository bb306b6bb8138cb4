"""Values of raw columns: times, numbers and text made fit for a language model.

All are vectorised; only text that holds an HTML entity is touched one by one.
"""

import html
from typing import Literal

import polars as pl

from contrec_dist.errors import DataError

# Size of a typical time in seconds ends at 1e11 (the year 5138); each finer unit is a thousand times larger.
UNIT_LIMITS = ((1e11, 1e3), (1e14, 1.0), (1e17, 1e-3), (float("inf"), 1e-6))
ISO_FORMATS = ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%d %H:%M:%S%.f%#z")
NAIVE_FORMATS = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M")
LARGEST_TIME_MS = 2**53
INLINE_TAGS = r"(?i)</?(?:span|b|i|u|em|strong|font|a|small|sup|sub)(?:\s[^<>]*)?/?>"
BLOCK_TAGS = r"(?i)</?(?:p|br|div|ul|ol|li|h[1-6]|table|tr|td|hr|img)(?:\s[^<>]*)?/?>"


def parse_number(column: pl.Series) -> pl.Series:
    """float64, null where the value is no finite number."""
    number = column.cast(pl.Float64, strict=False) if column.dtype != pl.String else _number_of_text(column)
    return _null_where(number, ~number.is_finite())


def parse_time_ms(column: pl.Series, unit: Literal["auto", "s", "ms"] = "auto") -> pl.Series:
    """Milliseconds since 1970 (UTC where the text names no zone), null where the value is no time.

    Numbers are seconds, or finer units when the column's median says so; anything else is ISO text.
    """
    if column.dtype.is_temporal():
        return _epoch_ms(column)
    number = parse_number(column)
    number = number * _ms_factor(number, unit)
    number = _null_where(number, number.abs() > LARGEST_TIME_MS).round().cast(pl.Int64)
    if column.dtype != pl.String or number.null_count() == column.null_count():
        return number
    missing = number.is_null() & column.is_not_null()
    texts = column.filter(missing).unique()
    table = pl.DataFrame({"text": texts, "time": _parse_iso(texts)})
    found = column.to_frame("text").join(table, on="text", how="left", maintain_order="left")["time"]
    return number.zip_with(~missing, found)


def clean_text(column: pl.Series) -> pl.Series:
    """Text without HTML: entities unescaped (twice escaped ones too), tags removed, white space one blank."""
    text = column.cast(pl.String).fill_null("")
    escaped = text.filter(text.str.contains("&", literal=True)).unique()
    if len(escaped):
        plain = pl.Series([_unescape(value) for value in escaped], dtype=pl.String)
        text = text.replace(escaped, plain)
    text = text.str.replace_all(INLINE_TAGS, "").str.replace_all(BLOCK_TAGS, " ")
    return text.str.replace_all(r"[\s\x00-\x1f\x7f]+", " ").str.strip_chars()


def clean_category(column: pl.Series) -> pl.Series:
    """Clean text with the project's separators: " > " between levels, " | " between alternatives."""
    text = clean_text(column)
    return text.str.replace_all(r"\s*\|\s*", " | ").str.replace_all(r"\s*>\s*", " > ").str.strip_chars(" |>")


def _null_where(column: pl.Series, mask: pl.Series) -> pl.Series:
    empty = pl.Series([None], dtype=column.dtype).new_from_index(0, len(column))
    return empty.zip_with(mask.fill_null(False), column)


def _number_of_text(column: pl.Series) -> pl.Series:
    return column.str.strip_chars().cast(pl.Float64, strict=False)


def _ms_factor(number: pl.Series, unit: str) -> float:
    if unit != "auto":
        return {"s": 1e3, "ms": 1.0}[unit]
    typical = number.abs().median() or 0.0
    return next(factor for limit, factor in UNIT_LIMITS if typical < limit)


def _epoch_ms(column: pl.Series) -> pl.Series:
    if column.dtype in (pl.Time, pl.Duration):
        raise DataError(f"column {column.name}", str(column.dtype), "a date and time, or unix seconds")
    zone = getattr(column.dtype, "time_zone", None)
    column = column.dt.convert_time_zone("UTC") if zone else column
    return column.cast(pl.Datetime("ms")).dt.epoch("ms")


def _parse_iso(texts: pl.Series) -> pl.Series:
    """Milliseconds of ISO texts; the first format that fits decides."""
    text = texts.str.strip_chars().str.replace("Z$", "+00:00")
    result = pl.Series([None], dtype=pl.Int64).new_from_index(0, len(text))
    for form in (*ISO_FORMATS, *NAIVE_FORMATS):
        zone = "UTC" if form in ISO_FORMATS else None
        parsed = text.str.to_datetime(form, time_unit="ms", time_zone=zone, strict=False)
        result = result.zip_with(result.is_not_null(), _epoch_ms(parsed))
    days = text.str.to_date("%Y-%m-%d", strict=False)
    return result.zip_with(result.is_not_null(), _epoch_ms(days))


def _unescape(text: str) -> str:
    for _ in range(3):
        plain = html.unescape(text)
        if plain == text:
            break
        text = plain
    return text

"""Names of a streamed catalogue: titles, category paths, brands and descriptions by item number, vectorised.

Guarantees   a row depends on (settings, seed, item number) alone; titles name the product line and the adjective of the
             item's family; a model number or the colour and size tell the items of a family apart, nearly always.
Cost         about two microseconds an item.
"""

import numpy as np
import polars as pl

from contrec_dist.data.sources.generated_words import BRAND_SYLLABLES, CATEGORIES
from contrec_dist.data.sources.streamed_law import StreamedLaw, draw_uniform

DEPARTMENTS = {
    "Home & Kitchen": ("Coffee", "Baking"),
    "Sports & Outdoors": ("Running", "Cycling", "Camping", "Yoga", "Fishing"),
    "Garden & Pets": ("Gardening", "Aquarium", "Dog"),
    "Electronics": ("Photography", "Computing", "Astronomy"),
    "Beauty & Baby": ("Skin Care", "Baby"),
    "Arts & Hobbies": ("Board Games", "Guitar", "Painting", "Woodworking", "Knitting"),
}
SERIES = ("Pro", "Classic", "Essential", "Plus", "Studio", "Prime", "Heritage", "Active", "Nova", "Core", "Edge")
COLOURS = (
    "Black", "White", "Navy", "Forest Green", "Crimson", "Slate", "Sand", "Teal", "Copper", "Ivory", "Graphite", "Rust",
    "Sky Blue", "Olive", "Plum", "Mustard",
)  # fmt: skip
SIZES = ("Small", "Medium", "Large", "X-Large", "Set of 2", "Pack of 4", "Pack of 12", "Travel Size", "Compact", "XXL")
MATERIALS = ("aluminium", "stainless steel", "recycled plastic", "bamboo", "cotton", "oak", "silicone", "ceramic")
USES = ("for beginners", "for everyday use", "for professionals", "for the weekend", "as a gift", "for small spaces")
CARES = ("Easy to clean.", "Two-year warranty.", "Made to last.", "Ships flat.", "Tested by hand.", "Repairable.")
BRANDS_A_CATEGORY = 24
TEXT_RATIO = 0.8


def item_ids(items: np.ndarray) -> pl.Series:
    """"I" and ten digits. Shapes   (n,) -> (n,)"""
    return pl.select(pl.format("I{}", pl.Series(items).cast(pl.String).str.zfill(10)).alias("item_id")).to_series()


def user_ids(users: np.ndarray) -> pl.Series:
    """"U" and ten digits. Shapes   (n,) -> (n,)"""
    return pl.select(pl.format("U{}", pl.Series(users).cast(pl.String).str.zfill(10)).alias("user_id")).to_series()


def item_frame(law: StreamedLaw, start: int, stop: int) -> pl.DataFrame:
    """[item_id, title, category, brand, text] of the items start..stop."""
    items = np.arange(start, stop)
    family, rank = law.place_items(items)
    category, line, adjective = law.words_of_family[family].T
    pick = _Picker(law.settings.seed, items)
    words = pl.DataFrame({
        "item_id": item_ids(items),
        "category": _paths().gather(category * _MOST_WORDS + line),
        "line": _flatten(1).gather(category * _MOST_WORDS + line),
        "adjective": _flatten(2).gather(category * _MOST_WORDS + adjective),
        "brand": _brands().gather((category * 7 + pick.skewed(30, BRANDS_A_CATEGORY)) % len(_brands())),
        "series": pick.word(31, SERIES), "colour": pick.word(32, COLOURS), "size": pick.word(33, SIZES),
        "material": pick.word(34, MATERIALS), "use": pick.word(35, USES), "care": pick.word(36, CARES),
        "model": pl.Series(100 + rank), "shape": pick.number(37, 4), "told": pick.uniform(38) < TEXT_RATIO,
    })  # fmt: skip
    return words.select("item_id", _title(), "category", "brand", _text())


def _title() -> pl.Expr:
    """One of four shapes of a title."""
    numbered = pl.format("{} {} {} {}", "brand", "adjective", "line", "model")
    coloured = pl.format("{} {} {}, {}, {}, {}", "brand", "series", "line", "adjective", "colour", "size")
    turned = pl.format("{} {} by {} ({}, {}, {})", "adjective", "line", "brand", "material", "size", "colour")
    full = pl.format("{} {} {} {} {} - {}", "brand", "series", "model", "adjective", "line", "colour")
    shape = pl.col("shape")
    title = pl.when(shape == 0).then(numbered).when(shape == 1).then(coloured).when(shape == 2).then(turned)
    return title.otherwise(full).alias("title")


def _text() -> pl.Expr:
    described = pl.format("{} in {} {}. {}", "line", "material", "use", "care")
    return pl.when("told").then(described).otherwise(pl.lit("")).alias("text")


class _Picker:
    """Draws of words by item number."""

    def __init__(self, seed: int, items: np.ndarray):
        self.seed, self.items = seed, items

    def uniform(self, stream: int) -> np.ndarray:
        return draw_uniform(self.seed, stream, self.items)

    def number(self, stream: int, count: int) -> np.ndarray:
        return (self.uniform(stream) * count).astype(np.int64)

    def skewed(self, stream: int, count: int) -> np.ndarray:
        """Small numbers more often: a few brands have most of a category."""
        return (self.uniform(stream) ** 2 * count).astype(np.int64)

    def word(self, stream: int, words: tuple[str, ...]) -> pl.Series:
        return pl.Series(words).gather(self.number(stream, len(words)))


_MOST_WORDS = max(len(words.split("|")) for category in CATEGORIES for words in category[1:])


def _flatten(column: int) -> pl.Series:
    """Product lines (1) or adjectives (2) of all categories, _MOST_WORDS places each."""
    lists = [category[column].split("|") for category in CATEGORIES]
    return pl.Series([word for words in lists for word in words + [""] * (_MOST_WORDS - len(words))])


def _paths() -> pl.Series:
    """Department > category > product line, in the places of `_flatten(1)`."""
    department_of = {name: department for department, names in DEPARTMENTS.items() for name in names}
    names = [category[0] for category in CATEGORIES for _ in range(_MOST_WORDS)]
    return pl.Series([f"{department_of[name]} > {name} > {line}" for name, line in zip(names, _flatten(1))])


def _brands() -> pl.Series:
    starts, ends = BRAND_SYLLABLES
    return pl.Series([start + end for end in ends for start in starts])

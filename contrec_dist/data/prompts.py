"""What the LLM reads of a user, as positions and token numbers.

    marked   [instruction] [user tokens] (<item> z_1 .. z_K title) x history [response] <item>
    fused    [instruction] [user tokens] (z title) x history [response <item>]

Tokens stand before the title and the hidden state at `<item>` has seen only what came before it, so it is the condition
for generating that item. Fused, an item's K tokens are one position, a half to a third of the work: the condition is the
state at the position before the item, and `<item>` stands only after a response. The response names the category (and
brand) that the user leans to: the most frequent of the newest items of the history, never of the target. Used by training (packed) and by scoring (one user a row) alike.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from contrec_dist.config import PromptConfig
from contrec_dist.errors import ConfigError

LEANING_ITEMS = 10
RESPONSE_TEXTS = (" The user leans to ", ", brand ", ".")


@dataclass(frozen=True)
class Ragged:
    """Lists of token numbers laid end to end: row i is flat[offsets[i]:offsets[i + 1]]."""

    offsets: np.ndarray
    flat: np.ndarray

    @classmethod
    def from_lists(cls, lists: list[list[int]]) -> "Ragged":
        lengths = np.array([len(one) for one in lists], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.fromiter((token for one in lists for token in one), dtype=np.int64, count=int(offsets[-1]))
        return cls(offsets, flat)

    @classmethod
    def from_arrays(cls, arrays: list[np.ndarray]) -> "Ragged":
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in arrays])]).astype(np.int64)
        return cls(offsets, np.concatenate([*arrays, np.zeros(0, np.int64)]))

    def row(self, number: int) -> np.ndarray:
        return self.flat[self.offsets[number] : self.offsets[number + 1]]

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.offsets[rows + 1] - self.offsets[rows]


def leaf_category(category: str) -> str:
    """Last level of the first path: 'Beauty > Makeup > Nails | ...' -> 'Nails'."""
    return category.split("|")[0].split(">")[-1].split(",")[0].strip()


class PromptTexts:
    """Token numbers of every text of the catalogue, computed once, and the leaning of a history.

    Items without a category stand for themselves: their title takes the category's place.
    """

    def __init__(self, items: pl.DataFrame, tokenizer, config: PromptConfig):
        if config.max_response_tokens < 1:
            raise ConfigError("prompt.max_response_tokens", config.max_response_tokens, "at least 1, the end token")
        self.config = config
        self.end_token = int(tokenizer.eos_token_id)
        self._tokenizer, self._items = tokenizer, items.select("title", "category", "brand")
        self.instruction = np.array(self._encode([config.instruction])[0], dtype=np.int64)
        titled = config.titled_items != 0
        self.titles = Ragged.from_lists(
            [ids[: config.max_title_tokens] for ids in self._encode([" " + title for title in items["title"].to_list()])]
            if titled
            else [[]] * len(items)
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]

    @cached_property
    def _named_terms(self) -> tuple[np.ndarray, np.ndarray]:
        """Only what writes or reads texts asks for names: a million items take seconds."""
        pairs = zip(self._items["category"].to_list(), self._items["title"].to_list())
        return _name([leaf_category(category) or title for category, title in pairs])

    @cached_property
    def _named_brands(self) -> tuple[np.ndarray, np.ndarray]:
        return _name(self._items["brand"].to_list())

    @property
    def term_names(self) -> np.ndarray:
        """Different terms, sorted."""
        return self._named_terms[0]

    @property
    def term_of_item(self) -> np.ndarray:
        """(N,) number of each item's term."""
        return self._named_terms[1]

    @property
    def brand_names(self) -> np.ndarray:
        """Different brands, sorted."""
        return self._named_brands[0]

    @property
    def brand_of_item(self) -> np.ndarray:
        """(N,) number of each item's brand."""
        return self._named_brands[1]

    @cached_property
    def _terms(self) -> list[list[int]]:
        return self._encode(list(self.term_names))

    @cached_property
    def _brands(self) -> list[list[int]]:
        return self._encode(list(self.brand_names))

    @cached_property
    def _pieces(self) -> list[list[int]]:
        return self._encode(list(RESPONSE_TEXTS))

    def item_layout(self, num_item_tokens: int) -> "ItemLayout":
        """How items stand in the prompt of this config."""
        return ItemLayout.of(self.config, num_item_tokens)

    def leaning(self, recent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Most frequent term and brand of the newest items, ties to the newer; brand -1 unless it appears twice.

        Shapes   recent (n, LEANING_ITEMS) item numbers, oldest first, -1 where there is none -> (n,), (n,)
        """
        there = recent >= 0
        term = _majority(np.where(there, self.term_of_item[recent], -1), minimum=1)
        named = there & (self.brand_names[self.brand_of_item[recent]] != "")
        brand = _majority(np.where(named, self.brand_of_item[recent], -1), minimum=2)
        return term, brand

    def response_tokens(self, term: int, brand: int) -> np.ndarray:
        """Token numbers of the reasoning text with its end token, at most max_response_tokens."""
        ids = [*self._pieces[0], *self._terms[term]]
        if brand >= 0:
            ids += [*self._pieces[1], *self._brands[brand]]
        ids += self._pieces[2]
        return np.array([*ids[: self.config.max_response_tokens - 1], self.end_token], dtype=np.int64)

    def response_lengths(self, term: np.ndarray, brand: np.ndarray) -> np.ndarray:
        """Lengths of response_tokens for arrays, 0 where term is -1. (n,), (n,) -> (n,)."""
        term_lengths = np.array([len(ids) for ids in self._terms])
        brand_lengths = np.array([len(ids) for ids in self._brands])
        length = len(self._pieces[0]) + term_lengths[term] + len(self._pieces[2])
        length = length + np.where(brand >= 0, len(self._pieces[1]) + brand_lengths[brand], 0)
        return np.where(term >= 0, np.minimum(length, self.config.max_response_tokens - 1) + 1, 0)


def _name(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Different texts, sorted, and the number of each one's."""
    return np.unique(np.array(texts, dtype=object).astype(str), return_inverse=True)


def _majority(values: np.ndarray, minimum: int) -> np.ndarray:
    """Most frequent non-negative value of each row, ties to the rightmost, -1 below `minimum` appearances."""
    counts = (values[:, :, None] == values[:, None, :]).sum(-1)  # (n, w)
    counts = np.where(values >= 0, counts, 0)
    width = values.shape[1]
    best = width - 1 - counts[:, ::-1].argmax(axis=1)
    rows = np.arange(len(values))
    return np.where(counts[rows, best] >= minimum, values[rows, best], -1)


@dataclass(frozen=True)
class ItemLayout:
    """Positions that an item's marker and continuous tokens take; works on numbers and on arrays of them."""

    fused: bool
    num_item_tokens: int

    @classmethod
    def of(cls, config: PromptConfig, num_item_tokens: int) -> "ItemLayout":
        return cls(config.item_layout == "fused", num_item_tokens)

    @property
    def size(self) -> int:
        return 1 if self.fused else 1 + self.num_item_tokens

    def slots(self, starts: np.ndarray) -> np.ndarray:
        """Positions of the continuous tokens of items that begin at `starts`: (n,) -> (n, K), fused (n, 1)"""
        return starts[:, None] if self.fused else starts[:, None] + 1 + np.arange(self.num_item_tokens)

    def conditions(self, starts: np.ndarray) -> np.ndarray:
        """Positions at which items that begin at `starts` are generated. (n,) -> (n,)"""
        return starts - 1 if self.fused else starts

    def markers(self, starts: np.ndarray) -> np.ndarray:
        """Positions of the `<item>` of items that begin at `starts`. (n,) -> (n,), fused (0,)"""
        return starts[:0] if self.fused else starts

    def count_final_markers(self, response_lengths):
        """1 where an `<item>` ends the sample. Fused, it is read at its last item where no response follows."""
        return np.where(response_lengths > 0, 1, 0) if self.fused else np.ones_like(response_lengths)


@dataclass(frozen=True)
class SampleLayout:
    """Positions of one sample's parts, counted from its first position."""

    length: int
    tokens: np.ndarray
    "(length,) text token numbers, 0 where something continuous stands"
    markers: np.ndarray
    "positions of `<item>`, oldest first; the last one is the final target's where there is a final marker"
    conditions: np.ndarray
    "positions at which each item and, last where there is a final marker, the final target are generated"
    slots: np.ndarray
    "(items, K) positions of the items' continuous tokens; fused (items, 1)"
    user_slots: np.ndarray
    "(K,) or (0,) positions of the user's continuous tokens"
    response_start: int
    "position of the first response token"
    response: np.ndarray
    "response token numbers"


def lay_out(
    texts: PromptTexts, inputs: np.ndarray, *, num_item_tokens: int, num_user_tokens: int,
    response: np.ndarray, with_final_marker: bool,
) -> SampleLayout:
    """Positions of a sample whose history is `inputs` (item numbers, oldest first).

    The length is len(instruction) + num_user_tokens + sum(item + title) + len(response) + final marker.
    """
    head, item = len(texts.instruction), texts.item_layout(num_item_tokens)
    title_lengths = input_title_lengths(texts, inputs)
    ends = np.cumsum(item.size + title_lengths)
    starts = head + num_user_tokens + ends - (item.size + title_lengths)
    response_start = head + num_user_tokens + (int(ends[-1]) if len(ends) else 0)
    num_final = int(item.count_final_markers(np.int64(len(response)))) if with_final_marker else 0
    length = response_start + len(response) + num_final
    tokens = np.zeros(length, dtype=np.int64)
    tokens[:head] = texts.instruction
    tokens[response_start : response_start + len(response)] = response
    for place in np.nonzero(title_lengths)[0]:
        title_start = starts[place] + item.size
        tokens[title_start : title_start + title_lengths[place]] = texts.titles.row(inputs[place])
    final = np.array([length - 1])
    return SampleLayout(
        length=length,
        tokens=tokens,
        markers=np.append(item.markers(starts), final[:num_final]),
        conditions=np.append(item.conditions(starts), final[: int(with_final_marker)]),
        slots=item.slots(starts),
        user_slots=head + np.arange(num_user_tokens),
        response_start=response_start,
        response=response,
    )


def input_title_lengths(texts: PromptTexts, inputs: np.ndarray) -> np.ndarray:
    """Title tokens written out after each input item: those of the newest `titled_items` (-1: all). (n,) -> (n,)."""
    lengths = texts.titles.lengths(inputs)
    if texts.config.titled_items >= 0:
        lengths = np.where(np.arange(len(inputs)) >= len(inputs) - texts.config.titled_items, lengths, 0)
    return lengths

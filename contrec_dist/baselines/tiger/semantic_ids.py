"""Semantic ids: an item as a few tokens, unique, each level with vocabulary entries of its own; and the trie of all of them.

The last level tells apart the items whose learned codes are equal, in the order of item_idx. The trie is a sorted table:
what may follow a prefix is one range of rows, so a search asks for the children of thousands of beams with two gathers.

Cost   building: one sort of the catalogue; memory: a few integers a prefix. 1M items: about a second.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contrec_dist.errors import DataError

START_TOKEN = 0  # in front of every history


@dataclass(frozen=True)
class SemanticIds:
    """Codes of every item and how they are numbered as tokens.

    Shapes   codes (N, L) int64, unique rows; sizes: L numbers of codes
    """

    codes: np.ndarray
    sizes: tuple[int, ...]

    @classmethod
    def from_learned(cls, learned: np.ndarray, num_codes: int) -> "SemanticIds":
        """Add the level that tells items of equal codes apart. Shapes   learned (N, L - 1)"""
        return cls.from_codes(np.concatenate([learned, _number_repeats(learned)[:, None]], axis=1), num_codes)

    @classmethod
    def from_codes(cls, codes: np.ndarray, num_codes: int) -> "SemanticIds":
        """From complete ids. Errors   DataError when two items share one or a code is out of range"""
        codes = np.ascontiguousarray(codes, dtype=np.int64)
        if len(codes) == 0 or codes.min() < 0 or codes[:, :-1].max(initial=0) >= num_codes:
            raise DataError("semantic ids", f"{len(codes)} items or a code out of range", f"items, codes 0 to {num_codes - 1}")
        if len(np.unique(codes, axis=0)) != len(codes):
            raise DataError("semantic ids", "items that share one", "one id an item")
        return cls(codes, (*[num_codes] * (codes.shape[1] - 1), int(codes[:, -1].max()) + 1))

    @property
    def num_levels(self) -> int:
        """L, the level of repeats included."""
        return len(self.sizes)

    @property
    def offsets(self) -> np.ndarray:
        """(L,) token of each level's code 0."""
        return START_TOKEN + 1 + np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens in use: the start token and every level's codes."""
        return START_TOKEN + 1 + sum(self.sizes)

    @property
    def tokens(self) -> np.ndarray:
        """(N, L) int64: items as tokens."""
        return self.codes + self.offsets

    def describe(self) -> dict:
        """Facts for the manifest: how many items share their learned codes."""
        repeats = self.codes[:, -1]
        return {"sizes": list(self.sizes), "collision_rate": round(float((repeats > 0).mean()), 6)}


class CodeTrie:
    """Every prefix of every id, level by level; prefix p of level l has children in a range of level l's table.

    `code[l]` (P_l,): last code of each prefix of l + 1 codes; `first_child[l]` (P_{l-1} + 1,): where the children of each
    shorter prefix start in it; `widest[l]`: the most children there are; `item` (N,): item of each complete id.
    """

    def __init__(self, ids: SemanticIds, device: torch.device | str = "cpu"):
        order = np.lexsort(ids.codes.T[::-1])
        table = ids.codes[order]
        changed = np.zeros(len(table), dtype=bool)
        changed[0] = True
        parents = np.zeros(1, dtype=np.int64)  # rows where a prefix starts; the empty prefix starts at row 0
        self.code: list[Tensor] = []
        self.first_child: list[Tensor] = []
        self.widest: list[int] = []
        for column in table.T:
            changed[1:] |= column[1:] != column[:-1]
            starts = np.flatnonzero(changed)
            first = np.append(np.searchsorted(starts, parents), len(starts))
            self.code.append(torch.from_numpy(column[starts].copy()).to(device))
            self.first_child.append(torch.from_numpy(first).to(device))
            self.widest.append(int(np.diff(first).max()))
            parents = starts
        self.item = torch.from_numpy(order).to(device)

    def children(self, level: int, prefixes: Tensor) -> tuple[Tensor, Tensor]:
        """Prefixes of level `level` that continue those given of the level before (0 at level 0), and which are real.

        Shapes   prefixes (...) -> children (..., widest) int64, real (..., widest) bool; what is not real is some valid number
        """
        first, end = self.first_child[level][prefixes], self.first_child[level][prefixes + 1]
        found = first[..., None] + torch.arange(self.widest[level], device=first.device)
        real = found < end[..., None]
        return torch.where(real, found, first[..., None]), real


def _number_repeats(codes: np.ndarray) -> np.ndarray:
    """(N, L) -> (N,): 0 for the first item of its codes, 1 for the second, and so on."""
    order = np.lexsort(codes.T[::-1])  # stable: equal codes stay in the order of item_idx
    new = np.ones(len(codes), dtype=bool)
    new[1:] = (codes[order][1:] != codes[order][:-1]).any(axis=1)
    starts = np.flatnonzero(new)
    numbers = np.empty(len(codes), dtype=np.int64)
    numbers[order] = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    return numbers

"""Packed training batches of semantic ids: the same windows and targets as the model's own training, four tokens an item.

A sample is [start] + the tokens of items[start : stop] less the last one; every item after the window's first is a target,
with all its tokens. Rows hold several samples one after another; the mask lets a position see its own sample alone, so
packing changes no result. An epoch's rows are a function of (seed, epoch).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contrec_dist.baselines.tiger.semantic_ids import SemanticIds
from contrec_dist.baselines.tiger.sequence_model import first_tokens
from contrec_dist.data.catalog import Histories
from sharding.partition import cut_windows, pack_rows


@dataclass(frozen=True)
class TokenBatch:
    """R rows of W positions; targets are P items.

    Shapes   tokens, segments, places (R, W) int64 (segment 0 is padding); positions (P, L) int64 flat, row * W + place, of the
             positions whose next token is codes (P, L) int64
    """

    tokens: Tensor
    segments: Tensor
    places: Tensor
    positions: Tensor
    codes: Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class TokenRows:
    """The training windows of a catalogue as rows of tokens."""

    def __init__(
        self, histories: Histories, ids: SemanticIds, *, max_history: int, row_tokens: int, user_buckets: int, seed: int
    ):
        """`row_tokens` is raised to the longest sample. Windows are those of the model: sharding.partition.cut_windows."""
        self.histories, self.ids, self.seed, self.user_buckets = histories, ids, seed, user_buckets
        self.item_tokens = ids.tokens
        self.user, self.start, self.stop = cut_windows(histories.num_train, max_history)
        self.lengths = (self.stop - self.start) * ids.num_levels  # the start token in, the last token out
        self.row_tokens = max(row_tokens, int(self.lengths.max(initial=0)))

    @property
    def num_targets(self) -> int:
        """Items that an epoch trains on."""
        return int((self.stop - self.start - 1).sum())

    def plan(self, epoch: int, rows_per_batch: int) -> list[list[np.ndarray]]:
        """Rows of sample numbers of every batch of an epoch, in training order; the last may have fewer."""
        rng = np.random.default_rng([self.seed, epoch])
        samples = rng.permutation(len(self.user))
        rows = [samples[row] for row in pack_rows(self.lengths[samples], self.row_tokens)]
        order = rng.permutation(len(rows))
        starts = range(0, len(order), rows_per_batch)
        return [[rows[place] for place in order[start : start + rows_per_batch]] for start in starts]

    def build(self, rows: list[np.ndarray]) -> TokenBatch:
        """Tensors of the given rows of sample numbers."""
        shape, levels = (len(rows), self.row_tokens), np.arange(self.ids.num_levels)
        tokens, segments, places = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        positions, codes = [np.zeros((0, len(levels)), np.int64)], [np.zeros((0, len(levels)), np.int64)]
        for row, samples in enumerate(rows):
            at = 0
            for number, sample in enumerate(samples, start=1):
                user, length = int(self.user[sample]), int(self.lengths[sample])
                items = self.histories.history(user)[self.start[sample] : self.stop[sample]]
                span = slice(at, at + length)
                tokens[row, at] = first_tokens(self.ids, np.array([user]), self.user_buckets)[0]
                tokens[row, at + 1 : at + length] = self.item_tokens[items].ravel()[:-1]
                segments[row, span], places[row, span] = number, np.arange(length)
                target = np.arange(1, len(items))[:, None]
                positions.append(row * self.row_tokens + at + target * len(levels) + levels)
                codes.append(self.ids.codes[items[1:]])
                at += length
        arrays = (tokens, segments, places, np.concatenate(positions), np.concatenate(codes))
        return TokenBatch(*map(torch.from_numpy, arrays))

"""Training batches: windows of the training histories, packed into rows, so that little is padded.

The windows are those of the model's own training (sharding.partition.cut_windows): every item after a user's first is a
target exactly once. An optimizer step takes windows at random until they hold `batch_targets` targets and packs them; a
place sees its own window alone, so packing changes no result. The steps of an epoch are a function of
(seed, epoch).
"""

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from contrec_dist.data.catalog import Histories
from contrec_dist.model.packed_attention import PackedSpans
from sharding.partition import cut_windows, pack_rows

ROW_ITEMS = 128  # places of a row, fewest; two of the longest windows fit into one


@dataclass(frozen=True)
class Batch:
    """R rows of W places, and what follows each of the T items that stand in them, row after row.

    Shapes   inputs, segments, ages (R, W) int64: the item, the number of its window in the row (0: padding), and how many
             items of its window came after it; targets (T,) int64
    """

    inputs: Tensor
    segments: Tensor
    ages: Tensor
    targets: Tensor

    @property
    def real(self) -> Tensor:
        """Where an item stands. (R, W) bool"""
        return self.segments > 0

    @property
    def spans(self) -> PackedSpans:
        """Where the windows lie: a place sees itself and the earlier places of its own."""
        return PackedSpans.of(self.segments)

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Windows:
    """The training windows of a catalogue, in steps."""

    def __init__(self, histories: Histories, *, max_history: int, batch_targets: int, seed: int):
        self.items, self.batch_targets, self.seed = histories.items, batch_targets, seed
        self.row_items = max(ROW_ITEMS, 2 * max_history)
        user, start, stop = cut_windows(histories.num_train, max_history)
        self.first, self.lengths = histories.offsets[user] + start, stop - start - 1

    @property
    def num_targets(self) -> int:
        """Items that an epoch trains on."""
        return int(self.lengths.sum())

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Window numbers of every step of an epoch, in order."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
        ends = np.cumsum(self.lengths[order])
        cuts = np.searchsorted(ends, np.arange(self.batch_targets, self.num_targets, self.batch_targets))
        return [step for step in np.split(order, np.unique(cuts)) if len(step)]

    def build(self, windows: np.ndarray) -> Batch:
        """The batch of a step."""
        rows = pack_rows(self.lengths[windows], self.row_items)
        inputs, segments, ages = (np.zeros((len(rows), self.row_items), dtype=np.int64) for _ in range(3))
        targets = []
        for row, places in enumerate(rows):
            at = 0
            for number, window in enumerate(windows[places], start=1):
                first, length = self.first[window], self.lengths[window]
                span = slice(at, at + length)
                inputs[row, span], segments[row, span] = self.items[first : first + length], number
                ages[row, span] = np.arange(length - 1, -1, -1)
                targets.append(self.items[first + 1 : first + length + 1])
                at += length
        return Batch(*map(torch.from_numpy, (inputs, segments, ages, np.concatenate(targets))))


def pad_newest(histories: Sequence[np.ndarray], max_history: int) -> tuple[Tensor, Tensor]:
    """The newest items of histories, padded on the right with item 0. -> inputs (B, H) int64, lengths (B,) int64"""
    newest = [history[-max_history:] for history in histories]
    lengths = np.array([len(one) for one in newest], dtype=np.int64)
    inputs = np.zeros((len(newest), lengths.max(initial=0)), dtype=np.int64)
    inputs[np.arange(inputs.shape[1]) < lengths[:, None]] = np.concatenate(newest)
    return torch.from_numpy(inputs), torch.from_numpy(lengths)

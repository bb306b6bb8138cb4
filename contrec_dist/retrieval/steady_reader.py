"""A HistoryReader whose matrix products have few different sizes: what reading millions of users in one process needs.

oneDNN generates machine code for every size of a matrix product that it meets, and keeps it. Batches of users differ in
their rows, width and items, so nearly every batch brought new sizes: a third of the model's time went into code, and the
process grew by some kilobytes a user. Here rows, width and items are filled up to one of 16 sizes an octave.

Guarantees   nobody's condition depends on what is filled in: no real position looks at it.
Cost         at most a sixteenth of each size more work, a thirty-second on average.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from contrec_dist.model.backbone import causal_lm
from contrec_dist.model.history_reader import HistoryBatch, HistoryReader, Reading, lay_out_batch
from contrec_dist.model.last_position import read_last_positions

SIZES_PER_OCTAVE = 16


def round_up(size: int) -> int:
    """The next of few sizes: every one up to 32, then every second up to 64, every fourth up to 128 and so on."""
    step = max(1, 2 ** ((max(size, 1) - 1).bit_length() - 1) // SIZES_PER_OCTAVE)
    return -(-size // step) * step


def fill_rows(rows: Tensor) -> Tensor:
    """The rows, and zeros below them up to the next of few sizes."""
    return functional.pad(rows, (*[0, 0] * (rows.ndim - 1), 0, round_up(len(rows)) - len(rows)))


class SteadyReader(HistoryReader):
    """The conditions of HistoryReader; where a text is written, it is that reader."""

    @torch.no_grad()
    def read(self, histories: HistoryBatch, *, reasoning: bool) -> Reading:
        if reasoning:
            return super().read(histories, reasoning=True)
        count, histories = len(histories), _fill_users(histories)
        num_tokens = self.model.latent_mean.shape[0]
        layout = lay_out_batch(
            self.texts, histories.items, histories.offsets, num_item_tokens=num_tokens,
            num_user_tokens=num_tokens if histories.user_latents is not None else 0, with_final_marker=True, pad_left=False,
        )  # fmt: skip
        with self.model.autocast(self.device):
            embeddings = functional.pad(self._embed(histories, layout), (0, 0, 0, round_up(layout.width) - layout.width))
            last = torch.from_numpy(layout.last % layout.width).to(self.device)
            condition = read_last_positions(causal_lm(self.model.backbone).base_model, embeddings, last)
        return Reading(condition[:count].float(), [""] * count)

    def _fill(self, rows: Tensor) -> Tensor:
        return fill_rows(rows)


def _fill_users(histories: HistoryBatch) -> HistoryBatch:
    """Users with empty histories behind the others."""
    missing, users = round_up(len(histories)) - len(histories), histories.user_latents
    return replace(
        histories,
        offsets=np.concatenate([histories.offsets, np.repeat(histories.offsets[-1:], missing)]),
        user_latents=None if users is None else np.concatenate([users, np.zeros((missing, *users.shape[1:]), users.dtype)]),
    )

"""The tensors of one packed micro-batch: what the loader hands to the model."""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass(kw_only=True)
class PackedBatch:
    """One micro-batch of R rows of L positions; positions below are flat, row * L + place.

    Shapes   tokens, segments, places (R, L) int64 (segment 0 is padding);
             slots (I, K), fused (I, 1), and item_idx (I,), latents (I, K, Z) of the I history items;
             markers (M,); targets (P,) positions at which the targets are generated, target_idx (P,), target_latents (P, K, Z);
             user_slots (V, K), user_latents (V, K, Z); text_positions (Q,) whose next token is text_labels (Q,);
             skipped_shards (S,) int64: the shards of samples that are missing because they could not be read
    """

    tokens: Tensor
    segments: Tensor
    places: Tensor
    slots: Tensor
    item_idx: Tensor
    latents: Tensor
    markers: Tensor
    targets: Tensor
    target_idx: Tensor
    target_latents: Tensor
    user_slots: Tensor
    user_latents: Tensor
    text_positions: Tensor
    text_labels: Tensor
    skipped_shards: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def to(self, device: torch.device) -> "PackedBatch":
        return PackedBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

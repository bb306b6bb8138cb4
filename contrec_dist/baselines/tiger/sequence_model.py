"""The causal LM of TIGER: the project's own backbone over semantic ids, each level with output logits of its own.

log p(item | history) is the sum of its tokens' log-probabilities, a softmax over the codes of each level.
"""

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrec_dist.baselines.tiger.semantic_ids import START_TOKEN, SemanticIds
from contrec_dist.config import BackboneConfig
from contrec_dist.model.backbone import causal_lm, has_fast_bf16, load_backbone
from contrec_dist.model.dropout import dropout
from contrec_dist.model.packed_attention import PACKED, PackedSpans


class SequenceModel(nn.Module):
    """Tokens of a history -> hidden states -> logits of the next code."""

    def __init__(self, backbone: BackboneConfig, ids: SemanticIds, *, user_buckets: int = 0, dropout: float = 0.0):
        super().__init__()
        self.offsets, self.sizes, self.dropout = ids.offsets.tolist(), ids.sizes, dropout
        self.precision = backbone.precision
        self.backbone = load_backbone(backbone, ids.num_tokens + user_buckets)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def read(self, tokens: Tensor, *, mask: Tensor | None, places: Tensor, cache=None, **kernel) -> Tensor:
        """Hidden states. mask: (B, 1, new, total) bool, True where a position is seen; None: all earlier ones.
        `kernel`: what the attention kernel of packed rows needs instead.

        Shapes   tokens, places (B, new) int64 -> (B, new, D)
        """
        lm = causal_lm(self.backbone)
        inputs = dropout(lm.get_input_embeddings()(tokens), self.dropout, self.training)
        hidden = lm.base_model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=cache is not None,
            **kernel,
        ).last_hidden_state
        return dropout(hidden, self.dropout, self.training)

    def logits(self, hidden: Tensor, level: int) -> Tensor:
        """Scores of the codes of one level. (..., D) -> (..., codes) float32"""
        start = self.offsets[level]
        table = causal_lm(self.backbone).get_output_embeddings().weight[start : start + self.sizes[level]]
        return F.linear(hidden, table).float()

    def loss(self, batch) -> Tensor:
        """Mean cross-entropy of the targets' tokens, in nats. Shapes   batch: TokenBatch -> ()"""
        hidden = self.read(batch.tokens, places=batch.places, **self._packed_attention(batch.segments))  # (R, W, D)
        chosen = hidden.flatten(0, 1)[batch.positions]  # (P, L, D)
        losses = [
            F.cross_entropy(self.logits(chosen[:, level], level), batch.codes[:, level])
            for level in range(len(self.sizes))
        ]
        return torch.stack(losses).mean()

    def _packed_attention(self, segments: Tensor) -> dict:
        """What keeps the samples of a row apart: their spans, or a mask, by the backbone's kernel. (R, W)"""
        if causal_lm(self.backbone).config._attn_implementation != PACKED:
            return {"mask": (segments[:, :, None] == segments[:, None, :]).tril()[:, None]}
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=segments.device)  # else transformers makes a causal one
        return {"mask": unused, "packed_spans": PackedSpans.of(segments)}

    def autocast(self):
        """bf16 matrix products where the config and the hardware say so, as the model's."""
        wanted = self.precision
        if wanted == "bf16" or (wanted == "auto" and has_fast_bf16(self.device)):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def first_tokens(ids: SemanticIds, users: np.ndarray, user_buckets: int) -> np.ndarray:
    """What stands in front of a history: the start token, or the token of the user's hash bucket.

    Shapes   users (B,) int64 user_idx -> (B,) int64
    """
    if not user_buckets:
        return np.full(len(users), START_TOKEN, dtype=np.int64)
    mixed = (np.asarray(users, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)
    return ids.num_tokens + (mixed % np.uint64(user_buckets)).astype(np.int64)

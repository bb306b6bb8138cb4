"""Attention inside the samples of packed rows, computed sample by sample instead of over whole rows with a mask.

A row of 256 positions holds ten users of 25: a masked kernel works on 256 x 256 scores to keep a tenth of them. Here the
samples are gathered by similar length, each group is one small causal attention, and the results go back to their places.
Cost     sum of length^2 over the samples (rounded up to the longest of their group) instead of rows * row_tokens^2.
         On CPUs also free of the fused kernel's fixed cost, which is what decides at these lengths.
Use      transformers calls it for `attn_implementation=PACKED`, SASRec calls `attend_spans`; spans reach it as the keyword
         `packed_spans` of the model's forward. Without spans (reading with a KV cache) it is torch's scaled_dot_product_attention with the mask given.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from contrec_dist.model.dropout import dropout as drop

PACKED = "contrec_packed"
SHORTEST_GROUP = 16
LONGEST_BY_HAND = 64  # up to here products by hand are faster than CPUs' fused kernel in fp32; in bf16 they are at every length
CACHED_SCORES = 1 << 19  # scores that products by hand make at a time on a CPU: 2 MiB of fp32 stay in a core's caches
QUERY_BLOCK = 256  # positions whose scores are computed together; keys behind the block are left out


@dataclass(frozen=True)
class SpanGroup:
    """Samples of similar length.

    Shapes   gather (n * longest,) flat positions, padding repeats position 0; real (m,) rows of the gathered that are no
             padding
    """

    longest: int
    gather: Tensor
    real: Tensor


@dataclass(frozen=True)
class PackedSpans:
    """The samples of a micro-batch in groups; `positions` (M,) flat positions of all real rows, group after group."""

    groups: list[SpanGroup]
    positions: Tensor

    @classmethod
    def of(cls, segments: Tensor) -> "PackedSpans":
        """Where samples lie: `segments` (R, L) numbers a row's samples from 1, 0 is padding."""
        row_tokens = segments.shape[1]
        rows = torch.arange(len(segments), device=segments.device)[:, None]
        sample = torch.where(segments > 0, rows * (row_tokens + 1) + segments, 0).flatten()
        names, length = torch.unique_consecutive(sample, return_counts=True)
        start = length.cumsum(0) - length
        start, length = start[names > 0], length[names > 0]
        groups, below, limit = [], 0, SHORTEST_GROUP
        while len(length) and below < int(length.max()):
            chosen = (length > below) & (length <= limit)
            if chosen.any():
                groups.append(cls._group(start[chosen], length[chosen]))
            below, limit = limit, 2 * limit
        positions = [group.gather[group.real] for group in groups]
        return cls(groups, torch.cat(positions) if positions else sample[:0])

    @staticmethod
    def _group(start: Tensor, length: Tensor) -> SpanGroup:
        longest = int(length.max())
        place = torch.arange(longest, device=start.device)
        real = (place[None] < length[:, None]).flatten()
        gather = torch.where(real, (start[:, None] + place[None]).flatten(), 0)
        return SpanGroup(longest, gather, real.nonzero()[:, 0])


@dataclass(frozen=True)
class PaddedRows:
    """Instead of spans, where nothing is learned: every row is one sample from its first position on.

    Layer `last_layer` computes position last[b] of row b alone, and returns it at every position. Shapes   last (B,) int64
    """

    last: Tensor
    last_layer: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The query scaled. (B, heads, L, d) -> (B, heads, L, d)"""
        query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings left them in fp32
        length, rows = query.shape[2], torch.arange(len(query), device=query.device)
        if layer == self.last_layer:
            one = query[rows, :, self.last][:, :, None]  # (B, heads, 1, d)
            later = torch.arange(length, device=query.device) > self.last[:, None]  # (B, L)
            scores = torch.matmul(one, key.transpose(-1, -2)).masked_fill_(later[:, None, None], -torch.inf)
            return torch.matmul(torch.softmax(scores, dim=-1), value).expand(query.shape)
        if length > LONGEST_BY_HAND or query.dtype == torch.float32:
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        causal = torch.full((length, length), -torch.inf, device=query.device, dtype=query.dtype).triu(1)
        scores = torch.matmul(query, key.transpose(-1, -2)).add_(causal)  # (B, heads, L, L)
        return torch.matmul(torch.softmax(scores, dim=-1), value)


def packed_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, packed_spans: PackedSpans | PaddedRows | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention inside every span; padding gets zeros.

    Shapes   query (R, heads, L, d), key, value (R, key heads, L, d) -> (R, L, heads, d)
    """
    if packed_spans is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    repeats = query.shape[1] // key.shape[1]
    query = query * (query.shape[3] ** -0.5 if scaling is None else scaling)
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    if isinstance(packed_spans, PaddedRows):
        return packed_spans.attend(module.layer_idx, query, key, value).transpose(1, 2), None
    return attend_spans(query, key, value, packed_spans, dropout=dropout), None


def attend_spans(query: Tensor, key: Tensor, value: Tensor, spans: PackedSpans, *, dropout: float = 0.0) -> Tensor:
    """Causal attention inside every span, the query scaled; padding gets zeros. (R, heads, L, d) each -> (R, L, heads, d)"""
    num_rows, num_heads, row_tokens, head_dim = query.shape
    flat = [one.transpose(1, 2).reshape(num_rows * row_tokens, num_heads, head_dim) for one in (query, key, value)]
    parts = [_attend_group(group, *flat, dropout=dropout) for group in spans.groups]
    # Zeros that depend on all three: a micro-batch of padding alone gives every projection its (zero) gradient, as on the
    # other ranks; ZeRO's reductions would not match without.
    out = query.new_zeros(num_rows * row_tokens, num_heads, head_dim) if parts else 0.0 * (flat[0] + flat[1] + flat[2])
    if parts:
        out = out.index_copy(0, spans.positions, torch.cat(parts))
    return out.view(num_rows, row_tokens, num_heads, head_dim)


def _attend_group(group: SpanGroup, query: Tensor, key: Tensor, value: Tensor, *, dropout: float) -> Tensor:
    """One group. Padding stands at the end of a sample, where no real position looks. -> (m, heads, d)"""
    shape = (-1, group.longest, *query.shape[1:])
    q, k, v = (one.index_select(0, group.gather).view(shape).transpose(1, 2) for one in (query, key, value))
    return _attend(q, k, v, dropout=dropout).transpose(1, 2).flatten(0, 1).index_select(0, group.real)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, dropout: float) -> Tensor:
    """Causal attention of samples of one length, the query scaled. (n, heads, L, d) -> (n, heads, L, d)"""
    num_heads, length = query.shape[1:3]
    if not dropout and value.dtype == torch.float32 and length > LONGEST_BY_HAND:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
    on_cpu, block = query.device.type == "cpu", min(length, QUERY_BLOCK)
    step = max(1, CACHED_SCORES // (num_heads * block * length)) if on_cpu else len(query)
    chunks = zip(query.split(step), key.split(step), value.split(step))
    return torch.cat([_attend_by_hand(*chunk, block=block, dropout=dropout) for chunk in chunks])


def _attend_by_hand(query: Tensor, key: Tensor, value: Tensor, *, block: int, dropout: float) -> Tensor:
    """The same with products and a softmax, block after block of the queries; for each the keys up to its own end."""
    parts = []
    for start in range(0, query.shape[2], block):
        stop = start + block
        scores = torch.matmul(query[:, :, start:stop], key[:, :, :stop].transpose(-1, -2))  # (n, heads, block, stop)
        scores = scores + scores.new_full(scores.shape[2:], -torch.inf).triu(1 + start)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        parts.append(torch.matmul(drop(weights, dropout), value[:, :, :stop]))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


AttentionInterface.register(PACKED, packed_attention_forward)
AttentionMaskInterface.register(PACKED, sdpa_mask)

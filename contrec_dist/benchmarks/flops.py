"""How many floating-point operations a training step multiplies, by formula; what MFU is computed from.

A product of (n, a) and (a, b) costs 2 n a b. Forward and backward of a linear layer: 2 n a b for the output, as much for the
gradient of its input where something before it learns, and as much for the gradient of its weight where that is trained.

    backbone   every linear layer (adapters too) over all positions of the rows, padding included
    attention  scores and their product with the values over the pairs that the kernel multiplies: whole rows (R L^2) for
               masked kernels, the samples' own squares for the packed one (also where a fused kernel skips later
               positions); 2 products forward, 4 backward
    lm_head    text targets x width x vocabulary
    inputs     projections of latents and item vectors to the width of the LLM
    catalogue  item vectors of the whole table, and targets x items x Q, 1 product forward and 2 backward
    query      the one-step prediction of every target
    head       the diffusion loss: drawn targets x batch_mul noise draws through the denoiser; the dispersive distances

Counted is what the model needs: products that activation checkpointing or a fused kernel repeats in the backward pass
are not (so MFU, not "hardware" utilisation). Element-wise work is nothing here, though it takes time.
"""

from dataclasses import dataclass

import torch
from torch import nn

from contrec_dist.data.packed_batch import PackedBatch
from contrec_dist.model.backbone import causal_lm
from contrec_dist.model.contrec import ContRec
from contrec_dist.model.packed_attention import PACKED, PackedSpans


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """What of a micro-batch decides how much is multiplied."""

    positions: int
    "R * L, padding included"
    attention_pairs: int
    "(query, key) pairs of one head and layer"
    inputs: int
    "history items"
    targets: int
    "supervised items"
    texts: int
    "supervised text tokens"
    drawn_targets: int
    "targets that meet the diffusion loss"
    table_items: int
    "items whose vectors are computed"
    rival_items: int
    "items that every target is compared with"

    @classmethod
    def of(cls, model: ContRec, batch: PackedBatch) -> "BatchCounts":
        """Counts of one micro-batch as `model` treats it."""
        targets, limit = len(batch.target_idx), model.head_config.max_targets
        negatives = model.loss_config.num_negatives
        named = len(torch.unique(torch.cat([batch.item_idx, batch.target_idx]))) if negatives else 0
        return cls(
            positions=batch.tokens.numel(),
            attention_pairs=_attention_pairs(model, batch.segments),
            inputs=len(batch.item_idx),
            targets=targets,
            texts=len(batch.text_labels),
            drawn_targets=min(targets, limit) if limit else targets,
            table_items=named + negatives if negatives else model.num_items,
            rival_items=negatives or model.num_items,
        )


def training_flops(model: ContRec, counts: BatchCounts) -> dict[str, float]:
    """FLOPs of forward and backward of one micro-batch, part by part. The optimizer multiplies no matrices."""
    language, inputs, head = causal_lm(model.backbone), model.inputs, model.head
    drawn, draws = counts.drawn_targets, counts.drawn_targets * model.head_config.batch_mul
    q = model.head_config.query_dim
    tokens = counts.inputs * inputs.slots.num_embeddings
    return {
        "backbone": sum(_linear(one, counts.positions) for one in _linears(language.base_model)),
        "attention": _attention(language.config.get_text_config(), counts.attention_pairs),
        "lm_head": _linear(language.get_output_embeddings(), counts.texts),
        "inputs": _linear(inputs.project, tokens, learned_input=False) + _linear(inputs.join_vector, counts.inputs),
        "catalogue": 3 * 2.0 * counts.targets * q * counts.rival_items
        + _linear(model.items.project[0], counts.table_items, learned_input=False)
        + _linear(model.items.project[2], counts.table_items),
        **_head_flops(head, counts.targets, draws, drawn),
    }  # fmt: skip


def _head_flops(head: nn.Module, targets: int, draws: int, drawn: int) -> dict[str, float]:
    query = _linear(head.direct_query, targets)
    if head.denoiser is None:
        return {"query": query, "head": 0.0}
    return {
        "query": query + _denoiser_features(head.denoiser, targets, targets) + _linear(head.denoised_query, targets),
        "head": _denoiser_features(head.denoiser, draws, drawn)
        + _linear(head.denoiser.output, draws)
        + 3 * 2.0 * drawn**2 * head.config.width,
    }


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [one for one in module.modules() if isinstance(one, nn.Linear)]


def _linear(layer: nn.Linear, rows: int, *, learned_input: bool = True) -> float:
    """Forward, gradient of the input, gradient of the weight; sizes by name, since ZeRO-3 empties the weight."""
    passes = 1 + learned_input + layer.weight.requires_grad
    return passes * 2.0 * rows * layer.in_features * layer.out_features


def _attention(config, pairs: int) -> float:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6 * 2.0 * pairs * config.num_hidden_layers * config.num_attention_heads * head_dim


def _attention_pairs(model: ContRec, segments: torch.Tensor) -> int:
    if causal_lm(model.backbone).config._attn_implementation != PACKED:
        return len(segments) * segments.shape[1] ** 2
    return sum(group.gather.numel() * group.longest for group in PackedSpans.of(segments).groups)


def _denoiser_features(denoiser: nn.Module, rows: int, conditions: int) -> float:
    """Everything of the denoiser but its output layer, from `conditions` conditions to `rows` noisy latents."""
    total = _linear(denoiser.embed_latent, rows, learned_input=False)
    total += _linear(denoiser.embed_condition, conditions)
    total += _linear(denoiser.embed_step.mlp[0], rows, learned_input=False) + _linear(denoiser.embed_step.mlp[2], rows)
    return total + sum(_linear(one, rows) for one in [*_linears(denoiser.blocks), denoiser.modulation])

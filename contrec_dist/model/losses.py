"""The losses that are ours: dispersive and negative. Sums and counts are left to the caller's normalisation."""

import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def dispersive_loss(activation: Tensor, tau: float) -> Tensor:
    """log mean_ij exp(-||h_i - h_j||^2 / (D tau)) on layer-normalised activations: smaller the wider the batch spreads.

    The mean runs over the whole B x B matrix, its zero diagonal included, so the loss lies in [log(1/B), 0]: without
    the diagonal, or without the normalisation, it has no lower bound.
    Shapes   activation (B, D) -> ()
    Units    nats
    Source   arXiv 2506.09027, with the diagonal
    """
    if activation.shape[0] == 0:
        return activation.float().sum()
    with torch.autocast(activation.device.type, enabled=False):  # distances of bf16 products would mostly be rounding
        h = functional.layer_norm(activation.float(), activation.shape[-1:])
        squared = _squared_distances(h)
    return torch.logsumexp((-squared / (h.shape[-1] * tau)).flatten(), dim=0) - 2 * math.log(len(h))


def _squared_distances(h: Tensor) -> Tensor:
    """||h_i - h_j||^2 with an exact zero diagonal. (B, D) -> (B, B)."""
    norms = h.square().sum(-1)
    squared = (norms[:, None] + norms[None, :] - 2 * h @ h.T).clamp(min=0)
    return squared * (1 - torch.eye(len(h), device=h.device))


def catalogue_cross_entropy(
    query: Tensor, vectors: Tensor, bias: Tensor, target: Tensor, max_logits: int = 1 << 25
) -> Tensor:
    """Sum over the rows of -log softmax(query . vectors + bias)[target], against every item given.

    Past `max_logits` the rows go in chunks whose logits are computed again in the backward pass, so that memory is
    bounded by max_logits instead of B x N.
    Shapes   query (B, Q), vectors (N, Q), bias (N,), target (B,) rows of `vectors` -> ()
    Units    nats
    """
    chunk_rows = max(1, max_logits // len(vectors))
    if len(query) <= chunk_rows:
        return _chunk_cross_entropy(query, vectors, bias, target)
    total = query.new_zeros((), dtype=torch.float32)
    for start in range(0, len(query), chunk_rows):
        rows = slice(start, start + chunk_rows)
        total = total + checkpoint(
            _chunk_cross_entropy, query[rows], vectors, bias, target[rows], use_reentrant=False
        )
    return total


def _chunk_cross_entropy(query: Tensor, vectors: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    logits = query @ vectors.T + bias
    return functional.cross_entropy(logits.float(), target, reduction="sum")


def sampled_cross_entropy(
    query: Tensor, positive: Tensor, positive_bias: Tensor, target: Tensor,
    negatives: Tensor, negative_bias: Tensor, negative_idx: Tensor, num_items: int,
) -> Tensor:
    """Sum over the rows of the cross-entropy against uniformly drawn negatives shared by all rows.

    A negative stands for num_items / C items, so log(num_items / C) is added to its logit (the log-probability
    correction for uniform sampling without the target); a negative that equals a row's target is left out there.
    Shapes   query (B, Q), positive (B, Q), positive_bias (B,), target (B,), negatives (C, Q), negative_bias (C,),
             negative_idx (C,) -> ()
    """
    own = (query * positive).sum(-1).float() + positive_bias.float()  # (B,)
    correction = math.log(num_items / max(len(negative_idx), 1))
    others = (query @ negatives.T + negative_bias).float() + correction  # (B, C)
    others = others.masked_fill(target[:, None] == negative_idx[None, :], float("-inf"))
    return (torch.logsumexp(torch.cat([own[:, None], others], dim=1), dim=1) - own).sum()

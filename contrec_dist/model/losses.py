"""The losses that are ours: dispersive and negative. Sums and counts are left to the caller's normalisation."""

import math

import torch
from torch import Tensor
from torch.nn import functional

CACHED_LOGITS = 1 << 20
"logits (4 bytes each) that a chunk may have on a CPU: 4 MiB stay in its caches"


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

    The gradients are taken together with the loss, for at most `max_logits` logits at a time, so that memory is bounded
    by max_logits instead of B x N and nothing is computed twice.
    Shapes   query (B, Q), vectors (N, Q), bias (N,), target (B,) rows of `vectors` -> ()
    Units    nats
    Cost     6 B N Q FLOP in the dtype of the surrounding autocast; softmax and sums in fp32
    """
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    with torch.autocast(device, enabled=False):
        return _CatalogueCrossEntropy.apply(query, vectors, bias, target, max(1, max_logits // len(vectors)), dtype)


def token_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Sum over the rows of -log softmax(logits)[target], in fp32 whatever the logits' dtype, without an fp32 copy of them.

    Shapes   logits (B, V), target (B,) -> ()
    Units    nats
    """
    return _TokenCrossEntropy.apply(logits, target)


class _CatalogueCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of rows."""

    @staticmethod
    def forward(ctx, query, vectors, bias, target, chunk_rows, dtype):
        low_query, low_vectors, bias = query.to(dtype), vectors.to(dtype), bias.float()
        query_grad, vectors_grad = torch.empty_like(low_query), torch.zeros_like(vectors, dtype=torch.float32)
        bias_grad, total = torch.zeros_like(bias), bias.new_zeros(())
        for start in range(0, len(query), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = torch.mm(low_query[rows], low_vectors.T)  # (b, N), becomes its gradient
            total += _replace_by_gradient(logits, target[rows], bias, bias_grad)
            torch.mm(logits, low_vectors, out=query_grad[rows])
            vectors_grad += torch.mm(logits.T, low_query[rows])
        ctx.save_for_backward(query_grad, vectors_grad, bias_grad)
        ctx.dtypes = query.dtype, vectors.dtype
        return total

    @staticmethod
    def backward(ctx, scale):
        query_grad, vectors_grad, bias_grad = ctx.saved_tensors
        query_type, vectors_type = ctx.dtypes
        return (query_grad * scale).to(query_type), (vectors_grad * scale).to(vectors_type), bias_grad * scale, None, None, None


class _TokenCrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass over the logits."""

    @staticmethod
    def forward(ctx, logits, target):
        gradient = logits.clone()
        total = _replace_by_gradient(gradient, target, None, None)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, scale):
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None


def _replace_by_gradient(logits: Tensor, target: Tensor, bias: Tensor | None, bias_grad: Tensor | None) -> Tensor:
    """Sum of the rows' cross-entropies -> (); `logits` (B, N) of any dtype become softmax - one_hot(target).

    fp32 exists for a few rows at a time only: on CPUs they stay in the caches.
    """
    step = max(1, CACHED_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        wide = logits[rows].float() if bias is None else logits[rows] + bias
        total += _softmax_minus_target(wide, target[rows])
        if bias_grad is not None:
            bias_grad += wide.sum(0)
        logits[rows] = wide
    return total


def _softmax_minus_target(logits: Tensor, target: Tensor) -> Tensor:
    """Sum of the rows' cross-entropies; `logits` (b, N) fp32 become its gradient, softmax - one_hot(target). -> ()"""
    own = logits.gather(1, target[:, None])[:, 0]
    largest = logits.amax(1, keepdim=True)
    norm = logits.sub_(largest).exp_().sum(1, keepdim=True)
    logits.div_(norm).scatter_add_(1, target[:, None], logits.new_full((len(target), 1), -1.0))
    return (norm[:, 0].log() + largest[:, 0] - own).sum()


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

"""LightGCN on the training edges: the collaborative half of the embeddings (stage embed).

Layers without weights over the symmetric-normalised user-item graph, the mean over layers, BPR loss against uniform
negatives, Adam. This module sees an edge list and nothing else, so an edge that is not in the list cannot reach it.

Guarantees   the same edges and seed give the same bits; nodes without an edge come back as zeros.
Cost         every step propagates the whole graph: 4 * num_layers * edges * dim multiply-adds, forward and backward.
             Hence few large steps: a batch grows until an epoch has at most `max_steps_per_epoch` of them.
             Memory: the graph (both directions) + 4 copies of the (users + items, dim) table.
Source       LightGCN, arXiv 2002.02126
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array

from contrec_dist.config import EmbedConfig
from contrec_dist.data.catalog import Histories
from contrec_dist.errors import DataError
from contrec_dist.progress import track

INITIAL_STD = 0.1


@dataclass(kw_only=True)
class CollaborativeEmbedding:
    """What was learned of training interactions: rows of unknown users and items are zero."""

    users: np.ndarray
    "(num_users, dim) float32"
    items: np.ndarray
    "(num_items, dim) float32"
    losses: list[float]
    "mean loss of every epoch, nats (LightGCN: BPR, sasrec: cross-entropy); empty where nothing is trained"


def average_items(histories: Histories, items: np.ndarray) -> np.ndarray:
    """Mean vector of every user's training items, zeros without any. Shapes   (N, dim) -> (U, dim) float32"""
    users, edges = histories.training_edges()
    counts = np.bincount(users, minlength=histories.num_users)
    shape = (histories.num_users, len(items))
    return csr_array((np.float32(1) / counts[users].astype(np.float32), (users, edges)), shape=shape) @ items


class _SymmetricProduct(torch.autograd.Function):
    """matrix @ dense for a symmetric sparse matrix, whose backward is the same product: no transpose is ever built."""

    @staticmethod
    def forward(ctx, matrix: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix @ dense

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return None, ctx.matrix @ gradient


def normalise_graph(edges: np.ndarray, num_users: int, num_items: int) -> torch.Tensor:
    """The symmetric-normalised adjacency matrix D^-1/2 A D^-1/2; repeated edges count once.

    Shapes   edges: (M, 2) int64 of (user, item) -> sparse CSR (num_users + num_items, same) float32
    """
    edges = np.unique(edges, axis=0)
    num_nodes = num_users + num_items
    rows = np.concatenate([edges[:, 0], edges[:, 1] + num_users])  # (2M,)
    columns = np.concatenate([edges[:, 1] + num_users, edges[:, 0]])  # (2M,)
    degrees = np.bincount(rows, minlength=num_nodes)
    values = 1.0 / np.sqrt(degrees[rows].astype(np.float64) * degrees[columns])
    order = np.lexsort((columns, rows))
    starts = np.concatenate([[0], np.cumsum(degrees)])
    parts = [torch.from_numpy(part) for part in (starts, columns[order], values[order].astype(np.float32))]
    with warnings.catch_warnings():  # torch announces CSR as beta once a process
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        return torch.sparse_csr_tensor(*parts, size=(num_nodes, num_nodes), check_invariants=True)


def propagate(graph: torch.Tensor, table: torch.Tensor, num_layers: int) -> torch.Tensor:
    """Mean of the layers 0..num_layers of `table` carried along the graph.

    Shapes   table: (num_users + num_items, dim) -> same
    """
    layer, total = table, table
    for _ in range(num_layers):
        layer = _SymmetricProduct.apply(graph, layer)
        total = total + layer
    return total / (num_layers + 1)


def compute_bpr_loss(
    carried: torch.Tensor, table: torch.Tensor, nodes: tuple[torch.Tensor, torch.Tensor, torch.Tensor], weight_decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bayesian personalised ranking of (user, positive, negative) node triples, and with the L2 term added.

    Shapes   carried, table: (nodes, dim); nodes: three (B,) int64 -> loss (), objective () in nats
    Source   LightGCN eq. 15; the L2 term is on the layer-0 vectors of the batch
    """
    user, positive, negative = (carried.index_select(0, node) for node in nodes)  # (B, dim)
    loss = F.softplus((user * (negative - positive)).sum(1)).mean()
    squares = sum(table.index_select(0, node).square().sum() for node in nodes)
    return loss, loss + 0.5 * weight_decay * squares / len(nodes[0])


def count_steps_per_epoch(num_edges: int, config: EmbedConfig) -> int:
    """Steps of an epoch: edges / batch_edges, but at most max_steps_per_epoch (the batches grow instead)."""
    return max(1, min(math.ceil(num_edges / config.batch_edges), config.max_steps_per_epoch))


def fit_lightgcn(edges: np.ndarray, num_users: int, num_items: int, config: EmbedConfig, seed: int) -> CollaborativeEmbedding:
    """Train LightGCN on `edges` and nothing else.

    Shapes   edges: (M, 2) int64 of (user_idx, item_idx), the training part
    Errors   DataError when there is no edge, or one outside the ranges
    """
    edges = _check_edges(edges, num_users, num_items)
    generator = torch.Generator().manual_seed(seed)
    graph = normalise_graph(edges, num_users, num_items)
    table = torch.randn(num_users + num_items, config.collaborative_dim, generator=generator) * INITIAL_STD
    table.requires_grad_(True)
    optimizer = torch.optim.Adam([table], lr=config.learning_rate)
    pairs = torch.from_numpy(edges)
    epochs = track(range(config.num_epochs), stage="embed", unit="epochs", total=config.num_epochs)
    losses = [_train_epoch(graph, table, optimizer, pairs, (num_users, num_items), config, generator) for _ in epochs]
    with torch.no_grad():
        known = torch.zeros(len(table), 1)
        known[pairs[:, 0]] = known[pairs[:, 1] + num_users] = 1.0
        carried = (propagate(graph, table, config.num_layers) * known).numpy()
    return CollaborativeEmbedding(users=carried[:num_users], items=carried[num_users:], losses=losses)


def _check_edges(edges: np.ndarray, num_users: int, num_items: int) -> np.ndarray:
    """Unique edges in order, inside their ranges."""
    if len(edges) == 0:
        raise DataError("training edges", "none", "at least one; or embed.collaborative: none")
    low, high = edges.min(axis=0), edges.max(axis=0)
    if low.min() < 0 or high[0] >= num_users or high[1] >= num_items:
        expected = f"user_idx in [0, {num_users}) and item_idx in [0, {num_items})"
        raise DataError("training edges", f"indices from {low.tolist()} to {high.tolist()}", expected)
    return np.unique(edges.astype(np.int64), axis=0)


def _train_epoch(graph, table, optimizer, pairs, sizes, config: EmbedConfig, generator) -> float:
    """One pass over the edges in a fresh order; returns the mean BPR loss, nats."""
    num_users, num_items = sizes
    order = torch.randperm(len(pairs), generator=generator)
    total = 0.0
    for rows in order.tensor_split(count_steps_per_epoch(len(pairs), config)):
        negative = torch.randint(num_items, (len(rows),), generator=generator)
        nodes = (pairs[rows, 0], pairs[rows, 1] + num_users, negative + num_users)
        loss, objective = compute_bpr_loss(propagate(graph, table, config.num_layers), table, nodes, config.weight_decay)
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    return total / len(pairs)

"""LightGCN: the arithmetic against dense hand computation, and what reaches it."""

import numpy as np
import pytest
import torch

from contrec_dist.config import EmbedConfig
from contrec_dist.embeddings.collaborative import (
    compute_bpr_loss,
    count_steps_per_epoch,
    fit_lightgcn,
    normalise_graph,
    propagate,
)
from contrec_dist.errors import DataError

EDGES = np.array([[0, 0], [0, 1], [1, 1], [2, 1]])  # 3 users, 3 items; item 2 has no edge


def toy_config(**settings) -> EmbedConfig:
    return EmbedConfig(**{"collaborative_dim": 8, "num_epochs": 30, "batch_edges": 64, **settings})


def block_edges() -> np.ndarray:
    """Two groups of users, each with its own ten items."""
    rng = np.random.default_rng(0)
    return np.array([(user, 10 * (user % 2) + item) for user in range(40) for item in rng.choice(10, 5, replace=False)])


def test_normalised_graph_is_one_over_root_of_degrees():
    graph = normalise_graph(EDGES, 3, 3).to_dense()
    expected = torch.zeros(6, 6)
    for user, item, value in ((0, 0, 1 / np.sqrt(2 * 1)), (0, 1, 1 / np.sqrt(2 * 3)), (1, 1, 1 / np.sqrt(3)), (2, 1, 1 / np.sqrt(3))):
        expected[user, 3 + item] = expected[3 + item, user] = value
    torch.testing.assert_close(graph, expected)


def test_repeated_edges_count_once():
    once, twice = normalise_graph(EDGES, 3, 3), normalise_graph(np.concatenate([EDGES, EDGES]), 3, 3)
    torch.testing.assert_close(once.to_dense(), twice.to_dense(), rtol=0, atol=0)


def test_propagation_equals_dense_matrix_powers():
    graph, table = normalise_graph(EDGES, 3, 3), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    dense = graph.to_dense()
    expected = (table + dense @ table + dense @ dense @ table) / 3
    torch.testing.assert_close(propagate(graph, table, 2), expected)
    torch.testing.assert_close(propagate(graph, table, 0), table)


def test_propagation_gradient_equals_dense_autograd():
    graph, table = normalise_graph(EDGES, 3, 3), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    sparse, dense = table.clone().requires_grad_(True), table.clone().requires_grad_(True)
    (propagate(graph, sparse, 2) * weights).sum().backward()
    matrix = graph.to_dense()
    ((dense + matrix @ dense + matrix @ matrix @ dense) / 3 * weights).sum().backward()
    torch.testing.assert_close(sparse.grad, dense.grad)


def test_bpr_loss_by_hand():
    table = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
    nodes = tuple(torch.tensor([node]) for node in (0, 1, 2))
    loss, objective = compute_bpr_loss(table, table, nodes, weight_decay=0.1)
    expected = float(np.log1p(np.exp(-2.0)))  # positive scores 2, negative 0
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert objective.item() == pytest.approx(expected + 0.05 * (1 + 5 + 9), abs=1e-6)


def test_large_graphs_take_larger_batches_not_more_steps():
    config = EmbedConfig(batch_edges=100, max_steps_per_epoch=20)
    assert [count_steps_per_epoch(edges, config) for edges in (1, 100, 101, 2000, 10**6)] == [1, 1, 2, 20, 20]


def test_training_separates_two_groups_and_lowers_the_loss():
    learned = fit_lightgcn(block_edges(), 40, 20, toy_config(), seed=0)
    scores = learned.users @ learned.items.T  # (40, 20)
    own = np.array([[user % 2 == item // 10 for item in range(20)] for user in range(40)])
    assert (scores[own].reshape(40, -1).min(1) > scores[~own].reshape(40, -1).max(1)).mean() > 0.9
    assert learned.losses[-1] < 0.5 * learned.losses[0]


def test_same_seed_same_bits_and_another_seed_others():
    runs = [fit_lightgcn(block_edges(), 40, 20, toy_config(num_epochs=3), seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(runs[0].items, runs[1].items) and np.array_equal(runs[0].users, runs[1].users)
    assert not np.array_equal(runs[0].items, runs[2].items)


def test_order_and_repeats_of_edges_change_nothing():
    edges = block_edges()
    runs = [fit_lightgcn(e, 40, 20, toy_config(num_epochs=2), seed=1) for e in (edges, np.concatenate([edges[::-1], edges[:7]]))]
    assert np.array_equal(runs[0].items, runs[1].items)


def test_nodes_without_edges_are_zero_and_others_are_not():
    learned = fit_lightgcn(EDGES, 4, 3, toy_config(num_epochs=2), seed=0)
    assert not learned.items[2].any() and not learned.users[3].any()
    assert learned.items[:2].any(axis=1).all() and learned.users[:3].any(axis=1).all()


@pytest.mark.parametrize("edges", [np.zeros((0, 2), int), np.array([[0, 3]]), np.array([[3, 0]]), np.array([[-1, 0]])])
def test_missing_or_foreign_edges_are_refused_by_name(edges):
    with pytest.raises(DataError, match="training edges"):
        fit_lightgcn(edges, 3, 3, toy_config(), seed=0)

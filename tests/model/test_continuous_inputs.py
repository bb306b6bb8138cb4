"""model/continuous_inputs.py: what an item's tokens are made of."""

import pytest
import torch

from contrec_dist.model.continuous_inputs import MARKER_ITEM, MARKER_USER, ContinuousInputs, ItemTable

N, K, Z, Q, WIDTH = 9, 3, 2, 4, 8


def make_table(residual=True, unseen=()) -> ItemTable:
    torch.manual_seed(0)
    log_popularity = torch.linspace(-2, 0, N)
    log_popularity[list(unseen)] = -torch.inf
    return ItemTable(
        num_items=N, latent_width=K * Z, query_dim=Q, residual=residual, log_popularity=log_popularity
    )  # fmt: skip


def make_inputs(user_dim=Z, dropout=0.0) -> ContinuousInputs:
    torch.manual_seed(1)
    return ContinuousInputs(
        num_item_tokens=K, latent_dim=Z, query_dim=Q, user_dim=user_dim, width=WIDTH, dropout=dropout
    )


def test_an_item_vector_is_its_latents_projected_plus_its_residual():
    table, latents, rows = make_table(), torch.randn(4, K * Z), torch.tensor([3, 0, 8, 3])
    vectors, bias = table(latents, rows)
    torch.testing.assert_close(vectors, table.project(latents) + table.residual.weight[rows])
    torch.testing.assert_close(bias, torch.linspace(-2, 0, N)[rows])
    without, _ = make_table(residual=False)(latents, rows)
    torch.testing.assert_close(without, make_table(residual=False).project(latents))


def test_an_item_that_joins_later_has_no_residual_and_the_lowest_bias():
    table, latents = make_table().eval(), torch.randn(3, K * Z)
    vectors, bias = table(latents, torch.tensor([2, N, N + 1000]))
    torch.testing.assert_close(vectors[0], table(latents[:1], torch.tensor([2]))[0][0])
    torch.testing.assert_close(vectors[1:], table.project(latents[1:]))
    assert bias[1:].tolist() == [-2.0, -2.0]


def test_an_item_that_joins_later_has_the_bias_that_was_set():
    table = make_table(unseen=[4]).eval()
    table.new_item_bias = -0.5
    assert table(torch.randn(3, K * Z), torch.tensor([4, 8, N]))[1].tolist() == [-0.5, 0.0, -0.5]


@pytest.mark.parametrize("residual", [True, False])
def test_the_expected_bias_by_hand(residual):
    table, queries = make_table(residual=residual, unseen=[0, 4]), torch.randn(5, Q)
    if residual:
        torch.nn.init.normal_(table.residual.weight)
    trained, means = [1, 2, 3, 5, 6, 7, 8], []
    for query in queries:
        products = table.residual.weight[trained] @ query if residual else torch.zeros(len(trained))
        means.append((products + torch.linspace(-2, 0, N)[trained]).exp().mean().log())
    assert table.expect_bias(queries) == pytest.approx(float(sum(means) / 5), rel=1e-5)
    first = -1.75 + (float((queries @ table.residual.weight[1]).mean()) if residual else 0.0)
    assert table.expect_bias(queries, max_items=1) == pytest.approx(first, rel=1e-5)


def test_an_item_that_training_does_not_see_is_described_as_one_that_joins_later():
    table, latents = make_table(unseen=[0, 4]), torch.randn(4, K * Z)
    rows = torch.tensor([0, 1, 4, N])
    _, bias = table.train()(latents[:3], rows[:3])
    assert bias.isinf().tolist() == [True, False, True], "nobody's negative in training"
    vectors, bias = table.eval()(latents, rows)
    torch.testing.assert_close(vectors[[0, 2, 3]], table.project(latents[[0, 2, 3]]))
    torch.testing.assert_close(vectors[1], table.project(latents[1]) + table.residual.weight[1])
    torch.testing.assert_close(bias, torch.full((4,), -1.75))


def test_items_taken_for_new_ones_have_no_residual_and_keep_their_bias():
    table, latents, rows = make_table().train(), torch.randn(N, K * Z), torch.arange(N)
    as_new = rows % 3 == 0
    vectors, bias = table(latents, rows, as_new)
    torch.testing.assert_close(vectors, table.project(latents) + table.residual.weight * ~as_new[:, None])
    torch.testing.assert_close(bias, torch.linspace(-2, 0, N))


def test_training_refuses_items_outside_the_catalogue():
    with pytest.raises(IndexError):
        make_table().train()(torch.randn(1, K * Z), torch.tensor([N]))


def test_tokens_of_an_item_are_its_projected_latents_and_the_last_carries_its_vector():
    inputs, latents, vectors = make_inputs(), torch.randn(5, K, Z), torch.randn(5, Q)
    tokens = inputs.embed_items(latents, vectors)
    plain = inputs.project(latents) + inputs.slots.weight
    torch.testing.assert_close(tokens[:, :-1], plain[:, :-1])
    torch.testing.assert_close(tokens[:, -1], plain[:, -1] + inputs.join_vector(vectors))


def test_the_k_tokens_of_an_item_are_told_apart_by_their_slot():
    tokens = make_inputs().embed_items(torch.ones(1, K, Z), torch.zeros(1, Q))[0]
    assert torch.pdist(tokens).min() > 0.01


def test_markers_of_items_and_users_differ_and_users_need_a_projection():
    inputs = make_inputs()
    item, user = inputs.embed_marker(MARKER_ITEM, 2), inputs.embed_marker(MARKER_USER, 1)
    assert item.shape == (2, WIDTH) and (item[0] - user[0]).abs().max() > 0.01
    assert inputs.embed_users(torch.randn(2, K, Z)).shape == (2, K, WIDTH)
    assert make_inputs(user_dim=0).project_user is None


def test_dropout_acts_in_training_only():
    inputs, latents, vectors = make_inputs(dropout=0.5), torch.randn(5, K, Z), torch.randn(5, Q)
    assert (inputs.train().embed_items(latents, vectors) == 0).any()
    assert not (inputs.eval().embed_items(latents, vectors) == 0).any()


def test_the_bias_of_untrained_items_follows_what_training_made_of_the_others():
    popularity = torch.tensor([0.0, -1.0, -torch.inf])
    table = ItemTable(num_items=3, latent_width=4, query_dim=2, residual=False, log_popularity=popularity).eval()
    read = lambda: float(table(torch.zeros(1, 4), torch.tensor([2]))[1])  # noqa: E731
    assert read() == -1.0 == read()
    table.train()
    with torch.no_grad():
        table.bias.weight[1] = -3.0
    table.eval()
    assert read() == -3.0

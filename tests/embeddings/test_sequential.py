"""Sequential embeddings: neighbours in time are neighbours in space, by the formula, from training interactions alone."""

import numpy as np
import pytest
from scipy.sparse import coo_array

from contrec_dist.config import EmbedConfig
from contrec_dist.data.catalog import Histories
from contrec_dist.embeddings.sequential import compute_information, factorise, fit_sequential
from contrec_dist.errors import ConfigError, DataError

NUM_ITEMS = 20


def as_histories(rows: list[list[int]], num_train: list[int]) -> Histories:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    nowhere = np.full(len(rows), -1)
    items = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return Histories(
        items=items, timestamps=np.zeros_like(items), offsets=offsets, num_train=np.array(num_train),
        validation_pos=nowhere, test_pos=nowhere,
    )  # fmt: skip


def two_worlds(held_out: int = 19) -> Histories:
    """80 users walk among the items 0..8 or 9..17; each ends with an item that is held out; 18 is met alone, 19 never."""
    draw = np.random.default_rng(0)
    rows = [[*draw.permutation(9)[:6] + 9 * (user % 2), held_out] for user in range(80)] + [[18, held_out]]
    return as_histories(rows, [6] * 80 + [1])


def config(**settings) -> EmbedConfig:
    return EmbedConfig(**{"collaborative": "sequential", "collaborative_dim": 4, **settings})


def test_items_of_one_walk_point_one_way_and_users_with_them():
    learned = fit_sequential(two_worlds(), NUM_ITEMS, config(collaborative_dim=2), seed=0)
    assert learned.items.shape == (NUM_ITEMS, 2) and learned.items.dtype == np.float32 and learned.losses == []
    unit = learned.items[:18] / np.linalg.norm(learned.items[:18], axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert min(cosines[:9, :9].min(), cosines[9:, 9:].min()) > 0.9 > 0.1 > abs(cosines[:9, 9:]).max()
    np.testing.assert_allclose(learned.users[0], learned.items[two_worlds().items[:6]].mean(0), rtol=1e-5)


def test_held_out_items_reach_nothing_and_what_nobody_met_beside_another_is_zero():
    first, second = (fit_sequential(two_worlds(held_out), NUM_ITEMS, config(), seed=0) for held_out in (19, 3))
    assert np.array_equal(first.items, second.items) and np.array_equal(first.users, second.users)
    assert not first.items[18:].any() and not first.users[80].any()


def test_information_by_hand():
    counts = np.array([[0.0, 3.0, 1.0], [3.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    share = np.array([4.0, 3.0, 1.0]) ** 0.75
    wanted = np.zeros((3, 3))
    for row in range(3):
        for column in range(3):
            if counts[row, column]:
                wanted[row, column] = max(0.0, np.log(counts[row, column] / counts[row].sum() / (share[column] / share.sum())))
    np.testing.assert_allclose(compute_information(coo_array(counts)).toarray(), wanted, rtol=1e-5)
    assert (wanted > 0).sum() == 4


def test_all_columns_give_the_matrix_back_and_those_past_the_rank_are_zero():
    half = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
    matrix = coo_array(half @ half.T).tocsr()  # positive, so that U sqrt(S) of its rows is a root of it
    vectors = factorise(matrix, 5, seed=0)
    np.testing.assert_allclose(vectors @ vectors.T, matrix.toarray(), atol=1e-3)
    assert not vectors[:, 3:].any()


def test_dim_above_the_number_of_items_is_filled_with_zeros():
    vectors = fit_sequential(two_worlds(), NUM_ITEMS, config(collaborative_dim=32), seed=0).items
    assert vectors.shape == (NUM_ITEMS, 32) and np.isfinite(vectors).all() and not vectors[:, NUM_ITEMS:].any()


def test_the_window_decides_who_is_near():
    walk = as_histories([[0, 1, 2]] * 5, [3] * 5)
    near, far = (fit_sequential(walk, 3, config(sequential_window=window), seed=0).items for window in (1, 2))
    assert not np.allclose(near @ near.T, far @ far.T)


def test_histories_of_one_item_and_a_window_of_none_are_refused_by_name():
    with pytest.raises(DataError, match="training histories"):
        fit_sequential(as_histories([[0], [1]], [1, 1]), 2, config(), seed=0)
    with pytest.raises(ConfigError, match="embed.sequential_window"):
        config(sequential_window=0)

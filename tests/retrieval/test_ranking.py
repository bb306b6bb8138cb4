"""retrieval/ranking.py: seen items never come back, lists are refilled, fusion and text re-ranking by hand."""

import numpy as np
import pytest

from contrec_dist.errors import DataError
from contrec_dist.retrieval import ranking
from contrec_dist.retrieval.ranking import combine_scores, fuse_samples, mask_seen, search_unseen
from contrec_dist.retrieval.top_k import exact_top_k


def flatten(lists):
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])])
    return np.array([item for row in lists for item in row], dtype=np.int64), offsets


def test_mask_by_hand():
    scores = np.array([[9, 8, 7, 6], [9, 8, 7, 6]], np.float32)
    item_idx = np.array([[3, 1, 0, 2], [4, 3, 2, -1]])
    kept_scores, kept_idx = mask_seen(scores, item_idx, *flatten([[1, 1], [4, 2, 9]]), 3)
    assert kept_idx.tolist() == [[3, 0, 2], [3, -1, -1]]
    assert kept_scores.tolist() == [[9, 7, 6], [8, -np.inf, -np.inf]]


@pytest.mark.parametrize("first_overfetch", [0, 3, 64])
def test_search_unseen_equals_filtering_the_whole_ranking(monkeypatch, first_overfetch):
    monkeypatch.setattr(ranking, "FIRST_OVERFETCH", first_overfetch)
    draw = np.random.default_rng(0)
    vectors, queries = draw.normal(size=(50, 4)).astype(np.float32), draw.normal(size=(20, 4)).astype(np.float32)
    full_scores, full_idx = exact_top_k(queries, vectors, 50)
    # the worst case: what was seen is what ranks best; one row saw all but two items
    seen = [full_idx[row, : draw.integers(0, 12)].tolist() + [int(full_idx[row, 30])] for row in range(19)]
    seen.append(full_idx[19, :48].tolist())
    scores, item_idx = search_unseen(lambda rows, k: exact_top_k(rows, vectors, k), queries, 6, *flatten(seen))
    for row in range(20):
        left = [(s, i) for s, i in zip(full_scores[row], full_idx[row]) if i not in seen[row]][:6]
        assert item_idx[row].tolist() == [i for _, i in left] + [-1] * (6 - len(left))
        assert scores[row, : len(left)].tolist() == [s for s, _ in left]
    assert (item_idx[:19] >= 0).all()  # refilled


def test_rows_without_seen_items_are_left_alone():
    vectors = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    got = search_unseen(lambda rows, k: exact_top_k(rows, vectors, k), vectors[:2], 4, *flatten([[], []]))
    assert np.array_equal(got[1], exact_top_k(vectors[:2], vectors, 4)[1])


def test_offsets_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="seen_offsets"):
        mask_seen(np.zeros((2, 1), np.float32), np.zeros((2, 1), np.int64), np.array([1]), np.array([0, 1]), 1)


def test_fusion_by_hand():
    scores = np.array([[[0.0, -1.0]], [[-0.5, -2.0]]], np.float32)
    item_idx = np.array([[[4, 2]], [[2, 7]]])
    fused_scores, fused_idx = fuse_samples(scores, item_idx, 4, temperature=1.0)
    expected = {4: np.exp(0.0) / 2, 2: (np.exp(-1.0) + np.exp(-0.5)) / 2, 7: np.exp(-2.0) / 2}
    assert fused_idx.tolist() == [[4, 2, 7, -1]]
    np.testing.assert_allclose(fused_scores[0, :3], np.log([expected[i] for i in (4, 2, 7)]), rtol=1e-6)


def test_an_item_near_many_samples_beats_one_near_a_single_sample():
    scores = np.array([[[-1.0, -1.2]], [[-1.0, -1.2]], [[-1.0, -1.2]]], np.float32)
    item_idx = np.array([[[10, 1]], [[11, 1]], [[12, 1]]])
    assert fuse_samples(scores, item_idx, 1)[1].tolist() == [[1]]


def test_fusion_ignores_the_order_of_samples_and_far_distances():
    draw = np.random.default_rng(0)
    scores = -np.sort(draw.uniform(1e4, 2e4, size=(5, 3, 8)), axis=2).astype(np.float32)
    item_idx = np.argsort(draw.random((5, 3, 12)), axis=2)[:, :, :8]
    item_idx[2, 1, 5:], scores[2, 1, 5:] = -1, -np.inf
    item_idx[:, 2], scores[:, 2] = -1, -np.inf
    one, other = fuse_samples(scores, item_idx, 6), fuse_samples(scores[::-1], item_idx[::-1], 6)
    assert np.array_equal(one[1], other[1])
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    assert np.isfinite(one[0][:2]).all() and (one[1][2] == -1).all()


def test_text_by_hand_with_ties_and_absent_candidates():
    scores = np.array([[3.0, 2.0, 1.0, -np.inf]], np.float32)
    item_idx = np.array([[8, 5, 2, -1]])
    text = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    assert combine_scores(scores, item_idx, {"texts": (0.0, text)}, 4)[1].tolist() == [[8, 5, 2, -1]]
    assert combine_scores(scores, item_idx, {"texts": (2.0, text)}, 4)[1].tolist() == [[2, 5, 8, -1]]  # all tie at 3
    assert combine_scores(scores, item_idx, {"texts": (4.0, text)}, 2)[0].tolist() == [[5.0, 4.0]]
    with pytest.raises(DataError, match="texts"):
        combine_scores(scores, item_idx, {"texts": (1.0, np.full((1, 4), np.nan))}, 4)

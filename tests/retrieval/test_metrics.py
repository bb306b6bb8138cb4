"""retrieval/metrics.py: hand-computed values, and agreement with torchmetrics on random rankings."""

import math

import numpy as np
import pytest
import torch
import torchmetrics.retrieval as reference

from contrec_dist.errors import DataError
from contrec_dist.retrieval import metrics


def test_metrics_by_hand():
    item_idx = np.array([[4, 1, 2], [0, 3, 1], [2, 0, -1], [1, 2, 3]])
    targets = np.array([1, 0, 4, 3])  # ranks 2, 1, miss, 3
    assert metrics.rank_targets(item_idx, targets).tolist() == [2, 1, 0, 3]
    got = metrics.summarize_lists(item_idx, targets, num_items=6, ks=[1, 2, 3])
    assert got["hr@1"] == 0.25 and got["hr@2"] == 0.5 and got["hr@3"] == 0.75
    assert got["ndcg@2"] == pytest.approx((1 / math.log2(3) + 1) / 4)
    assert got["ndcg@3"] == pytest.approx((1 / math.log2(3) + 1 + 0.5) / 4)
    assert got["mrr"] == pytest.approx((1 / 2 + 1 + 0 + 1 / 3) / 4)
    assert got["coverage@10"] == pytest.approx(5 / 6)


def test_absent_places_never_hit():
    assert metrics.rank_targets(np.array([[-1, -1]]), np.array([-1])).tolist() == [0]


def test_agrees_with_torchmetrics_on_random_rankings():
    draw = np.random.default_rng(0)
    item_idx = np.argsort(draw.random((200, 40)), axis=1)
    targets = draw.integers(0, 40, size=200)
    k = 10
    indexes = torch.arange(200).repeat_interleave(40)
    preds = torch.arange(40, 0, -1).float().repeat(200)
    hits = torch.from_numpy((item_idx == targets[:, None]).reshape(-1))
    ranks = metrics.rank_targets(item_idx, targets)
    pairs = [
        (reference.RetrievalHitRate(top_k=k), metrics.hits_at(ranks, k)),
        (reference.RetrievalNormalizedDCG(top_k=k), metrics.gains_at(ranks, k)),
        (reference.RetrievalMRR(), metrics.reciprocal_ranks(ranks)),
    ]
    for metric, ours in pairs:
        assert ours.mean() == pytest.approx(float(metric(preds, hits, indexes=indexes)), abs=1e-6)


def test_gini_by_hand():
    assert metrics.gini_at(np.array([[0, 1, 2, 3]]), 4, 10) == pytest.approx(0.0)
    assert metrics.gini_at(np.array([[0], [0], [0]]), 4, 10) == pytest.approx(0.75)  # one of four items gets all
    assert metrics.gini_at(np.array([[0, 1], [0, -1]]), 2, 10) == pytest.approx(1 / 6)  # counts 2 and 1
    assert metrics.gini_at(np.array([[0, 1]]), 2, 1) == pytest.approx(0.5)  # only the first place counts


def test_buckets_hold_equal_shares_of_training_interactions():
    num_train = np.random.default_rng(0).zipf(2.0, size=3000).clip(max=60)
    buckets = metrics.bucket_items(num_train, 5)
    shares = np.bincount(buckets, weights=num_train, minlength=5) / num_train.sum()
    np.testing.assert_allclose(shares, 0.2, atol=60 / num_train.sum())
    assert all(num_train[buckets == b].max() <= num_train[buckets == b + 1].min() for b in range(4))
    assert metrics.bucket_items(np.array([0, 5, 0, 5]), 2).tolist() == [0, 0, 0, 1]


def test_slices_by_hand():
    num_train = np.array([0, 1, 1, 4, 6])
    targets, ranks = np.array([0, 1, 3, 4, 4]), np.array([0, 1, 11, 3, 0])
    rows = metrics.slice_by_popularity(ranks, targets, num_train, 2)
    assert [row["num_users"] for row in rows] == [3, 2]
    assert rows[0]["hr@10"] == pytest.approx(1 / 3) and rows[1]["hr@10"] == 0.5
    assert rows[1]["ndcg@10"] == pytest.approx(0.25)
    assert (rows[0]["min_train"], rows[0]["max_train"], rows[0]["num_items"]) == (0, 4, 4)
    cold = metrics.slice_cold_start(ranks, targets, num_train)
    assert cold == {"num_items": 1, "num_users": 1, "hr@10": 0.0, "ndcg@10": 0.0}
    assert metrics.slice_cold_start(ranks, targets, num_train + 1)["hr@10"] is None


def test_bootstrap_is_seeded_and_as_wide_as_theory_says():
    values = (np.random.default_rng(0).random(4000) < 0.1).astype(float)
    low, high = metrics.bootstrap_interval(values, seed=1)
    assert (low, high) == metrics.bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / math.sqrt(4000)
    assert low == pytest.approx(values.mean() - half, rel=0.05) and high == pytest.approx(values.mean() + half, rel=0.05)


def test_no_users_and_too_short_lists_are_refused():
    with pytest.raises(DataError, match="no users"):
        metrics.summarize_lists(np.zeros((0, 5), np.int64), np.zeros(0, np.int64), 5, [5])
    with pytest.raises(DataError, match="evaluate.ks.*20.*at most 5"):
        metrics.summarize_lists(np.zeros((1, 5), np.int64), np.zeros(1, np.int64), 5, [5, 20])


def test_diversity_is_the_mean_distance_of_all_pairs_by_hand():
    vectors = np.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    lists = np.array([[0, 1, 2], [0, 0, -1], [0, 3, -1], [1, -1, -1], [-1, -1, -1], [0, 2, 1]])
    got = metrics.diversity_at(lists, vectors, 3)
    np.testing.assert_allclose(got, [1 - (0 - 1 + 0) / 3, 0.0, 1.0, 0.0, 0.0, 4 / 3], atol=1e-12)
    np.testing.assert_allclose(metrics.diversity_at(lists, vectors, 2), [1.0, 0.0, 1.0, 0.0, 0.0, 2.0], atol=1e-12)


def test_diversity_equals_the_pairs_counted_one_by_one_across_chunks(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_LISTS", 3)
    draw = np.random.default_rng(0)
    vectors, lists = draw.normal(size=(20, 5)), np.stack([draw.permutation(20)[:6] for _ in range(8)])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [np.mean([1 - unit[a] @ unit[b] for a in row[:4] for b in row[:4] if a != b]) for row in lists]
    np.testing.assert_allclose(metrics.diversity_at(lists, vectors, 4), expected, atol=1e-12)
    summary = metrics.summarize_lists(lists, lists[:, 0], 20, [5], vectors)
    assert summary["diversity@10"] == pytest.approx(float(metrics.diversity_at(lists, vectors, 10).mean()))

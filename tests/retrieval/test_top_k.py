"""retrieval/top_k.py against brute force written the slow way."""

import numpy as np
import pytest

from contrec_dist.errors import DataError
from contrec_dist.retrieval import top_k
from contrec_dist.retrieval.top_k import best_first, exact_top_k, in_same_row, merge_top_k, refine_top_k, unite_rows


def brute_force(queries, vectors, k, metric):
    """One pair at a time in Python; sorted by (-score, row)."""
    rows = []
    for query in queries.astype(np.float64):
        if metric == "inner_product":
            scores = [float(np.float32((query * vector).sum())) for vector in vectors.astype(np.float64)]
        else:
            scores = [-float(np.float32(((query - vector) ** 2).sum())) for vector in vectors.astype(np.float64)]
        rows.append(sorted(range(len(vectors)), key=lambda row: (-scores[row], row))[:k])
    return np.array(rows)


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_equals_brute_force_over_many_chunks_and_duplicates(metric, monkeypatch):
    monkeypatch.setattr(top_k, "CHUNK_ROWS", 37)
    monkeypatch.setattr(top_k, "CHUNK_QUERIES", 4)
    monkeypatch.setattr(top_k, "CHUNK_NUMBERS", 100)
    draw = np.random.default_rng(0)
    vectors = draw.integers(-3, 4, size=(400, 3)).astype(np.float32)  # few distinct values: ties everywhere
    queries = draw.integers(-3, 4, size=(11, 3)).astype(np.float32)
    scores, item_idx = exact_top_k(queries, vectors, 20, metric)
    assert np.array_equal(item_idx, brute_force(queries, vectors, 20, metric))
    assert (np.diff(scores, axis=1) <= 0).all()


def test_hand_computed_scores():
    vectors = np.array([[1, 0], [0, 2], [1, 0], [3, 3]], np.float32)
    scores, item_idx = exact_top_k(np.array([[1, 0]], np.float32), vectors, 6, "l2")
    assert item_idx.tolist() == [[0, 2, 1, 3, -1, -1]]
    assert scores.tolist() == [[0, 0, -5, -13, -np.inf, -np.inf]]
    scores, item_idx = exact_top_k(np.array([[1, 0]], np.float32), vectors, 2)
    assert item_idx.tolist() == [[3, 0]] and scores.tolist() == [[3, 1]]
    assert scores.dtype == np.float32 and item_idx.dtype == np.int64


def test_a_query_scores_the_same_in_any_batch():
    draw = np.random.default_rng(1)
    vectors, queries = draw.normal(size=(300, 33)).astype(np.float32), draw.normal(size=(50, 33)).astype(np.float32)
    together = exact_top_k(queries, vectors, 10)
    alone = exact_top_k(queries[31:32], vectors, 10)
    assert np.array_equal(together[0][31], alone[0][0]) and np.array_equal(together[1][31], alone[1][0])


def test_merge_of_pieces_equals_the_whole():
    draw = np.random.default_rng(2)
    vectors, queries = (
        draw.integers(-2, 3, size=(90, 3)).astype(np.float32),
        draw.normal(size=(7, 3)).astype(np.float32),
    )
    parts = []
    for start in (0, 30, 60):
        scores, rows = exact_top_k(queries, vectors[start : start + 30], 8)
        parts.append((scores, rows + start))
    whole, merged = exact_top_k(queries, vectors, 8), merge_top_k(parts, 8)
    assert np.array_equal(whole[0], merged[0]) and np.array_equal(whole[1], merged[1])


def test_best_first_puts_absent_candidates_last():
    scores, item_idx = best_first(np.array([[1.0, 9.0, 1.0]]), np.array([[5, -1, 2]]), 4)
    assert item_idx.tolist() == [[2, 5, -1, -1]] and scores.tolist() == [[1, 1, -np.inf, -np.inf]]


def test_bad_input_is_named():
    good = np.zeros((3, 4), np.float32)
    with pytest.raises(DataError, match="queries.*row 0"):
        exact_top_k(np.full((1, 4), np.nan, np.float32), good, 1)
    with pytest.raises(DataError, match="vectors.*row 0"):
        exact_top_k(good, np.full((1, 4), np.inf, np.float32), 1)
    with pytest.raises(DataError, match=r"\(3, 4\).*\(B, 5\)"):
        exact_top_k(good, np.zeros((3, 5), np.float32), 1)
    with pytest.raises(DataError, match="k: got 0"):
        exact_top_k(good, good, 0)
    with pytest.raises(DataError, match="cosine"):
        exact_top_k(good, good, 1, "cosine")
    with pytest.raises(DataError, match="float64"):
        exact_top_k(good, good.astype(np.float64), 1)


def test_no_queries_and_no_items_give_empty_lists():
    assert exact_top_k(np.zeros((0, 2), np.float32), np.zeros((3, 2), np.float32), 2)[1].shape == (0, 2)
    assert exact_top_k(np.zeros((1, 2), np.float32), np.zeros((0, 2), np.float32), 2)[1].tolist() == [[-1, -1]]


def test_rows_can_be_left_out_and_named_by_id():
    draw = np.random.default_rng(0)
    vectors = np.round(draw.normal(size=(400, 3)), 1).astype(np.float32)  # many ties
    queries, ids = vectors[:20] + np.float32(0.5), draw.permutation(5000)[:400].astype(np.int64)
    removed = np.zeros(400, dtype=bool)
    removed[np.unique(exact_top_k(queries, vectors, 30)[1])[::2]] = True
    settings = {
        "gather": lambda rows: vectors[rows],
        "num_rows": 400,
        "metric": "inner_product",
        "max_norm": 9.0,
        "fetch_epsilon": 1e-6,
    }

    def fetch(some, count):
        products = some @ vectors.T
        rows = np.argsort(-products, axis=1)[:, :count]
        return np.take_along_axis(products, rows, axis=1), rows

    scores, found = refine_top_k(queries, 30, fetch=fetch, ids=ids, removed=removed, **settings)
    living = np.flatnonzero(~removed)
    by_id = living[np.argsort(ids[living])]  # ties go to the lower id
    expected_scores, rows = exact_top_k(queries, vectors[by_id], 30)
    assert np.array_equal(found, ids[by_id][rows]) and np.array_equal(scores, expected_scores)
    everything = refine_top_k(queries, 400, fetch=fetch, ids=ids, removed=removed, **settings)[1]
    assert (everything[:, len(living) :] == -1).all() and (
        np.sort(everything[:, : len(living)]) == np.sort(ids[living])
    ).all()


def test_rows_are_united_and_found_again_row_by_row():
    draw = np.random.default_rng(1)
    lists = [np.stack([draw.permutation(40)[:width] for _ in range(25)]) for width in (12, 7)]
    for one in lists:
        one[draw.random(one.shape) < 0.3] = -1
    lists[0][3], lists[1][3] = -1, -1  # a row of nothing
    united = unite_rows(lists)
    wanted = [(set(first) | set(second)) - {-1} for first, second in zip(*(one.tolist() for one in lists))]
    assert united.shape == (25, max(map(len, wanted)))
    for row, items in zip(united.tolist(), wanted):
        assert sorted(row, reverse=True) == row and row.count(-1) == len(row) - len(items) and set(row) - {-1} == items
    for row, inside, second in zip(united, in_same_row(united, lists[1]), lists[1]):
        assert set(row[inside].tolist()) == set(second.tolist()) - {-1}

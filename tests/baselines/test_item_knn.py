"""baselines/item_knn.py against loops, and as a stage."""

from collections import defaultdict

import numpy as np
import pytest

from contrec_dist.baselines.item_knn import ItemKnn, best_of_rows, item_similarities, load_recommender
from contrec_dist.baselines.stage import run_baseline
from contrec_dist.baselines.views import recommend_views
from contrec_dist.config import ItemKnnConfig
from contrec_dist.data.catalog import Histories
from contrec_dist.errors import ConfigError

NUM_ITEMS = 15
SETTINGS = [
    ItemKnnConfig(),
    ItemKnnConfig(window=1, backward_weight=0, num_recent=1, source_power=0, target_power=0),
    ItemKnnConfig(window=3, gap_decay=0.5, backward_weight=0.3, num_recent=4, recency_decay=2, shrinkage=1.5),
    ItemKnnConfig(window=50, gap_decay=0, backward_weight=1, source_power=0.2, target_power=0.9, neighbours=3),
]


def make_histories(rows, held_out=2):
    """The last `held_out` items of every row are validation and test, where there are so many."""
    lengths = np.array([len(row) for row in rows])
    num_train = np.where(lengths > held_out, lengths - held_out, lengths)
    return Histories(
        offsets=np.concatenate([[0], np.cumsum(lengths)]), items=np.concatenate([*rows, []]).astype(np.int64),
        timestamps=np.zeros(lengths.sum(), np.int64), num_train=num_train,
        validation_pos=np.where(lengths > held_out, lengths - 2, -1), test_pos=np.where(lengths > held_out, lengths - 1, -1),
    )  # fmt: skip


def count_training(histories):
    return np.bincount(histories.training_edges()[1], minlength=NUM_ITEMS)


@pytest.fixture(scope="module")
def histories():
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, NUM_ITEMS - 2, draw.integers(1, 9)).tolist() for _ in range(12)]  # 13 and 14: nobody
    return make_histories(rows)


def similarities_by_loops(histories, config):
    """S as {(i, j): value}."""
    counts, pairs = count_training(histories), defaultdict(float)
    for user in range(histories.num_users):
        items = histories.training_items(user).tolist()
        for first, earlier in enumerate(items):
            for second in range(first + 1, min(first + config.window, len(items) - 1) + 1):
                weight = 1 / (second - first) ** config.gap_decay
                pairs[earlier, items[second]] += weight
                pairs[items[second], earlier] += config.backward_weight * weight
    norm = lambda i, j: counts[i] ** config.source_power * counts[j] ** config.target_power + config.shrinkage  # noqa: E731
    found = {(i, j): value / norm(i, j) for (i, j), value in pairs.items() if value}
    if config.neighbours:
        kept = defaultdict(list)
        for (i, j), value in found.items():
            kept[i].append((-np.float32(value), j))
        found = {(i, j): -value for i, row in kept.items() for value, j in sorted(row)[: config.neighbours]}
    return found


@pytest.mark.parametrize("config", SETTINGS)
def test_similarities_are_those_of_loops_over_all_pairs(histories, config):
    expected = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for place, value in similarities_by_loops(histories, config).items():
        expected[place] = value
    found = item_similarities(histories, count_training(histories), config)
    assert found.dtype == np.float32 and found.has_sorted_indices
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-5)


@pytest.mark.parametrize("config", SETTINGS)
def test_scores_are_those_of_loops_over_the_newest_items(histories, config):
    counts = count_training(histories)
    knn = ItemKnn(item_similarities(histories, counts, config), counts, config)
    similar = similarities_by_loops(histories, config)
    asked = [np.array(one, dtype=np.int64) for one in ([3], [1, 2, 3, 4, 5, 6, 7, 2, 2, 0, 9, 1], [], [14])]
    items, scores = knn.recommend(asked, NUM_ITEMS + 2, np.arange(4))
    by_popularity = sorted(range(NUM_ITEMS), key=lambda item: (-counts[item], item))
    for history, listed, values in zip(asked, items, scores):
        newest = list(enumerate(history[::-1].tolist()[: config.num_recent], start=1))
        total = [sum(similar.get((i, item), 0) / a**config.recency_decay for a, i in newest) for item in range(NUM_ITEMS)]
        total = [value or -1 - by_popularity.index(item) for item, value in enumerate(total)]
        np.testing.assert_allclose(values[:NUM_ITEMS], [total[item] for item in listed[:NUM_ITEMS]], rtol=1e-4)
        assert sorted(listed[:NUM_ITEMS]) == list(range(NUM_ITEMS)) and (np.diff(values[:NUM_ITEMS]) <= 0).all()
        assert listed[NUM_ITEMS:].tolist() == [-1, -1] and np.isneginf(values[NUM_ITEMS:]).all()
    assert items[2, :NUM_ITEMS].tolist() == by_popularity  # no history


def test_held_out_items_change_no_similarity():
    rows = [[1, 2, 3, 4], [3, 1, 2, 5, 6], [2, 1]]
    changed = [[1, 2, 9, 8], [3, 1, 2, 9, 8], [2, 1]]
    counts, config = np.full(NUM_ITEMS, 2), ItemKnnConfig()
    first, second = (item_similarities(make_histories(one), counts, config) for one in (rows, changed))
    assert first.nnz and (first != second).nnz == 0


def test_what_came_next_counts_more_than_what_came_later_or_before():
    config = ItemKnnConfig(backward_weight=0.25)
    row = item_similarities(make_histories([[1, 2, 3]] * 4, held_out=9), np.full(NUM_ITEMS, 4), config).toarray()[2]
    assert row[3] > row[1] > 0
    row = item_similarities(make_histories([[1, 2, 3]] * 4, held_out=9), np.full(NUM_ITEMS, 4), config).toarray()[1]
    assert row[2] > row[3] > 0


def test_the_best_of_rows_are_those_of_a_stable_sort():
    scores = np.random.default_rng(0).integers(0, 4, (50, 30)).astype(np.float32)  # ties everywhere
    for k in (1, 7, 30):
        values, items = best_of_rows(scores, k)
        expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        assert np.array_equal(items, expected) and np.array_equal(values, np.take_along_axis(scores, expected, axis=1))


def test_chunks_of_users_change_nothing(histories, monkeypatch):
    counts = count_training(histories)
    knn = ItemKnn(item_similarities(histories, counts, SETTINGS[2]), counts, SETTINGS[2])
    asked = [histories.history(user) for user in range(histories.num_users)]
    whole = knn.recommend(asked, 6, np.arange(len(asked)))
    monkeypatch.setattr("contrec_dist.baselines.item_knn.CHUNK_SCORES", 5 * NUM_ITEMS)
    pieces = knn.recommend(asked, 6, np.arange(len(asked)))
    assert all(np.array_equal(one, other) for one, other in zip(whole, pieces))


def test_as_a_stage_it_finds_what_follows_what_and_its_files_give_the_same_lists(toy_runs, tmp_path):
    draw = np.random.default_rng(0)
    cycles = [[int(start + step) % 60 for step in range(8)] for start in draw.integers(0, 60, 85)] + [[0, 1]] * 5
    config = toy_runs[1](tmp_path / "first", histories=cycles)
    manifest = run_baseline(config, "item_knn")
    assert manifest.facts["validation"]["masked"]["ndcg@10"] == 1.0
    again = run_baseline(toy_runs[1](tmp_path / "second", histories=cycles), "item_knn")
    assert again.files == manifest.files and manifest.facts["num_similarities"] > 0

    knn = load_recommender(config, config.folder("baselines/item_knn"))
    catalogue = Histories.load(config.folder("catalog"))
    users = catalogue.users_with("validation")
    before = [catalogue.history(int(user), int(catalogue.validation_pos[user])) for user in users]
    lists = recommend_views(knn, before, users, 1)["masked"][1]
    assert np.array_equal(lists[:, 0], catalogue.targets(users, "validation"))


@pytest.mark.parametrize(("key", "value"), [("window", 0), ("num_recent", 0), ("shrinkage", -1.0), ("neighbours", -1)])
def test_settings_that_mean_nothing_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"item_knn.{key}"):
        ItemKnnConfig(**{key: value})

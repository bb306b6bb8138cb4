"""retrieval/transitions.py: what followed the newest items, against a loop over the formula."""

import math

import numpy as np
import polars as pl
import pytest

from contrec_dist.baselines.item_knn import item_similarities
from contrec_dist.config import Config, ItemKnnConfig
from contrec_dist.data.catalog import Histories
from contrec_dist.retrieval.scored_users import Users
from contrec_dist.retrieval.transitions import FLOOR, TransitionScores, fit_transitions

KNN = ItemKnnConfig(window=4, num_recent=3, recency_decay=0.7)
NUM_ITEMS = 12


@pytest.fixture
def config(tmp_path) -> Config:
    """Thirty users of twelve items; item 11 is met by nobody."""
    config, draw = Config(name="toy", run_dir=str(tmp_path), item_knn=KNN), np.random.default_rng(0)
    items = [draw.integers(0, NUM_ITEMS - 1, draw.integers(3, 9)).tolist() for _ in range(30)]
    histories = pl.DataFrame({
        "user_idx": range(30), "items": items, "timestamps": [[0] * len(one) for one in items],
        "num_train": [len(one) - 2 for one in items], "validation_pos": [len(one) - 2 for one in items],
        "test_pos": [len(one) - 1 for one in items],
    })  # fmt: skip
    num_train = np.bincount(np.concatenate([one[:-2] for one in items]), minlength=NUM_ITEMS)
    config.folder("catalog").mkdir(parents=True)
    histories.write_parquet(config.folder("catalog") / "histories.parquet")
    pl.DataFrame({"item_idx": range(NUM_ITEMS), "num_train": num_train}).write_parquet(config.folder("catalog") / "items.parquet")
    return config


def make_users(*histories) -> Users:
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in histories])]).astype(np.int64)
    items = np.concatenate([np.array(one, dtype=np.int64) for one in histories])
    none = np.full(len(histories), -1)
    return Users(pl.Series([str(row) for row in range(len(histories))]), none, items, offsets, none)


def test_scores_are_those_of_a_loop_over_the_formula(config, tmp_path):
    fit_transitions(config, tmp_path / "transitions")
    scores = TransitionScores.open(tmp_path / "transitions", KNN)
    num_train = pl.read_parquet(config.folder("catalog") / "items.parquet")["num_train"].to_numpy()
    similarity = item_similarities(Histories.load(config.folder("catalog")), num_train, KNN).toarray()
    histories = [[1, 2, 3, 4, 5], [7], [], [3, 3, NUM_ITEMS + 5], [11]]
    item_idx = np.array([[0, 5, 9, -1], [1, 2, 11, NUM_ITEMS + 5], [0, 1, 2, 3], [10, 9, 8, 7], [0, 1, 2, 3]])
    got = scores.scores(make_users(*histories), item_idx)
    for history, items, row in zip(histories, item_idx, got):
        for item, score in zip(items, row):
            inside = [(age, one) for age, one in enumerate(history[::-1][:3], start=1) if one < NUM_ITEMS and 0 <= item < NUM_ITEMS]
            total = sum(similarity[one, item] / age**0.7 for age, one in inside)
            assert score == pytest.approx(math.log1p(total / FLOOR), rel=1e-5)
    assert got[0].max() > 0 and (got[4] == 0).all() and got.dtype == np.float32


def test_a_user_s_scores_do_not_depend_on_who_else_is_scored(config, tmp_path, monkeypatch):
    fit_transitions(config, tmp_path / "transitions")
    scores, draw = TransitionScores.open(tmp_path / "transitions", KNN), np.random.default_rng(1)
    users = make_users(*[draw.integers(0, NUM_ITEMS, 4) for _ in range(9)])
    item_idx = draw.integers(-1, NUM_ITEMS, (9, 6))
    together = scores.scores(users, item_idx)
    monkeypatch.setattr("contrec_dist.retrieval.transitions.CHUNK_USERS", 2)
    assert np.array_equal(scores.scores(users, item_idx), together)


def test_a_folder_is_complete_or_not_there(config, tmp_path):
    (tmp_path / "transitions.partial").mkdir()
    (tmp_path / "transitions.partial" / "left").write_text("by a killed job")
    fit_transitions(config, tmp_path / "transitions")
    names = {path.name for path in (tmp_path / "transitions").iterdir()}
    assert names == {"similarity_values.npy", "similarity_items.npy", "similarity_offsets.npy"}
    assert not (tmp_path / "transitions.partial").exists()

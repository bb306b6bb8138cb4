"""baselines/sasrec as stages of a small run."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from contrec_dist.baselines.sasrec import baseline, with_text
from contrec_dist.baselines.sasrec.fit import fit_sasrec, limited_threads
from contrec_dist.baselines.stage import find_finished, run_baseline
from contrec_dist.baselines.views import recommend_views
from contrec_dist.data.catalog import Histories, load_items
from contrec_dist.errors import ArtifactError
from contrec_dist.report.lists import list_matrix, load_lists
from contrec_dist.retrieval.recommendations import SCHEMA

SMALL = [
    "sasrec.hidden_size=16", "sasrec.intermediate_size=32", "sasrec.text_hidden_size=16", "sasrec.batch_targets=64",
    "sasrec.num_epochs=4", "sasrec.validate_every_epochs=1", "sasrec.batch_users=32", "sasrec.dropout=0.1",
    "sasrec.learning_rate=1e-2",
]  # fmt: skip
CYCLE = [*SMALL, "sasrec.num_epochs=25", "sasrec.dropout=0", "sasrec.validate_every_epochs=5"]


@pytest.fixture(scope="module")
def cycles():
    """Every item is followed by the next of 60."""
    draw = np.random.default_rng(0)
    return [[int(start + step) % 60 for step in range(8)] for start in draw.integers(0, 60, 85)] + [[0, 1]] * 5


@pytest.fixture(scope="module")
def finished(toy_runs, tmp_path_factory):
    """{name: (config, manifest)} of both, in one run."""
    config = toy_runs[1](tmp_path_factory.mktemp("sasrec"), *SMALL)
    return {name: (config, run_baseline(config, name)) for name in ("sasrec", "sasrec_text")}


def load_matrix(config, name, part, seen):
    users, items = (pl.read_parquet(config.folder("catalog") / f"{kind}.parquet") for kind in ("users", "items"))
    held = Histories.load(config.folder("catalog")).users_with(part)
    return list_matrix(load_lists(config.folder(f"baselines/{name}"), part, seen, users, items), held, config.score.k)


@pytest.mark.parametrize(("name", "module"), [("sasrec", baseline), ("sasrec_text", with_text)])
def test_lists_are_those_of_the_saved_model_in_the_layout_of_the_stage(finished, name, module):
    config, manifest = finished[name]
    histories = Histories.load(config.folder("catalog"))
    model = module.load_recommender(config, config.folder(f"baselines/{name}"))
    for part in ("validation", "test"):
        users = histories.users_with(part)
        before = [histories.history(int(user), int(histories.positions(part)[user])) for user in users]
        views = recommend_views(model, before, users, config.score.k)
        for seen in ("masked", "kept"):
            assert np.array_equal(views[seen][1], load_matrix(config, name, part, seen)) and (views[seen][1] >= 0).all()
            for path in (config.folder(f"baselines/{name}") / f"split={part}" / f"seen={seen}").glob("*.parquet"):
                assert dict(pl.read_parquet(path, hive_partitioning=False).schema) == SCHEMA
        assert not any(set(row) & set(history.tolist()) for row, history in zip(views["masked"][1].tolist(), before))
    assert "sasrec.safetensors" in manifest.files and name in find_finished(config)


@pytest.mark.parametrize("name", ["sasrec", "sasrec_text"])
def test_the_weights_kept_are_the_best_on_validation(finished, name):
    _, manifest = finished[name]
    training = manifest.facts["training"]
    measured = [epoch["ndcg@10"] for epoch in training["epochs"]]
    assert training["best_epoch"] == 1 + int(np.argmax(measured)) and training["validation_users"] == 85
    assert manifest.facts["validation"]["masked"]["ndcg@10"] == pytest.approx(max(measured), abs=1e-6)


@pytest.mark.parametrize("name", ["sasrec", "sasrec_text"])
def test_same_seed_same_bytes_and_another_seed_others(finished, toy_runs, tmp_path, name):
    again = run_baseline(toy_runs[1](tmp_path / "again", *SMALL), name)
    first = finished[name][1]
    assert again.files == first.files and again.facts | {"seconds": None} == first.facts | {"seconds": None}
    other = run_baseline(toy_runs[1](tmp_path / "other", *SMALL, "seed=1"), name)
    assert other.files["sasrec.safetensors"] != again.files["sasrec.safetensors"]


@pytest.mark.parametrize("name", ["sasrec", "sasrec_text"])
@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_it_learns_what_follows_what(toy_runs, tmp_path, cycles, name, loss):
    config = toy_runs[1](
        tmp_path, *CYCLE, "sasrec.validate_every_epochs=25", f"sasrec.loss={loss}", "sasrec.num_negatives=40",
        "score.splits=[validation]", histories=cycles,
    )
    run_baseline(config, name)
    histories = Histories.load(config.folder("catalog"))
    first = load_matrix(config, name, "validation", "masked")[:, 0]
    assert (first == histories.targets(histories.users_with("validation"), "validation")).mean() > 0.97


def fit(config, histories):
    num_train = load_items(config.folder("catalog"))["num_train"].to_numpy()
    return fit_sasrec(config, histories, num_train, None, "sasrec")[0].state_dict()


def test_test_items_change_no_weight(finished, toy_runs):
    config, _ = finished["sasrec"]
    histories = Histories.load(config.folder("catalog"))
    items = histories.items.copy()
    last = (histories.offsets[:-1] + histories.test_pos)[histories.test_pos >= 0]
    items[last] = (items[last] + 7) % 58
    changed = Histories(**{name: getattr(histories, name) for name in histories.__slots__} | {"items": items})
    first, second = fit(config, histories), fit(config, changed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_stops_when_validation_no_longer_improves(toy_runs, tmp_path, cycles):
    config = toy_runs[1](tmp_path, *CYCLE, "sasrec.num_epochs=500", "sasrec.patience=2", histories=cycles)
    training = run_baseline(config, "sasrec").facts["training"]
    measured = [epoch["ndcg@10"] for epoch in training["epochs"] if "ndcg@10" in epoch]
    assert len(training["epochs"]) == training["best_epoch"] + 10 < 500 and measured[-3] == max(measured) > 0.97


def test_its_history_is_the_models_unless_it_has_its_own(toy_runs, tmp_path):
    make_config = toy_runs[0]
    assert baseline.settings(make_config(tmp_path, "prompt.max_history=7"))["max_history"] == 7
    assert baseline.settings(make_config(tmp_path, "prompt.max_history=7", "sasrec.max_history=9"))["max_history"] == 9


def test_embeddings_without_text_are_refused_by_name(finished, toy_runs, tmp_path):
    config = toy_runs[1](tmp_path, *SMALL)
    (config.folder("embeddings") / "layout.json").write_text(json.dumps({"collaborative": [0, 16], "text": [16, 16]}))
    with pytest.raises(ArtifactError, match="layout.json.*no text columns"):
        with_text.load_text_vectors(config)


def test_threads_are_limited_only_inside():
    before = torch.get_num_threads()
    with limited_threads(1):
        assert torch.get_num_threads() == 1
    with limited_threads(0):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before

"""baselines/stage.py, the command, and what `evaluate` takes in, on a small run."""

import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from contrec_dist.__main__ import main
from contrec_dist.baselines.popularity import Popularity, recommend_popular
from contrec_dist.baselines.registry import load_baseline
from contrec_dist.baselines.stage import find_finished, run_baseline
from contrec_dist.baselines.tiger.baseline import load_recommender
from contrec_dist.baselines.views import recommend_views
from contrec_dist.data.catalog import Histories
from contrec_dist.embeddings.layout import read_text_part
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.report import evaluate
from contrec_dist.report.lists import list_matrix, load_lists
from contrec_dist.retrieval.metrics import summarize_lists
from contrec_dist.retrieval.recommendations import SCHEMA


@pytest.fixture(scope="module")
def finished(toy_runs, tmp_path_factory):
    """(config, manifest) of a run whose TIGER is complete."""
    config = toy_runs[1](tmp_path_factory.mktemp("baselines"))
    return config, run_baseline(config, "tiger")


def load_matrix(config, name, part, seen):
    users, items = (pl.read_parquet(config.folder("catalog") / f"{kind}.parquet") for kind in ("users", "items"))
    held = Histories.load(config.folder("catalog")).users_with(part)
    return list_matrix(load_lists(config.folder(f"baselines/{name}"), part, seen, users, items), held, config.score.k)


def test_lists_have_the_columns_and_the_layout_of_the_model(finished):
    config, manifest = finished
    folder = config.folder("baselines/tiger")
    for split in ("validation", "test"):
        for seen in ("masked", "kept"):
            parts = sorted((folder / f"split={split}" / f"seen={seen}").glob("*.parquet"))
            assert [part.name for part in parts] == [f"part-{number:06d}.parquet" for number in range(3)]  # 90 users by 40
            for part in parts:
                frame = pl.read_parquet(part, hive_partitioning=False)
                assert dict(frame.schema) == SCHEMA and set(frame["model_version"]) == {"tiger"}
                assert (frame["score"] <= 0).all() and frame["score"].is_finite().all()
    assert manifest.config["tiger"]["num_codes"] == 8 and manifest.stage == "tiger"
    assert {"semantic_ids.npy", "rq_vae.safetensors", "sequence_model.safetensors"} <= set(manifest.files)


@pytest.mark.parametrize("name", ["tiger", "sasrec_text", "item_knn"])
def test_other_splits_ask_for_other_lists_not_for_another_fit(toy_runs, tmp_path, monkeypatch, name):
    def refuse(*_):
        raise AssertionError("fitted again")

    make = toy_runs[1]
    whole = run_baseline(make(tmp_path / "whole"), name)
    first = run_baseline(make(tmp_path / "run", "score.splits=[validation]"), name)
    monkeypatch.setattr(load_baseline(name), "fit", refuse)
    both = make(tmp_path / "run")
    second = run_baseline(both, name)
    assert second.files == whole.files and set(first.files) < set(second.files)
    assert second.facts | {"seconds": None} == whole.facts | {"seconds": None}
    assert second.facts["seconds"]["fit"] == first.facts["seconds"]["fit"]  # of the fit taken over
    section = {"tiger": "tiger.learning_rate=0.5", "sasrec_text": "sasrec.dropout=0.5", "item_knn": "item_knn.window=2"}[name]
    with pytest.raises(AssertionError, match="fitted again"):
        run_baseline(make(tmp_path / "run", section), name)
    saved = {"tiger": "semantic_ids.npy", "sasrec_text": "sasrec.safetensors", "item_knn": "similarity_items.npy"}[name]
    (both.folder(f"baselines/{name}") / saved).write_bytes(b"x")
    with pytest.raises(AssertionError, match="fitted again"):  # what is damaged is not taken over
        run_baseline(both, name)


def test_every_user_gets_k_items_and_masked_ones_are_unseen(finished):
    config, _ = finished
    histories = Histories.load(config.folder("catalog"))
    for part in ("validation", "test"):
        masked, kept = (load_matrix(config, "tiger", part, seen) for seen in ("masked", "kept"))
        assert (masked >= 0).all() and (kept >= 0).all()
        for row, user in enumerate(histories.users_with(part)):
            assert not set(masked[row]) & set(histories.history(user, histories.positions(part)[user]))


def test_lists_are_what_the_saved_decoder_recommends(finished):
    config, _ = finished
    histories = Histories.load(config.folder("catalog"))
    users = histories.users_with("test")
    before = [histories.history(int(user), int(histories.test_pos[user])) for user in users]
    decoder = load_recommender(config, config.folder("baselines/tiger"))
    views = recommend_views(decoder, before, users, config.score.k)
    for seen in ("masked", "kept"):
        assert np.array_equal(views[seen][1], load_matrix(config, "tiger", "test", seen))


def test_validation_figures_of_the_manifest_are_those_of_the_lists(finished):
    config, manifest = finished
    histories = Histories.load(config.folder("catalog"))
    targets = histories.targets(histories.users_with("validation"), "validation")
    for seen in ("masked", "kept"):
        expected = summarize_lists(load_matrix(config, "tiger", "validation", seen), targets, 60, [10])
        assert manifest.facts["validation"][seen] == {key: expected[key] for key in ("hr@10", "ndcg@10")}


def test_same_seed_same_bytes_and_a_finished_one_is_skipped(finished, toy_runs, tmp_path):
    config, manifest = finished
    again = run_baseline(toy_runs[1](tmp_path), "tiger")
    assert again.files == manifest.files and again.facts | {"seconds": None} == manifest.facts | {"seconds": None}
    assert run_baseline(config, "tiger").seconds == manifest.seconds


def test_evaluate_takes_finished_baselines_in(finished):
    config, manifest = finished
    evaluate.run(config)
    metrics = json.loads((config.folder("report") / "metrics.json").read_text())
    histories = Histories.load(config.folder("catalog"))
    targets = histories.targets(histories.users_with("test"), "test")
    for block, seen in (("baselines", "masked"), ("baselines_unmasked", "kept")):
        assert set(metrics[block]) == {"popularity", "tiger"}
        lists = load_matrix(config, "tiger", "test", seen)
        assert metrics[block]["tiger"] == summarize_lists(lists, targets, 60, [5, 10, 20], read_text_part(config.folder("embeddings")))
    seconds = metrics["baseline_seconds"]["tiger"]
    assert set(seconds) == {"fit", "validation", "test"} and 0 < sum(seconds.values()) <= manifest.seconds
    assert f"tiger fit {seconds['fit']:,.1f} s" in (config.folder("report") / "report.html").read_text()


def test_baselines_that_do_not_belong_are_refused_or_left_out(toy_runs, tmp_path):
    make_config, make_run = toy_runs
    config = make_run(tmp_path)
    wanted = make_config(tmp_path, "evaluate.baselines=[popularity,tiger]")
    with pytest.raises(ArtifactError, match="contrec baseline tiger"):
        evaluate.run(wanted)
    run_baseline(make_config(tmp_path, "score.splits=[validation]"), "popularity")
    assert find_finished(make_config(tmp_path, "evaluate.baselines=[]")) == []
    with pytest.raises(ArtifactError, match="validation.*alone"):
        find_finished(config)
    run_baseline(make_config(tmp_path, "score.k=10"), "popularity")
    with pytest.raises(ArtifactError, match="lists of 10"):
        evaluate.run(config)
    record = config.folder("baselines/popularity") / "manifest.json"
    manifest = json.loads(record.read_text())
    record.write_text(json.dumps(manifest | {"inputs": {"catalog": "another"}}))
    with pytest.raises(ArtifactError, match="another catalog"):
        find_finished(config)


def test_unknown_names_are_named(finished):
    with pytest.raises(ConfigError, match="popularity.*tiger"):
        run_baseline(finished[0], "nearest")


def test_popularity_is_the_same_as_a_baseline_and_in_the_report(toy_runs, tmp_path):
    config = toy_runs[1](tmp_path)
    run_baseline(config, "popularity")
    users, items = (pl.read_parquet(config.folder("catalog") / f"{kind}.parquet") for kind in ("users", "items"))
    held = evaluate.Held.load(Histories.load(config.folder("catalog")), "test")
    for seen in ("masked", "kept"):
        worked_out = recommend_popular(items["num_train"].to_numpy(), 20, held.seen_flat, held.seen_offsets, mask=seen == "masked")
        assert np.array_equal(load_matrix(config, "popularity", "test", seen), worked_out)


def test_lists_that_masking_makes_short_are_refilled_and_a_user_does_not_depend_on_the_others():
    counts = np.arange(300)[::-1]
    histories = [np.arange(200), np.arange(3), np.array([], dtype=np.int64)]
    views = recommend_views(Popularity(counts), histories, np.arange(3), 10)
    assert [views["masked"][1][row].tolist() for row in range(3)] == [
        list(range(200, 210)), list(range(3, 13)), list(range(10))
    ]  # fmt: skip
    assert (views["kept"][1] == np.arange(10)).all()
    asked = {}

    def recommend(batch, k, users):
        for user in users:
            asked.setdefault(int(user), []).append(k)
        return Popularity(counts).recommend(batch, k, users)

    spy = SimpleNamespace(recommend=recommend)
    recommend_views(spy, histories, np.arange(3), 10)
    assert asked == {0: [26, 218], 1: [26], 2: [10]}  # 200 seen items are asked for as 16, then as 208; 3 as 16
    for user, history in enumerate(histories):
        before = asked.pop(user)
        recommend_views(spy, [history], np.array([user]), 10)
        assert asked[user] == before


def test_tiger_learns_what_follows_what(toy_runs, tmp_path):
    draw = np.random.default_rng(0)
    histories = [[int(start + step) % 60 for step in range(8)] for start in draw.integers(0, 60, 85)] + [[0, 1]] * 5
    config = toy_runs[1](
        tmp_path, "tiger.num_epochs=40", "tiger.learning_rate=1e-2", "tiger.dropout=0", "tiger.rqvae_steps=300",
        "tiger.embedding=all", "score.splits=[validation]", histories=histories,
    )  # fmt: skip
    assert run_baseline(config, "tiger").facts["validation"]["masked"]["ndcg@10"] > 0.8


def test_the_command_runs_a_baseline(toy_runs, tmp_path, capsys):
    config = toy_runs[1](tmp_path)
    overrides = ["name=toy", f"run_dir={config.run_dir}", "score.k=20", "score.users_per_part=40"]
    file = tmp_path / "toy.yaml"
    file.write_text("name: toy\n")
    assert main(["baseline", "popularity", "--config", str(file), *overrides[1:]]) == 0
    printed = capsys.readouterr().out
    assert "validation, seen masked: HR@10 0." in printed and "baselines/popularity" in printed
    assert "seconds: fit " in printed
    for wrong in (["--nope"], ["nope"]):
        with pytest.raises(SystemExit):
            main(["baseline", "popularity", "--config", str(file), *wrong])
        assert wrong[0] in capsys.readouterr().err

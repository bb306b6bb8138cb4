"""`contrec pipeline` from an empty folder: every stage's output keeps the contract."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from launched import file_hashes

from contrec_dist.__main__ import STAGES
from contrec_dist.config import Config
from contrec_dist.manifest import Manifest
from contrec_dist.model.export import load_export
from contrec_dist.retrieval.recommendations import SCHEMA

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def run(reference) -> Config:
    return reference[0]


def test_every_stage_leaves_a_manifest_that_its_files_match(run):
    stages = {}
    for path in Path(run.run_dir).glob("*/manifest.json"):
        manifest = Manifest.load(path.parent)
        manifest.check_files(path.parent, deep=True)
        stages[manifest.stage] = manifest
    assert set(stages) == set(STAGES)
    assert not list(Path(run.run_dir).glob(".*.partial")) and not list(Path(run.run_dir).glob(".*.old"))


@pytest.mark.parametrize("folder", ["catalog", "embeddings", "tokenizer", "tokens"])
def test_stages_write_the_same_bytes_from_another_process(run, toy_tokens, folder):
    assert file_hashes(run, folder) == file_hashes(toy_tokens, folder)


def test_metrics_have_the_keys_that_others_read(run):
    metrics = json.loads((run.folder("report") / "metrics.json").read_text())
    assert metrics["dataset"] == "toy" and metrics["split"] == "leave_one_out"
    assert metrics["num_users"] == 150 and metrics["num_items"] == len(_items(run))
    names = {"hr@5", "hr@10", "ndcg@5", "ndcg@10"}
    for block in (metrics["test"], metrics["validation"], metrics["baselines"]["popularity"]):
        assert names <= block.keys() and all(0 <= block[name] <= 1 for name in names)
    assert set(metrics["seconds"]) == set(STAGES)
    assert (run.folder("report") / "report.html").stat().st_size > 10_000


def test_items_that_training_did_not_see_have_the_bias_that_the_softmax_expects(run):
    folder = run.folder("model")
    described, vectors = json.loads((folder / "config.json").read_text()), np.load(folder / "item_vectors.npy")
    model, _ = load_export(folder)
    queries = torch.from_numpy(np.load(folder / "probe_queries.npy"))
    assert described["new_item_bias"] == pytest.approx(model.items.expect_bias(queries[:, :-1]), rel=1e-6)
    trained = model.items.trained.numpy()
    assert (vectors[~trained, -1] == np.float32(described["new_item_bias"])).all()
    assert vectors[trained, -1].min() < described["new_item_bias"] < vectors[trained, -1].max()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_user_gets_k_known_items_ranked_by_score(run, split):
    frame = _recommendations(run, split, "masked")
    assert dict(frame.schema) == SCHEMA
    assert frame["model_version"].unique().to_list() == [Manifest.load(run.folder("model")).content_hash[:12]]
    users = pl.read_parquet(run.folder("catalog") / "users.parquet")["user_id"]
    assert frame["user_id"].unique(maintain_order=True).to_list() == users.to_list()
    assert set(frame["item_id"]) <= set(_items(run)["item_id"])
    for _, rows in frame.group_by("user_id"):
        assert rows["rank"].to_list() == list(range(1, run.score.k + 1))
        assert rows["item_id"].n_unique() == run.score.k
        assert np.all(np.diff(rows["score"].to_numpy()) <= 0)


@pytest.mark.parametrize("split, position", [("validation", "validation_pos"), ("test", "test_pos")])
def test_seen_items_never_come_back(run, split, position):
    items = _items(run)["item_id"].to_numpy()
    users = pl.read_parquet(run.folder("catalog") / "users.parquet")["user_id"].to_list()
    histories = pl.read_parquet(run.folder("catalog") / "histories.parquet")
    frame = _recommendations(run, split, "masked")
    given = {user[0]: set(rows["item_id"]) for user, rows in frame.group_by("user_id")}
    for row in histories.iter_rows(named=True):
        seen = set(items[row["items"][: row[position]]])
        assert not seen & given[users[row["user_idx"]]]


def test_the_model_writes_its_reasons(run):
    """After 21 steps they make no sense yet, and some users get none; but the text is there, one a user."""
    frame = _recommendations(run, "test", "masked")
    assert frame["reason"].null_count() == 0
    assert frame.group_by("user_id").agg(pl.col("reason").n_unique())["reason"].to_list() == [1] * 150
    assert (frame["reason"].str.len_chars() > 0).mean() > 0.5


def _items(run: Config) -> pl.DataFrame:
    return pl.read_parquet(run.folder("catalog") / "items.parquet")


def _recommendations(run: Config, split: str, seen: str) -> pl.DataFrame:
    folder = run.folder("recommendations") / f"split={split}" / f"seen={seen}"
    return pl.concat([pl.read_parquet(path, hive_partitioning=False) for path in sorted(folder.glob("*.parquet"))])

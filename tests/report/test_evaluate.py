"""report/: figures that can be worked out by hand from made-up lists, and a page that holds what it promises."""

import importlib.util
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from contrec_dist.config import load_config
from contrec_dist.data.catalog import load_items, load_users
from contrec_dist.data.sources.generated import GeneratedCatalogue
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import Manifest
from contrec_dist.report import evaluate, plots
from contrec_dist.report.lists import list_matrix, load_lists
from contrec_dist.report.tables import print_table

_spec = importlib.util.spec_from_file_location("run_artifacts", Path(__file__).with_name("run_artifacts.py"))
artifacts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(artifacts)

TOP_KEYS = {
    "dataset", "split", "num_users", "num_items", "test", "validation", "test_unmasked", "validation_unmasked",
    "slices", "intervals", "baselines", "baselines_unmasked", "baseline_slices", "lead_intervals", "seconds",
    "baseline_seconds",
}  # fmt: skip
METRIC_KEYS = {"hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr", "coverage@10", "gini@10", "diversity@10"}
RANKS = [user % 25 if user % 25 <= 20 and user != 84 else 0 for user in range(artifacts.FIRST_TARGETLESS_USER)]


def make_config(folder, *overrides):
    fixed = ["name=toy", f"run_dir={folder}/run", "score.k=20", "evaluate.sampler_users=0"]
    return load_config([], [*fixed, *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, manifest, metrics, page) of one evaluation."""
    config = make_config(tmp_path_factory.mktemp("evaluate"))
    artifacts.write_run(config)
    manifest = evaluate.run(config)
    folder = config.folder("report")
    return config, manifest, json.loads((folder / "metrics.json").read_text()), (folder / "report.html").read_text()


def test_metrics_have_exactly_the_promised_keys(finished):
    _, _, metrics, _ = finished
    assert set(metrics) == TOP_KEYS
    for block in ("test", "validation", "test_unmasked", "validation_unmasked"):
        assert set(metrics[block]) == METRIC_KEYS
    assert set(metrics["baselines"]) == {"popularity"} == set(metrics["baselines_unmasked"])
    assert set(metrics["baselines"]["popularity"]) == METRIC_KEYS
    assert set(metrics["slices"]) == {"popularity", "cold_start"} and len(metrics["slices"]["popularity"]) == 10
    stages = ["prepare", "embed", "tokenize", "precompute", "train", "index", "score", "evaluate"]
    assert set(metrics["seconds"]) == set(stages)
    assert (metrics["dataset"], metrics["split"], metrics["num_items"]) == ("toy", "leave_one_out", 60)


def test_figures_equal_those_worked_out_by_hand(finished):
    _, _, metrics, _ = finished
    assert metrics["num_users"] == len(RANKS) == 85
    for k in (5, 10, 20):
        assert metrics["test"][f"hr@{k}"] == pytest.approx(sum(1 <= rank <= k for rank in RANKS) / 85)
    gains = [1 / math.log2(1 + rank) for rank in RANKS if 1 <= rank <= 10]
    assert metrics["test"]["ndcg@10"] == pytest.approx(sum(gains) / 85)
    assert metrics["test"]["mrr"] == pytest.approx(sum(1 / rank for rank in RANKS if rank) / 85)
    low, high = metrics["intervals"]["hr@10"]
    assert low < metrics["test"]["hr@10"] < high and metrics["intervals"]["level"] == 0.95


def test_diversity_is_that_of_the_texts_alone(finished):
    config, _, metrics, _ = finished
    text = np.load(config.folder("embeddings") / "items.npy")[:, 2:]
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    frame = load_lists(
        config.folder("recommendations"), "test", "masked", load_users(config.folder("catalog")), load_items(config.folder("catalog"))
    )
    lists = frame.filter(pl.col("rank") <= 10).group_by("user_idx").agg("item_idx")["item_idx"].to_list()
    pairs = [[1 - float(unit[a] @ unit[b]) for a in items for b in items if a != b] for items in lists]
    expected = sum(sum(row) / len(row) for row in pairs if row) / metrics["num_users"]
    assert metrics["test"]["diversity@10"] == pytest.approx(expected, abs=1e-6)


def test_slices_count_every_user_once(finished):
    _, _, metrics, _ = finished
    rows = metrics["slices"]["popularity"]
    assert sum(row["num_users"] for row in rows) == 85 and sum(row["num_items"] for row in rows) == 60
    mean = sum(row["num_users"] * (row["hr@10"] or 0) for row in rows) / 85
    assert mean == pytest.approx(metrics["test"]["hr@10"])
    assert metrics["slices"]["cold_start"]["num_users"] >= 2  # users 0 (a miss) and 1 (a hit)
    assert 0 < metrics["slices"]["cold_start"]["hr@10"] < 1


def test_baselines_are_sliced_as_the_model_and_the_lead_has_an_interval(finished):
    _, _, metrics, _ = finished
    slices, baseline = metrics["baseline_slices"]["popularity"], metrics["baselines"]["popularity"]
    assert slices["cold_start"] | {"hr@10": None, "ndcg@10": None} == metrics["slices"]["cold_start"] | {"hr@10": None, "ndcg@10": None}
    assert slices["cold_start"]["hr@10"] == 0, "popularity knows no item that training did not see"
    mean = sum(row["num_users"] * (row["hr@10"] or 0) for row in slices["popularity"]) / 85
    assert mean == pytest.approx(baseline["hr@10"])
    for name, (low, high) in metrics["lead_intervals"]["popularity"].items():
        assert low < metrics["test"][name] - baseline[name] < high


def test_popularity_baseline_sees_the_same_users(finished):
    config, _, metrics, _ = finished
    items = pl.read_parquet(config.folder("catalog") / "items.parquet")
    order = sorted(range(60), key=lambda item: (-items["num_train"][item], item))
    hits = 0
    for history in artifacts.make_histories()[:85]:
        hits += history[-1] in [item for item in order if item not in history[:-1]][:10]
    assert metrics["baselines"]["popularity"]["hr@10"] == pytest.approx(hits / 85)
    assert metrics["baselines_unmasked"]["popularity"]["coverage@10"] == pytest.approx(10 / 60)


class Checker(HTMLParser):
    """Counts what opens and closes, and collects what would be loaded from elsewhere."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.stack, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.stack.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_page_is_whole_and_loads_nothing(finished):
    _, _, metrics, page = finished
    checker = Checker()
    checker.feed(page)
    assert checker.stack == [] and checker.outside == []
    labels = set(re.findall(r'role="img" aria-label="([^"]+)"', page))
    wanted = {"Training losses", "HR@10 by popularity of the held-out item", "Spectrum of the latents", "Seconds of every stage"}
    assert labels == wanted
    assert f"{metrics['test']['hr@10']:.4f}" in page and "sigma-VAE" in page


def test_validation_probe_is_plotted_where_training_left_one(tmp_path):
    config = make_config(tmp_path)
    artifacts.write_run(config)
    identity = Manifest.load(config.folder("model")).identity
    lines = config.folder("checkpoints") / identity[:12] / "probe.jsonl"
    lines.parent.mkdir(parents=True)
    probes = [{"step": step, "num_users": 85, "query_hr@10": step / 1000, "sampler_hr@10": 0.01} for step in (100, 200)]
    lines.write_text("".join(json.dumps(line) + "\n" for line in probes))
    evaluate.run(config)
    folder = config.folder("report")
    page = (folder / "report.html").read_text()
    assert 'aria-label="Loss and validation probe"' in page and "HR@10 by query" in page and "HR@10 by sampler" in page
    assert "HR on 85 validation users" in page
    assert (folder / "loss_and_probe.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "loss_and_probe.png" in Manifest.load(folder).files


def test_a_report_without_probes_has_neither_plot_nor_file(finished):
    config, _, _, page = finished
    assert "Loss and validation probe" not in page and not (config.folder("report") / "loss_and_probe.png").exists()


def test_page_shows_titles_and_reasons_escaped(finished):
    page = finished[3]
    assert "leans to &lt;b&gt;tea&lt;/b&gt;" in page and "<b>tea" not in page
    assert "&amp; &lt;co&gt;" in page and "✓" in page


def test_page_and_figures_are_the_same_when_made_again(finished, tmp_path):
    config = make_config(tmp_path)
    artifacts.write_run(config)
    evaluate.run(config)
    again = json.loads((config.folder("report") / "metrics.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in finished[2].items() if k != "seconds"}
    assert plots.plot_spectrum([2.0, 1.0]) == plots.plot_spectrum([2.0, 1.0])


def test_table_names_the_report_and_the_headline(finished):
    config, manifest, metrics, _ = finished
    text = io.StringIO()
    print_table(manifest.facts, config.folder("report") / "report.html", Console(file=text, width=100))
    printed = text.getvalue()
    for wanted in ("contrec", "popularity", "HR@10", f"{metrics['test']['ndcg@10']:.4f}"):
        assert wanted in printed
    assert str(config.folder("report") / "report.html") in printed


def test_a_seen_item_in_a_masked_list_is_refused(tmp_path):
    config = make_config(tmp_path)
    artifacts.write_run(config, leak=True)
    with pytest.raises(ArtifactError, match="that the user had seen"):
        evaluate.run(config)


def test_oracle_of_the_generated_catalogue_beats_popularity(tmp_path):
    config = make_config(tmp_path, "source.kind=generated", "source.generated.num_items=60",
                         "source.generated.num_categories=4", "source.generated.num_users=90")  # fmt: skip
    catalogue = GeneratedCatalogue.of(config)
    users, drawn, _ = catalogue.draw_histories()
    histories = [drawn[users == user].tolist() for user in range(90)]
    histories = [row[:2] if user >= artifacts.FIRST_TARGETLESS_USER else row for user, row in enumerate(histories)]
    artifacts.write_run(config, item_ids=list(catalogue.item_ids), titles=list(catalogue.titles), histories=histories)
    evaluate.run(config)
    metrics = json.loads((config.folder("report") / "metrics.json").read_text())
    assert metrics["baselines"]["oracle"]["ndcg@10"] > metrics["baselines"]["popularity"]["ndcg@10"]


def test_wrong_settings_are_named(tmp_path):
    config = make_config(tmp_path, "evaluate.ks=[5,30]")
    artifacts.write_run(config)
    with pytest.raises(ConfigError, match="evaluate.ks.*30.*20"):
        evaluate.run(config)
    with pytest.raises(ConfigError, match="evaluate.baselines.*nearest"):
        evaluate.run(make_config(tmp_path, "evaluate.baselines=[nearest]"))
    with pytest.raises(ConfigError, match="evaluate.baselines.*oracle"):
        evaluate.run(make_config(tmp_path, "evaluate.baselines=[oracle]"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"item_id": "nowhere"}, "item is not in the catalogue, the first is 'nowhere'"),
        ({"user_id": "nobody"}, "user is not in the catalogue, the first is 'nobody'"),
        ({"rank": 0}, "rank 0"),
        ({"rank": 2}, "a repeated rank"),
        ({"item_id": "b"}, "a repeated item_idx"),
    ],
)
def test_broken_lists_are_refused(tmp_path, change, message):
    users = pl.DataFrame({"user_id": ["x"], "user_idx": [0]})
    items = pl.DataFrame({"item_id": ["a", "b"], "item_idx": [0, 1]})
    rows = [
        {"user_id": "x", "rank": 1, "item_id": "a", "score": 1.0, "reason": ""} | change,
        {"user_id": "x", "rank": 2, "item_id": "b", "score": 0.5, "reason": ""},
    ]
    folder = tmp_path / "split=test" / "seen=masked"
    folder.mkdir(parents=True)
    pl.DataFrame(rows).write_parquet(folder / "part-000000.parquet")
    with pytest.raises(ArtifactError, match=message):
        load_lists(tmp_path, "test", "masked", users, items)
    with pytest.raises(ArtifactError, match="no Parquet files"):
        load_lists(tmp_path, "test", "kept", users, items)


def test_users_without_a_list_are_rows_of_minus_one():
    frame = pl.DataFrame({"user_idx": [4, 4, 9], "rank": [1, 3, 1], "item_idx": [7, 8, 5], "reason": ["", "", ""]})
    assert list_matrix(frame, np.array([2, 4]), 2).tolist() == [[-1, -1], [7, -1]]


def test_sampler_curve_is_drawn_in_order_of_steps():
    svg = plots.plot_sampler_curve({10: {"hr@10": 0.2}, 1: {"hr@10": 0.1}})
    assert svg.startswith("<svg") and "sampler steps" in svg

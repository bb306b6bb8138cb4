"""baselines/with_transitions.py and views.Reranked on a small run whose items follow one another in a circle."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
from omegaconf import OmegaConf

from contrec_dist.__main__ import main
from contrec_dist.baselines.item_knn import item_similarities
from contrec_dist.baselines.registry import SCORED_BY_LOG_PROBABILITY, load_baseline
from contrec_dist.baselines.stage import find_finished, run_baseline
from contrec_dist.baselines.views import Reranked, as_users, recommend_views
from contrec_dist.baselines.with_transitions import choose_weight
from contrec_dist.data.catalog import Histories, load_items
from contrec_dist.errors import ConfigError, DataError
from contrec_dist.report import evaluate
from contrec_dist.report.lists import list_matrix, load_lists
from contrec_dist.retrieval.transitions import FLOOR, TransitionScores

WEIGHTS = [0.0, 0.5, 2.0]
NUM_CANDIDATES = 30
SMALL = [
    "sasrec.hidden_size=16", "sasrec.intermediate_size=32", "sasrec.text_hidden_size=16", "sasrec.batch_targets=64",
    "sasrec.num_epochs=3", "sasrec.validate_every_epochs=3", "sasrec.batch_users=32", "tiger.beam_width=50",
    f"score.transition_weights={WEIGHTS}", f"score.num_candidates={NUM_CANDIDATES}",
]  # fmt: skip


@pytest.fixture(scope="module")
def circle():
    """Every item is followed by the next of 60, or by the one after."""
    draw = np.random.default_rng(0)
    starts, steps = draw.integers(0, 60, 85), draw.integers(1, 3, (85, 7))
    return [(np.cumsum([start, *row]) % 60).tolist() for start, row in zip(starts, steps)] + [[0, 1]] * 5


@pytest.fixture(scope="module")
def finished(toy_runs, tmp_path_factory, circle):
    """(config, {name: manifest}) of a run with the plain baselines and those with transitions."""
    config = toy_runs[1](tmp_path_factory.mktemp("transitions"), *SMALL, histories=circle)
    plain = {name: run_baseline(config, name) for name in SCORED_BY_LOG_PROBABILITY}
    return config, plain | {f"{name}_transitions": run_baseline(config, f"{name}_transitions") for name in plain}


def load_plain(config, name):
    return load_baseline(name).load_recommender(config, config.folder(f"baselines/{name}"))


def load_matrix(config, name, part, seen):
    users, items = (pl.read_parquet(config.folder("catalog") / f"{kind}.parquet") for kind in ("users", "items"))
    held = Histories.load(config.folder("catalog")).users_with(part)
    return list_matrix(load_lists(config.folder(f"baselines/{name}"), part, seen, users, items), held, config.score.k)


def asked(config, part):
    """Users of a split and what stands before their targets."""
    histories = Histories.load(config.folder("catalog"))
    users = histories.users_with(part)
    return users, [histories.history(int(user), int(histories.positions(part)[user])) for user in users]


def open_transitions(config, name="sasrec"):
    return TransitionScores.open(config.folder(f"baselines/{name}_transitions") / "transitions", config.item_knn)


@pytest.mark.parametrize("name", SCORED_BY_LOG_PROBABILITY)
def test_at_weight_0_it_is_the_plain_baseline(finished, name):
    config, manifests = finished
    users, before = asked(config, "test")
    plain, transitions = load_plain(config, name), open_transitions(config)
    reranked = Reranked(plain, NUM_CANDIDATES, {"transitions": (0.0, transitions.scores)})
    expected, found = (recommend_views(one, before, users, config.score.k) for one in (plain, reranked))
    for view in ("masked", "kept"):
        assert np.array_equal(found[view][1], expected[view][1]) and np.array_equal(found[view][0], expected[view][0])
    measured = manifests[name].facts["validation"]["masked"]["ndcg@10"]
    assert manifests[f"{name}_transitions"].facts["transition_weight_ndcg"]["0.0"] == pytest.approx(measured, abs=1e-12)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_lists_are_the_candidates_by_score_plus_weight_times_what_followed(finished, part):
    config, manifests = finished
    weight = manifests["sasrec_transitions"].facts["transition_weight"]
    catalog, knn = config.folder("catalog"), config.item_knn
    similarity = item_similarities(Histories.load(catalog), load_items(catalog)["num_train"].to_numpy(), knn).toarray()
    users, before = asked(config, part)
    items, scores = load_plain(config, "sasrec").recommend(before, 60, users)
    for seen in ("masked", "kept"):
        lists = load_matrix(config, "sasrec_transitions", part, seen)
        for row, history in enumerate(before):
            reached = sum(similarity[item] / age**knn.recency_decay for age, item in enumerate(history[::-1][: knn.num_recent], 1))
            left = [place for place in range(60) if seen == "kept" or items[row, place] not in history][:NUM_CANDIDATES]
            hybrid = {items[row, place]: scores[row, place] + weight * np.log1p(reached[items[row, place]] / FLOOR) for place in left}
            best = sorted(hybrid.values(), reverse=True)[: config.score.k]
            assert [hybrid[item] for item in lists[row]] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("name", SCORED_BY_LOG_PROBABILITY)
def test_the_weight_is_the_best_on_validation_and_every_figure_is_in_the_facts(finished, name):
    facts = finished[1][f"{name}_transitions"].facts
    figures = facts["transition_weight_ndcg"]
    assert list(figures) == [str(weight) for weight in WEIGHTS] and facts["plain"] == name
    assert figures[str(facts["transition_weight"])] == max(figures.values()) > figures["0.0"]
    assert facts["validation"]["masked"]["ndcg@10"] == pytest.approx(max(figures.values()), abs=1e-12)
    assert facts["num_candidates"] == NUM_CANDIDATES


def test_on_a_tie_the_smaller_weight_is_taken(finished):
    config, _ = finished
    never = open_transitions(config)
    never = TransitionScores(never.similarity * 0, never.config)
    weight, figures = choose_weight(config, load_plain(config, "sasrec"), never)
    assert weight == 0.0 and len(set(figures.values())) == 1


def test_the_plain_baseline_is_an_input_and_not_fitted_again(finished, toy_runs, tmp_path, circle):
    config, manifests = finished
    assert manifests["sasrec_transitions"].inputs["baselines/sasrec"] == manifests["sasrec"].content_hash
    weights = config.folder("baselines/sasrec") / "sasrec.safetensors"
    before = weights.stat().st_mtime_ns, weights.stat().st_ino
    config.score.transition_weights = [1.0]
    again = run_baseline(config, "sasrec_transitions")
    config.score.transition_weights = WEIGHTS
    assert again.facts["transition_weight"] == 1.0 and (weights.stat().st_mtime_ns, weights.stat().st_ino) == before
    fresh = toy_runs[1](tmp_path, *SMALL, histories=circle)
    assert run_baseline(fresh, "sasrec_transitions").files == manifests["sasrec_transitions"].files
    assert (fresh.folder("baselines/sasrec") / "manifest.json").is_file()  # fitted first where it is not there
    run_baseline(config, "sasrec_transitions")


def test_a_list_does_not_depend_on_who_else_is_scored(finished):
    config, _ = finished
    users, before = asked(config, "test")
    reranked = Reranked(load_plain(config, "sasrec_text"), NUM_CANDIDATES, {"transitions": (2.0, open_transitions(config).scores)})
    before[3] = before[3][:0]  # a user without history among them
    together = recommend_views(reranked, before, users, config.score.k)
    for row in (0, 3, 40):
        alone = recommend_views(reranked, [before[row]], users[row : row + 1], config.score.k)
        for view in ("masked", "kept"):
            assert np.array_equal(alone[view][1][0], together[view][1][row])
            np.testing.assert_allclose(alone[view][0][0], together[view][0][row], rtol=1e-5)
    assert as_users(before, users).offsets[4] == as_users(before, users).offsets[3]


def test_evaluate_shows_it_as_a_baseline_of_its_own_beside_the_plain_one(finished):
    config, _ = finished
    evaluate.run(config)
    metrics = json.loads((config.folder("report") / "metrics.json").read_text())
    names = {"popularity", *SCORED_BY_LOG_PROBABILITY, *(f"{name}_transitions" for name in SCORED_BY_LOG_PROBABILITY)}
    assert set(metrics["baselines"]) == set(metrics["baselines_unmasked"]) == set(metrics["lead_intervals"]) == names
    assert metrics["baselines"]["sasrec_transitions"]["ndcg@10"] > metrics["baselines"]["sasrec"]["ndcg@10"]
    assert "sasrec_text_transitions" in (config.folder("report") / "report.html").read_text()


def test_it_is_left_out_where_its_plain_baseline_is_gone_or_another(finished, tmp_path):
    config, _ = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    kept, config.run_dir = config.run_dir, str(tmp_path / "run")
    try:
        shutil.rmtree(config.folder("baselines/tiger"))
        manifest = config.folder("baselines/sasrec") / "manifest.json"
        said = json.loads(manifest.read_text())
        said["files"]["sasrec.safetensors"]["sha256"] = "0" * 64
        manifest.write_text(json.dumps(said))
        assert find_finished(config) == ["sasrec", "sasrec_text", "sasrec_text_transitions"]
    finally:
        config.run_dir = kept


@pytest.mark.parametrize("name", ["text_knn", "item_knn", "popularity"])
def test_scores_that_are_no_log_probabilities_are_refused_by_name(finished, name):
    with pytest.raises(ConfigError, match=f"{name}_transitions.*no log-probabilities.*sasrec_text_transitions.*tiger_transitions"):
        run_baseline(finished[0], f"{name}_transitions")
    with pytest.raises(ConfigError, match="nothing_transitions.*one of.*item_knn"):
        run_baseline(finished[0], "nothing_transitions")


def test_no_weight_above_0_and_a_choice_without_users_are_refused_by_name(toy_runs, tmp_path, circle):
    config = toy_runs[1](tmp_path, *SMALL, "score.transition_weights=[0]", histories=[row[:2] for row in circle])
    with pytest.raises(ConfigError, match="score.transition_weights.*above 0"):
        run_baseline(config, "sasrec_transitions")
    assert not config.folder("baselines/sasrec").exists()  # refused before anything is fitted
    config.score.transition_weights = WEIGHTS
    with pytest.raises(DataError, match="score.transition_weights.*no validation user"):
        run_baseline(config, "sasrec_transitions")


def test_the_command_prints_the_weight_and_what_every_weight_reaches(finished, capsys, tmp_path):
    config, manifests = finished
    file = tmp_path / "toy.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert main(["baseline", "sasrec_transitions", "--config", str(file)]) == 0
    printed = capsys.readouterr().out
    best = manifests["sasrec_transitions"].facts["transition_weight"]
    assert f"weight of the transitions: {best:g} (validation NDCG@10 by weight: 0.0 0." in printed

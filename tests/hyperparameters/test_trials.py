"""`contrec tune` on a small run: real fits, records that a stopped search goes on from, no list of test users."""

import json

import pytest

from contrec_dist.__main__ import main
from contrec_dist.baselines.stage import run_baseline
from contrec_dist.config import load_config
from contrec_dist.errors import ArtifactError, ConfigError, StageStopped
from contrec_dist.hyperparameters import table as table_module
from contrec_dist.hyperparameters import trials as trials_module
from contrec_dist.hyperparameters.space import load_space
from contrec_dist.hyperparameters.trials import Search, best_record, load_records, run_search
from contrec_dist.training.stop import stop_file

SPACE = "item_knn:\n  window: [1, 3, 100]\n  recency_decay: [0.5, 1.3]\n  target_power: [0.0, 0.5]\n"
SOURCE = [
    "source.kind=generated", "source.generated.num_items=60", "source.generated.num_users=120", "source.generated.num_categories=4",
    "source.min_item_interactions=2",
]  # fmt: skip


@pytest.fixture
def make_search(tmp_path):
    """A search of item_knn in a run folder of its own."""

    def make(folder: str, *overrides: str, name="item_knn", space=SPACE) -> Search:
        (tmp_path / "space.yaml").write_text(space)
        arguments = [f"run_dir={tmp_path}/{folder}", "name=toy", *SOURCE, *overrides]
        return Search(name=name, space=load_space(tmp_path / "space.yaml", [], arguments), files=[], overrides=arguments)

    return make


def figures(records) -> list[tuple]:
    return [(one["number"], one["values"], one["ndcg@10"]) for one in records]


def test_a_trial_is_the_baseline_of_its_settings_on_validation_users_alone(make_search):
    search = make_search("run")
    records = run_search(search, 4)
    assert [one["number"] for one in records] == [0, 1, 2, 3] and records[0]["values"] == search.space.start
    last = records[-1]
    own = search.trial_config(3, last["values"])
    folder = own.folder("baselines/item_knn")
    assert (folder / "split=validation").is_dir() and not (folder / "split=test").exists()
    assert own.item_knn.window == last["values"]["item_knn.window"]
    alone = load_config([], [*search.overrides, *(f"{key}={value}" for key, value in last["values"].items()), f"run_dir={own.run_dir}"])
    assert run_baseline(alone, "item_knn").facts["validation"]["masked"]["ndcg@10"] == last["ndcg@10"]
    assert best_record(records)["ndcg@10"] == max(one["ndcg@10"] for one in records) > min(one["ndcg@10"] for one in records)


def test_a_search_that_was_stopped_goes_on_as_one_that_never_was(make_search, monkeypatch):
    whole = run_search(make_search("whole"), 5)
    parts, real = make_search("parts"), trials_module.run_baseline

    def killed(config, name):
        if config.run_dir.endswith("002"):
            raise KeyboardInterrupt
        return real(config, name)

    monkeypatch.setattr(trials_module, "run_baseline", killed)
    with pytest.raises(KeyboardInterrupt):
        run_search(parts, 5)
    assert len(load_records(parts)) == 2
    monkeypatch.setattr(trials_module, "run_baseline", real)
    stop_file(parts.config).touch()
    with pytest.raises(StageStopped, match="stopped before trial 2"):
        run_search(parts, 5)
    assert figures(run_search(parts, 5)) == figures(whole)


def test_records_of_another_config_or_space_are_refused(make_search):
    run_search(make_search("run"), 1)
    for other in (make_search("run", "item_knn.shrinkage=7"), make_search("run", space=SPACE.replace("100", "50")), make_search("run", "seed=3")):
        with pytest.raises(ArtifactError, match="trials of another config"):
            run_search(other, 2)
    run_search(make_search("run", "ray.num_workers=1", "launch.threads=1"), 1)  # how it is executed changes nothing


def test_settings_that_fail_are_told_and_the_others_go_on(make_search):
    """Widths and heads fit one by one, not every two of them."""
    space = "sasrec:\n  num_heads: [1, 2]\n  hidden_size: [8, 9]\n"
    records = run_search(make_search("run", "sasrec.hidden_size=8", "sasrec.num_heads=1", "sasrec.num_epochs=1", name="sasrec", space=space), 9)
    failed = [one for one in records if "error" in one]
    assert [one["values"] for one in failed] == [{"sasrec.num_heads": 2, "sasrec.hidden_size": 9}] and "hidden_size" in failed[0]["error"]
    assert len(records) == 4 and sum("ndcg@10" in one for one in records) == 3  # all there are


def test_a_config_that_cannot_run_is_no_trial(make_search):
    search = make_search("run", "source.generated.num_items=5")
    with pytest.raises(ConfigError, match="num_items"):
        run_search(search, 3)
    assert load_records(search) == []


def test_the_command_writes_the_best_settings_as_a_config(make_search, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table_module, "SHOWN_TRIALS", 2)
    search = make_search("run")
    arguments = ["tune", "item_knn", "--trials", "3", "--space", str(tmp_path / "space.yaml"), *search.overrides]
    assert main(arguments) == 0 == main(arguments)
    printed = capsys.readouterr().out
    assert "and 1 more" in printed  # trials.md has all, below
    assert "toy: item_knn tuned" in printed and "best settings" in printed and "nothing: the config as it is" in printed
    assert f"{best_record(load_records(search))['ndcg@10']:.4f}" in printed  # whole on a terminal of 80 columns
    records, folder = json.loads((search.folder / "trials.json").read_text())["trials"], search.folder
    tuned = load_config([str(folder / "best.yaml")], search.overrides)
    assert tuned.item_knn.window == best_record(records)["values"]["item_knn.window"]
    table = [line for line in (folder / "trials.md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 3 and f"| {best_record(records)['number']} |" in table[2]


def test_names_and_numbers_that_cannot_be_are_refused_before_anything_runs(make_search, tmp_path):
    search = make_search("run")
    for arguments in (["knn"], ["item_knn", "--trials", "0"], ["item_knn", "score.users_file=x.csv"]):
        assert main(["tune", *arguments, "--space", str(tmp_path / "space.yaml"), *search.overrides]) == 1
    assert not (tmp_path / "run" / "catalog").exists()

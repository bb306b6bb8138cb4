"""hyperparameters/space.py and proposal.py: what may be chosen, and what is tried next."""

from pathlib import Path

import pytest

from contrec_dist.baselines.registry import BASELINES
from contrec_dist.config import load_config
from contrec_dist.errors import ConfigError
from contrec_dist.hyperparameters.proposal import RANDOM_TRIALS, propose
from contrec_dist.hyperparameters.space import SearchSpace, as_override, load_space, read_key

ROOT = Path(__file__).resolve().parents[2]
SPACES = sorted((ROOT / "configs/tuning").glob("*.yaml"))
TOY = SearchSpace({"a": tuple(range(8)), "b": ("x", "y", "z"), "c": (0.1, 0.2, 0.4, 0.8)}, {"a": 3, "b": "y", "c": 0.8})


def write_space(folder: Path, text: str) -> Path:
    (folder / "space.yaml").write_text(text)
    return folder / "space.yaml"


@pytest.mark.parametrize(("path", "name"), list(zip(SPACES, ["beauty", "ml1m", "lastfm", "games", "demo"])), ids=lambda one: getattr(one, "stem", one))
def test_a_shipped_space_fits_shipped_configs_and_starts_from_them(path, name):
    file = str(ROOT / f"configs/{name}.yaml")
    space, own = load_space(path, [file], []), load_config([file])
    assert dict(space.start) == {key: read_key(own, key) for key in space.choices} and space.size > 20
    changed = load_config([file], [as_override(key, values[-1]) for key, values in space.choices.items()])
    assert all(read_key(changed, key) == values[-1] for key, values in space.choices.items())


def test_every_space_is_of_the_model_or_of_a_baseline():
    assert [path.stem for path in SPACES] == sorted({"contrec", *BASELINES} & {path.stem for path in SPACES}) and len(SPACES) == 5


def test_the_configs_own_value_joins_the_choices_and_numbers_rise(tmp_path):
    path = write_space(tmp_path, "tiger:\n  dropout: [0.3, 0.1]\n  embedding: [all, text]\nscore:\n  text_weights: [[0.0], [1.0, 2.0]]\n")
    space = load_space(path, [], ["name=x", "tiger.dropout=0.25", "score.text_weights=[0.5]"])
    assert space.choices == {
        "tiger.dropout": (0.1, 0.25, 0.3), "tiger.embedding": ("all", "text"), "score.text_weights": ([0.0], [1.0, 2.0], [0.5])
    }  # fmt: skip
    assert space.start == {"tiger.dropout": 0.25, "tiger.embedding": "text", "score.text_weights": [0.5]} and space.size == 18


@pytest.mark.parametrize(("text", "named"), [
    ("tiger:\n  dropout: 0.3\n", "tiger.dropout.*got 0.3, expected a list"),
    ("tiger:\n  dropout: []\n", "tiger.dropout.*expected a list"),
    ("tiger:\n  dropouts: [0.3]\n", "tiger.dropouts.*did you mean 'tiger.dropout'"),
    ("tiger:\n  dropout: [0.3, much]\n", "tiger.dropout.*much"),
    ("tiger:\n  embedding: [all, none]\n", "tiger.embedding.*none"),
    ("- 1\n", "a list, expected a mapping"),
    ("{}\n", "got nothing, expected keys"),
    ("a: [1\n", "space.yaml"),
])  # fmt: skip
def test_a_space_that_no_config_can_have_is_refused_by_name(tmp_path, text, named):
    with pytest.raises(ConfigError, match=named):
        load_space(write_space(tmp_path, text), [], ["name=x"])


def test_a_space_that_is_not_there_is_named_beside_those_that_are():
    with pytest.raises(ConfigError, match="absent.yaml.*sasrec.yaml"):
        load_space(ROOT / "configs/tuning/absent.yaml", [], ["name=x"])


def run(num_trials: int, figure, seed=0, space=TOY, tried=()):
    tried = list(tried)
    while len(tried) < num_trials and (values := propose(space, tried, seed)) is not None:
        tried.append((values, figure(values)))
    return tried


def hill(values) -> float:
    return -abs(values["a"] - 6) - 2 * (values["b"] != "z") - abs(values["c"] - 0.2)


def test_the_first_setting_is_the_configs_own_and_none_comes_twice_until_all_were_tried():
    tried = [values for values, _ in run(500, hill)]
    assert tried[0] == TOY.start
    assert len(tried) == TOY.size == len({tuple(values.values()) for values in tried})


def test_a_search_that_was_stopped_goes_on_as_one_that_never_was():
    whole = run(20, hill)
    assert run(20, hill, tried=whole[:7]) == whole == run(20, hill, tried=whole[:15])
    assert run(20, hill, seed=1) != whole


def test_the_estimator_finds_more_than_chance_does():
    """Of 96 settings; the best of 30 by luck alone is the best of all in 31% of searches."""
    found = [max(figure for _, figure in run(30, hill, seed=seed)) for seed in range(8)]
    assert sum(figure == hill({"a": 6, "b": "z", "c": 0.2}) for figure in found) >= 6


def test_settings_that_failed_are_not_proposed_again():
    def fails(values):
        return None if values["b"] == "x" else hill(values)

    tried = run(RANDOM_TRIALS + 20, fails)
    assert len({tuple(values.values()) for values, _ in tried}) == RANDOM_TRIALS + 20
    assert any(figure is None for _, figure in tried)

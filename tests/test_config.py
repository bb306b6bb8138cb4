"""load_config: precedence, the named errors, and every YAML that is shipped."""

import dataclasses
import pickle
from pathlib import Path

import pytest

from contrec_dist import config as config_module
from contrec_dist.config import Config, load_config
from contrec_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/ablation/*.yaml")])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_arguments_win_over_later_files_over_earlier_files_over_defaults(tmp_path):
    first = write(tmp_path / "first.yaml", "name: first\ntrain: {num_epochs: 3, clip_norm: 2.0, weight_decay: 0.5}\n")
    second = write(tmp_path / "second.yaml", "train: {num_epochs: 4, clip_norm: 3.0}\n")
    config = load_config([first, second], ["train.num_epochs=5"])
    assert config.name == "first"
    assert (config.train.num_epochs, config.train.clip_norm, config.train.weight_decay) == (5, 3.0, 0.5)
    assert config.train.learning_rate == Config(name="x").train.learning_rate


def test_the_result_is_plain_dataclasses_with_interpolations_resolved():
    config = load_config([], ["name=toy", "evaluate.ks=[1,3]"])
    assert type(config) is Config and type(config.train) is config_module.TrainConfig
    assert config.run_dir == "runs/toy" and config.folder("catalog") == Path("runs/toy/catalog")
    assert type(config.evaluate.ks) is list and config.evaluate.ks == [1, 3]
    assert pickle.loads(pickle.dumps(config)) == config


def test_two_configs_share_no_list():
    first, second = load_config([], ["name=a"]), load_config([], ["name=b"])
    first.evaluate.ks.append(99)
    assert 99 not in second.evaluate.ks and 99 not in load_config([], ["name=c"]).evaluate.ks


@pytest.mark.parametrize(
    ("argument", "key", "nearest"),
    [
        ("train.num_epoch=1", "train.num_epoch", "'train.num_epochs'"),
        ("backbone.lora.rnk=8", "backbone.lora.rnk", "'backbone.lora.rank'"),
        ("traim.num_epochs=1", "traim", "'train'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(argument, key, nearest):
    with pytest.raises(ConfigError) as caught:
        load_config([], ["name=x", argument])
    assert caught.value.key == key and nearest in caught.value.expected


def test_an_unknown_key_of_a_file_is_refused_too(tmp_path):
    path = write(tmp_path / "run.yaml", "name: x\nhead: {widht: 3}\n")
    with pytest.raises(ConfigError, match="head.widht.*head.width"):
        load_config([path])


@pytest.mark.parametrize(
    ("argument", "key", "got", "expected"),
    [
        ("head.schedule=cosin", "head.schedule", "cosin", "['cosine', 'linear']"),
        ("zero.stage=5", "zero.stage", "5", "[0, 1, 2, 3]"),
        ("train.num_epochs=many", "train.num_epochs", "many", "Integer"),
        ("train.num_epochs=1.5", "train.num_epochs", "1.5", "Integer"),
        ("train.num_epochs=null", "train.num_epochs", "null", "int"),
        ("score.text_weights=[0.1,b]", "score.text_weights[1]", "b", "Float"),
        ("evaluate.ks=5", "evaluate.ks", "5", "list"),
        ("train=5", "train", "5", "TrainConfig"),
        ("run_dir=${nothing}", "run_dir", "", "nothing"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_what_was_expected(argument, key, got, expected):
    with pytest.raises(ConfigError) as caught:
        load_config([], ["name=x", argument])
    assert str(caught.value.key) == key
    assert got in str(caught.value.got) and expected in caught.value.expected


@pytest.mark.parametrize("name", ["text_weights", "transition_weights", "new_item_bonuses"])
def test_candidates_for_a_weight_are_finite_and_at_least_one(name):
    for wrong in ("[]", "[0.0,.nan]", "[.inf]"):
        with pytest.raises(ConfigError, match=f"score.{name}.*one or more finite numbers"):
            load_config([], ["name=x", f"score.{name}={wrong}"])
    with pytest.raises(ConfigError, match="score.new_item_cost.*1.0"):
        load_config([], ["name=x", "score.new_item_cost=1.0"])


def test_a_run_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="'name'.*nothing"):
        load_config([])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("- a\n- b\n", "mapping"), ("name: x\n  bad: [1,\n", "line 2"), ("name: x\nname: y\n", "duplicate"), ("train: 5\n", "TrainConfig")],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, expected):
    path = write(tmp_path / "wrong.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config([path], ["name=x"])
    assert caught.value.key == str(path) and expected in str(caught.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config(["nowhere.yaml"])


def test_a_file_whose_name_holds_an_equals_sign_is_read_as_a_file(tmp_path):
    path = write(tmp_path / "lr=3.yaml", "name: from_file\n")
    assert load_config([str(path)]).name == "from_file"


def test_values_may_hold_equals_signs_and_be_long():
    text = "a=b " * 200
    assert load_config([], ["name=x", f"prompt.instruction='{text}'"]).prompt.instruction == text


def component_classes():
    return [value for value in vars(config_module).values() if dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("component", component_classes(), ids=lambda component: component.__name__)
def test_every_field_is_followed_by_its_meaning(component):
    """Sections of Config say theirs in their own class docstring."""
    source = Path(config_module.__file__).read_text().partition(f"class {component.__name__}:")[2].splitlines()
    for field in dataclasses.fields(component):
        if component is Config and dataclasses.is_dataclass(field.type):
            assert field.type.__doc__
            continue
        start = next(number for number, line in enumerate(source) if line.startswith(f"    {field.name}: "))
        following = [line.strip() for line in source[start + 1 : start + 4]]
        assert any(line.startswith('"') for line in following), f"{component.__name__}.{field.name} has no meaning"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_shipped_config_loads(path):
    overlay = [] if "name:" in path.read_text() else ["name=overlay"]
    config = load_config([path], overlay)
    assert isinstance(config, Config) and config.name and "${" not in config.run_dir

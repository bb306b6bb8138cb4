"""A DeepSpeed JSON beside the config: which of the two decides what, and what a finished model makes of it."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from contrec_dist.config import Config, ZeroConfig
from contrec_dist.errors import ConfigError
from contrec_dist.training.deepspeed_file import counted_settings, is_settings_source, read_settings
from contrec_dist.training.tuning import is_trial, trial_config
from contrec_dist.training.zero3 import deepspeed_config
from launchers.train import main


def with_settings(folder: Path, settings: dict, **changes) -> Config:
    """A config (32 rows a step, 8 a pass, on 2 ranks: 2 passes) with a JSON of these settings."""
    path = folder / "ds.json"
    path.write_text(json.dumps(settings))
    config = Config(name="toy", **changes)
    return replace(config, launch=replace(config.launch, deepspeed_config=str(path)))


def merged(folder: Path, settings: dict, **changes) -> dict:
    return deepspeed_config(with_settings(folder, settings, **changes), world_size=2)


def test_without_a_file_nothing_changes():
    assert "comms_logger" not in deepspeed_config(Config(name="toy"), 2)
    assert counted_settings(Config(name="toy")) is None


def test_what_the_config_does_not_decide_is_taken_as_it_is(tmp_path):
    given = {"comms_logger": {"enabled": True}, "steps_per_print": 7, "a_key_of_a_later_version": 3}
    settings = merged(tmp_path, given)
    assert {name: settings[name] for name in given} == given
    assert settings["train_batch_size"] == 32 and settings["zero_optimization"]["stage"] == 3


def test_equal_values_are_no_conflict(tmp_path):
    given = {
        "train_batch_size": 32, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2,
        "gradient_clipping": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.05}},
    }  # fmt: skip
    assert merged(tmp_path, given) == deepspeed_config(Config(name="toy"), 2)


def test_auto_is_filled_from_the_config(tmp_path):
    """The file that Hugging Face's documentation shows: everything auto."""
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    buckets = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    given = {
        **dict.fromkeys(sizes, "auto"), "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "zero_optimization": {"stage": 3, **dict.fromkeys(buckets, "auto"), "not_derived": "auto"},
    }  # fmt: skip
    assert merged(tmp_path, given) == deepspeed_config(Config(name="toy"), 2)


def test_one_error_names_every_conflict_with_both_keys_and_both_values(tmp_path):
    given = {
        "train_batch_size": 64, "gradient_clipping": 0.5, "zero_optimization": {"stage": 2}, "fp16": {"enabled": True},
        "optimizer": {"type": "Lamb", "params": {"lr": 1e-4}}, "scheduler": {"type": "WarmupLR"},
    }  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        merged(tmp_path, given)
    for part in (
        "train_batch_size=64 but train.global_batch_rows: 32", "gradient_clipping=0.5 but train.clip_norm: 1.0",
        "zero_optimization.stage=2 but zero.stage: 3", 'fp16.enabled=true but backbone.precision (fp32 weights): "auto"',
        'optimizer.type="Lamb" but the optimizer: "AdamW"', "optimizer.params.lr=0.0001 but train.learning_rate: 0.001",
        'scheduler.type="WarmupLR" but train.warmup_ratio, then cosine: 0.05',
    ):  # fmt: skip
        assert part in str(refused.value)
    assert str(refused.value).count("; ") == 6  # and no conflict beside these seven


@pytest.mark.parametrize("name", ["bf16", "torch_autocast", "amp"])
def test_another_precision_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}.enabled=true"):
        merged(tmp_path, {name: {"enabled": True}})


def test_an_optimizer_argument_without_use_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="optimizer.params.freeze_step=3"):
        merged(tmp_path, {"optimizer": {"type": "AdamW", "params": {"freeze_step": 3}}})


def test_buckets_and_offloading_come_from_the_file_while_the_config_has_its_defaults(tmp_path):
    given = {"stage": 3, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu", "buffer_count": 5}}
    zero = merged(tmp_path, {"zero_optimization": given})["zero_optimization"]
    assert {name: zero[name] for name in given} == given
    assert zero["stage3_prefetch_bucket_size"] == ZeroConfig().bucket_elements
    with pytest.raises(ConfigError, match="reduce_bucket_size=1000 but zero.bucket_elements: 500"):
        merged(tmp_path, {"zero_optimization": given}, zero=ZeroConfig(bucket_elements=500))


def test_details_of_offloading_join_the_switch_of_the_config(tmp_path):
    zero = ZeroConfig(offload_optimizer=True)
    section = {"offload_optimizer": {"device": "cpu", "buffer_count": 5}}
    merged_section = merged(tmp_path, {"zero_optimization": section}, zero=zero)["zero_optimization"]["offload_optimizer"]
    assert merged_section == {"device": "cpu", "pin_memory": True, "buffer_count": 5}
    with pytest.raises(ConfigError, match='offload_optimizer="nvme" but zero.offload_optimizer: true'):
        merged(tmp_path, {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, zero=zero)


def test_only_what_may_change_numbers_enters_the_identity(tmp_path):
    how = {"steps_per_print": 7, "wandb": {"enabled": False}, "train_batch_size": 32,
           "zero_optimization": {"stage": 3, "reduce_bucket_size": 10, "offload_optimizer": {"device": "cpu"}}}  # fmt: skip
    assert counted_settings(with_settings(tmp_path, how)) is None
    what = {"communication_data_type": "fp16", "zero_optimization": {"zero_quantized_gradients": True}}
    counted = counted_settings(with_settings(tmp_path, {**how, **what}))
    assert counted == {"deepspeed": {"communication_data_type": "fp16", "zero_optimization.zero_quantized_gradients": True}}


def test_the_autotuner_passes_base64_and_people_write_comments(tmp_path):
    settings = {"steps_per_print": 7, "autotuning": {"metric_path": "m" * 5000}}  # no file name is so long
    encoded = base64.urlsafe_b64encode(json.dumps(settings).encode()).decode()
    assert read_settings(encoded) == settings and is_settings_source(encoded)
    (tmp_path / "ds.json").write_text('{\n  // how often it prints\n  "steps_per_print": 7\n}')
    assert read_settings(str(tmp_path / "ds.json")) == {"steps_per_print": 7}


def test_a_file_for_the_autotuner_trains_to_the_end_and_only_what_it_passes_is_a_trial(tmp_path):
    settings = {
        "autotuning": {"enabled": True, "end_profile_step": 3}, "zero_optimization": {"stage": 1, "reduce_bucket_size": 7},
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3, "train_batch_size": 99,
    }  # fmt: skip
    by_hand = with_settings(tmp_path, {"autotuning": settings["autotuning"]})
    assert not is_trial(by_hand) and "autotuning" not in deepspeed_config(by_hand, 2)
    passed = base64.urlsafe_b64encode(json.dumps(settings).encode()).decode()
    trial = replace(by_hand, zero=ZeroConfig(bucket_elements=500), launch=replace(by_hand.launch, deepspeed_config=passed))
    assert is_trial(trial)
    owned = deepspeed_config(trial_config(trial, 2), 2)
    assert owned["train_micro_batch_size_per_gpu"] == 4 and owned["train_batch_size"] == 4 * 3 * 2
    assert owned["zero_optimization"]["stage"] == 1 and owned["zero_optimization"]["reduce_bucket_size"] == 7
    assert owned["autotuning"] == settings["autotuning"] and trial_config(trial, 2).train.max_steps > 3 + 1


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[1, 2]", '{"a": '])
def test_a_file_that_cannot_be_used_is_named(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match="ds.json"):
        read_settings(str(tmp_path / "ds.json"))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="absent.json.*no such file"):
        read_settings("absent.json")


@pytest.mark.parametrize(
    ("words", "overrides", "settings"),
    [
        (["--config", "a.yaml", "seed=1"], ["seed=1"], ""),
        (["--deepspeed", "--deepspeed_config", "ds.json", "--config", "a.yaml", "seed=1"], ["seed=1"], "ds.json"),
        (["--config", "a.yaml", "seed=1", "--deepspeed", "ds.json"], ["seed=1"], "ds.json"),
        (["--local-rank=1", "a=1", "--deepspeed", "b=2", "--deepspeed_config", "ds.json"], ["b=2", "a=1"], "ds.json"),
        (["--local_rank", "1", "--deepspeed_config", "ds.json", "seed=1"], ["seed=1"], "ds.json"),
    ],
)
def test_the_launcher_takes_the_switches_of_deepspeed_scripts(monkeypatch, words, overrides, settings):
    seen = []
    monkeypatch.setattr("launchers.train.train_rank", lambda *arguments: seen.append(arguments) or 0)
    assert main(words) == 0
    assert seen == [(["a.yaml"] if "--config" in words else [], overrides, settings)]

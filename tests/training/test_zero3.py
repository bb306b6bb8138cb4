"""training/zero3.py: the DeepSpeed dictionary, the parameter groups and the learning rate, by their numbers."""

import math

import pytest
import torch
from torch import nn

from contrec_dist.config import Config, TrainConfig, ZeroConfig
from contrec_dist.errors import ConfigError
from contrec_dist.training.zero3 import (
    NO_DECAY_NAMES,
    accumulation_steps,
    deepspeed_config,
    learning_rate_at,
    parameter_groups,
)


def make_config(zero=None, **train) -> Config:
    settings = {"global_batch_rows": 48, "micro_batch_rows": 2, **train}
    return Config(name="test", train=TrainConfig(**settings), zero=ZeroConfig(**(zero or {})))


def run_of(num_steps, warmup_ratio=0.1):
    """Rates of a run, step by step, as the loop asks for them."""
    return [learning_rate_at((step + 1) / num_steps, peak=2.0, warmup_ratio=warmup_ratio) for step in range(num_steps)]


@pytest.mark.parametrize("num_steps", [7, 100, 1000])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.5])
def test_learning_rate_rises_once_then_falls_along_a_cosine_to_zero(num_steps, warmup_ratio):
    rates = run_of(num_steps, warmup_ratio)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[0] and max(rates) <= 2.0 and rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert len(set(rates)) > num_steps * 0.7  # it never stands still, nor jumps between a few values
    assert (top + 1) / num_steps <= warmup_ratio + 1 / num_steps


def test_learning_rate_at_places_computed_by_hand():
    def rate(progress):
        return learning_rate_at(progress, peak=2.0, warmup_ratio=0.2)

    assert [rate(progress) for progress in (0.05, 0.1, 0.2)] == pytest.approx([0.5, 1.0, 2.0])
    assert rate(0.6) == pytest.approx(1.0)  # half way down
    assert rate(0.4) == pytest.approx(1 + math.cos(math.pi / 4))
    assert rate(1.0) == rate(1.5) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(world_size):
    config = make_config()
    settings = deepspeed_config(config, world_size)
    per_step = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * world_size
    assert per_step == settings["train_batch_size"] == 48


def test_a_global_batch_without_a_whole_accumulation_is_a_named_error():
    with pytest.raises(ConfigError, match=r"train.global_batch_rows.*48.*2 \* 5 = 10"):
        accumulation_steps(make_config(), world_size=5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_dictionary_follows_the_config(stage):
    zero = {"stage": stage, "persistence_threshold": 11, "bucket_elements": 22}
    settings = deepspeed_config(make_config(zero, clip_norm=0.7), world_size=1)
    section = settings["zero_optimization"]
    assert section["stage"] == stage and section["reduce_bucket_size"] == 22 and settings["gradient_clipping"] == 0.7
    assert section.get("stage3_param_persistence_threshold") == (11 if stage == 3 else None)
    assert "optimizer" not in settings and "scheduler" not in settings  # ours: no compiled optimizer, no second schedule
    assert not {"fp16", "bf16"} & set(settings)  # weights are fp32


def test_offload_is_asked_for_by_name_only():
    assert "offload_optimizer" not in deepspeed_config(make_config(), 1)["zero_optimization"]
    section = deepspeed_config(make_config({"offload_optimizer": True}), 1)["zero_optimization"]
    assert section["offload_optimizer"]["device"] == "cpu"


def test_matrices_decay_and_vectors_biases_markers_and_frozen_weights_do_not(make_world):
    model = make_world([[1, 2, 3, 4]]).build_model()
    frozen = model.inputs.join_vector.weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, weight_decay=0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_decayed, in_plain = ({names[id(p)] for p in group["params"]} for group in (decayed, plain))
    assert not in_decayed & in_plain and in_decayed | in_plain == set(names.values()) - {names[id(frozen)]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (name in in_plain) == (parameter.dim() < 2 or name.endswith(NO_DECAY_NAMES)), name
    assert all(any(name.endswith(one) for name in in_plain) for one in NO_DECAY_NAMES)  # none of the names is stale


def test_trainable_parameters_of_two_dtypes_are_a_named_error():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16)])
    with pytest.raises(ConfigError, match="bfloat16.*float32"):
        parameter_groups(model, 0.0)
    model[1].requires_grad_(False)
    assert len(parameter_groups(model, 0.0)[0]["params"]) == 1  # frozen weights may have any

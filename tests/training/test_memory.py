"""training/memory.py and training/dry_step.py: the dry step counts what a real one holds, and ZeRO cuts what it says."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from contrec_dist.__main__ import main
from contrec_dist.commands.estimate import data_sizes
from contrec_dist.config import Config, LoraConfig, ShapeConfig
from contrec_dist.errors import ConfigError
from contrec_dist.model.backbone import load_backbone
from contrec_dist.model.export import build_model
from contrec_dist.training.dry_step import (
    DataSizes,
    _lay_out_rows,
    _LiveBytes,
    _make_batch,
    build_empty_model,
    count_parameters,
    run_dry_step,
)
from contrec_dist.training.memory import BASE_BYTES, estimate_memory

SIZES = DataSizes(num_items=500, vocab_size=1000, sample_items=(4, 9))
NO_ARGUMENTS = SimpleNamespace(num_items=None, mean_history=None, num_tokenizer_words=None)


def make_config(**backbone) -> Config:
    config = Config(name="toy")
    shape = ShapeConfig(hidden_size=64, num_layers=3, num_heads=2, intermediate_size=96)
    return replace(
        config,
        backbone=replace(config.backbone, **{"shape": shape, "precision": "fp32", **backbone}),
        train=replace(config.train, row_tokens=128, micro_batch_rows=4, global_batch_rows=16),
    )


def peaks(config: Config, **arguments) -> dict[int, int]:
    arguments = {"ranks": 2, "stages": [0, 1, 2, 3], "on_gpu": True, **arguments}
    return {one.stage: one.bytes for one in estimate_memory(config, SIZES, **arguments)}


def run_real_step(config: Config) -> _LiveBytes:
    """What the same counter sees of a real model on the dry step's micro-batch."""
    segments, samples = _lay_out_rows(config, SIZES)
    shape = (config.tokenizer.num_item_tokens, config.tokenizer.latent_dim)
    model = build_model(
        config, vocab_size=SIZES.vocab_size, item_latents=torch.zeros(SIZES.num_items, *shape), num_items=SIZES.num_items,
        latent_mean=torch.zeros(shape), latent_std=torch.ones(shape), log_popularity=torch.zeros(SIZES.num_items),
        latent_noise=0.1,
    ).train()  # fmt: skip
    apart = model._keep_apart(segments)  # made before the counting starts, as in the dry step
    model._keep_apart = lambda segments: apart
    tracker = _LiveBytes(model)
    with tracker:
        losses = model(replace(_make_batch(config, samples), segments=segments), 0)
        sum(losses[name] for name in ("lm", "negative", "diffusion", "dispersive")).backward()
    return tracker


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"attention": "sdpa"}])
def test_a_dry_step_counts_the_bytes_of_a_real_one(changes, checkpointing):
    config = make_config(activation_checkpointing=checkpointing, **changes)
    dry, real = run_dry_step(config, SIZES), run_real_step(config)
    assert dry.bytes == pytest.approx(real.peak, rel=0.01) and dry.bytes > 1e6
    assert dry.with_gradients == pytest.approx(real.peak_with_gradients, rel=0.01)


def test_of_a_sampled_softmax_a_dry_step_counts_the_worst():
    config = make_config()
    config.loss.num_negatives = 3000
    assert run_dry_step(config, SIZES).bytes > run_real_step(config).peak  # here all rows name one and the same item


def test_a_dry_micro_batch_is_as_full_as_a_real_one(make_world):
    # Users who are all alike, so that both are laid out the same.
    world = make_world([list(range(1, 10))] * 40, response_drop=1.0, instruction="Next:")
    world.config.train.row_tokens, world.config.train.micro_batch_rows = 96, 3
    plan = world.rows.plan(0)
    real = world.rows.build(plan, np.arange(3), 3)
    sizes = DataSizes(num_items=30, vocab_size=300, sample_items=(7,))
    segments, samples = _lay_out_rows(world.config, sizes)
    dry = _make_batch(world.config, samples)
    assert len(dry.target_idx) == pytest.approx(len(real.target_idx), rel=0.2)
    assert int((segments > 0).sum()) == pytest.approx(int((real.segments > 0).sum()), rel=0.2)


def test_a_dry_step_takes_no_memory_and_leaves_the_random_numbers_alone():
    config = make_config()
    config.backbone.shape.hidden_size, config.backbone.shape.intermediate_size = 4096, 16384  # 2.6 GB of weights
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert all(parameter.is_meta for parameter in build_empty_model(config, SIZES).parameters())
    assert run_dry_step(config, SIZES).with_gradients > 2e9
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


def test_checkpointed_activations_are_fewer_and_the_catalogue_has_a_part_of_its_own():
    plain, checkpointed = (run_dry_step(make_config(activation_checkpointing=one), SIZES).parts for one in (False, True))
    assert checkpointed["backbone"] < 0.7 * plain["backbone"]
    many = run_dry_step(make_config(), replace(SIZES, num_items=50_000)).parts
    assert many["item vectors"] > 50 * plain["item vectors"]


def test_zero_cuts_optimizer_then_gradients_then_weights():
    config = make_config()
    config.zero.bucket_elements, config.zero.persistence_threshold = 1, 0
    config.train.micro_batch_rows = 4  # 16 rows on 2 ranks: 2 passes, so that gradients stay between them
    two, eight = peaks(config), peaks(replace(config, train=replace(config.train, global_batch_rows=64)), ranks=8)
    weights = 4 * sum(trainable for trainable, _ in count_parameters(build_empty_model(config, SIZES)).values())
    # Of a rank's standing tensors: 1 + 2 + 1 whole; 1 + 1/R + 2/R + 1; 1 + 1/R + 2/R + 1/R
    assert two[0] == eight[0]
    assert two[1] - eight[1] == pytest.approx(3 * (1 / 2 - 1 / 8) * weights, rel=1e-3)
    assert two[2] - eight[2] == pytest.approx(4 * (1 / 2 - 1 / 8) * weights, rel=1e-3)
    assert two[3] - eight[3] == pytest.approx(5 * (1 / 2 - 1 / 8) * weights, rel=1e-3)
    assert two[0] > two[1] > two[2]


def test_frozen_weights_have_neither_gradients_nor_moments(tmp_path):
    config = make_config()
    load_backbone(config.backbone, 1000).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # only its config.json is read
    adapted = replace(config, backbone=replace(config.backbone, path=str(tmp_path), lora=LoraConfig(rank=2)))
    trainable, frozen = count_parameters(build_empty_model(adapted, SIZES))["backbone"]
    assert frozen == count_parameters(build_empty_model(config, SIZES))["backbone"][0] and trainable < frozen / 10
    both = [estimate_memory(one, SIZES, ranks=2, stages=[0], on_gpu=True)[0] for one in (config, adapted)]
    moments = [one.parts["optimizer moments"] for one in both]
    assert moments[0] - moments[1] == 2 * 4 * (frozen - trainable)


def test_a_cpu_has_a_base_and_a_heap_and_offloading_leaves_the_gpu():
    config = make_config()
    (on_cpu,) = estimate_memory(config, SIZES, ranks=2, stages=[2], on_gpu=False)
    assert on_cpu.parts["Python and libraries"] == BASE_BYTES and on_cpu.parts["free blocks of the heap"] > 0
    offloaded = replace(config, zero=replace(config.zero, offload_optimizer=True))
    assert peaks(offloaded, stages=[2])[2] < peaks(config, stages=[2])[2]


def test_a_batch_that_cannot_be_divided_and_a_backbone_that_is_not_there_are_named():
    with pytest.raises(ConfigError, match="train.global_batch_rows"):
        peaks(make_config(), ranks=3)
    with pytest.raises(ConfigError, match="backbone.path.*no/such/folder"):
        peaks(make_config(path="./no/such/folder"))


def test_sizes_come_from_the_tokens_unless_arguments_say_them(toy_tokens):
    sizes = data_sizes(toy_tokens, NO_ARGUMENTS)
    assert sizes.num_items == len(np.load(toy_tokens.folder("tokens") / "item_latents.npy"))
    assert list(sizes.sample_items) == sorted(sizes.sample_items) and min(sizes.sample_items) >= 2
    said = SimpleNamespace(num_items=7, mean_history=5, num_tokenizer_words=300)
    assert data_sizes(toy_tokens, said) == DataSizes(num_items=7, vocab_size=300, sample_items=(5,))


def test_the_command_needs_the_size_of_a_catalogue_that_is_not_there(tmp_path, capsys):
    where = ["name=toy", f"run_dir={tmp_path}", "train.row_tokens=256"]
    assert main(["estimate", *where]) == 1
    assert main(["estimate", "--num_items", "1000", "--all", "--device", "gpu", "--ranks", "4", *where]) == 0
    shown = capsys.readouterr().out
    assert all(f"ZeRO {stage}" in shown for stage in range(4)) and "at its peak" in shown

"""benchmarks/train.py through the real launcher: what it measures, and that it leaves the run as it was."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from contrec_dist.benchmarks import train
from contrec_dist.benchmarks.backbones import read_shape, write_random_backbone
from contrec_dist.benchmarks.head_cost import measure_head
from contrec_dist.benchmarks.memory import mark_peak_memory, peak_memory_bytes
from contrec_dist.benchmarks.micro_batch import expected_peak
from contrec_dist.config import BackboneConfig, Config, HeadConfig, LoraConfig
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import hash_file
from contrec_dist.model.backbone import load_backbone
from contrec_dist.training.rank import TrainingData, _shared_tokenizer

pytestmark = pytest.mark.timeout(600)
STEPS, REPEATS, WARMUP = 2, 2, 1


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(list(arguments))


def all_files(config: Config) -> dict[str, str]:
    return {str(path): hash_file(path) for path in sorted(Path(config.run_dir).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def measured(toy_tokens, tmp_path_factory):
    """(figures, files of the run before and after): two ranks at ZeRO-3, then the parts that need one."""
    path = tmp_path_factory.mktemp("benchmark") / "toy.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(toy_tokens)))
    before = all_files(toy_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        figures = train.run(parse(
            "--config", str(path), "--stages", "3", "--ranks", "2", "--steps", str(STEPS), "--repeats", str(REPEATS),
            "--warmup", str(WARMUP), "--peer_batches", "1,2", "--peer_steps", "1", "--micro_batch", "auto", "--max_micro_batch", "2",
            "--packing", f"{path},name=other,train.row_tokens=320",
        ))  # fmt: skip
    return figures, before, all_files(toy_tokens)


@pytest.fixture(scope="module")
def data(toy_tokens, tmp_path_factory) -> TrainingData:
    """What a rank reads; the tokenizer is learned as a rank learns it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return TrainingData.open(toy_tokens, _shared_tokenizer(toy_tokens, tmp_path_factory.mktemp("tokenizer")))
    finally:
        torch.distributed.destroy_process_group()


def test_the_run_is_left_as_it_was(measured):
    _, before, after = measured
    assert before == after


def test_what_both_ranks_did_is_counted_step_by_step(measured, toy_tokens, data):
    """Targets and padding of the measured steps are those of the plan's rows, the warm-up left out."""
    plan, rows = data.rows.plan(0), toy_tokens.train.global_batch_rows
    assert [(one["zero_stage"], one["ranks"]) for one in measured[0]["train"]] == [(3, 2)]
    for one in measured[0]["train"]:
        assert (one["micro_batch_rows"], one["global_batch_rows"]) == (2, rows)
        for number, repeat in enumerate(one["repeats"]):
            first = (WARMUP + number * STEPS) * rows
            batch = data.rows.build(plan, np.arange(first, first + STEPS * rows), STEPS * rows)
            assert repeat["targets"] == len(batch.target_idx)
            assert repeat["tokens"] == int((batch.segments > 0).sum())
            assert repeat["positions"] == batch.tokens.numel()
            assert 0 < repeat["data_wait_share"] < 1


def test_rates_and_mfu_follow_from_what_was_counted(measured):
    for one in measured[0]["train"]:
        assert one["targets_per_second"] == np.median([r["targets"] / r["seconds"] for r in one["repeats"]])
        best = max(other["machine_flops_per_second"] for other in measured[0]["train"] if other["ranks"] == one["ranks"])
        assert one["mfu"] == pytest.approx(one["flops_per_second"] / best)
        assert one["mfu"] > 0 and len(one["peak_bytes"]) == 2 and min(one["peak_bytes"]) > 50 * 2**20
        assert sum(one["flop_shares"].values()) == pytest.approx(1)


def test_padding_of_every_data_set_is_that_of_its_whole_epoch(measured, toy_tokens, data):
    packing = measured[0]["packing"]
    assert packing["toy"]["padding_share"] == pytest.approx(data.rows.plan(0).padding_ratio(toy_tokens.train.row_tokens))
    assert packing["other"]["row_tokens"] == 320 and packing["other"]["rows"] < packing["toy"]["rows"]


def test_peer_and_head_are_measured_and_judged(measured):
    figures = measured[0]
    assert set(figures["peer"]["by_batch_size"]) == {"1", "2"}
    ours = figures["train"][0]["targets_per_second"]
    assert figures["peer"]["ratio_by_ranks"]["2"] == pytest.approx(ours / figures["peer"]["targets_per_second"])
    assert set(figures["head"]) == {"config", "default"} and figures["head"]["default"]["width"] == HeadConfig().width
    assert len(figures["goals"]) == 5
    json.dumps(figures)


def test_steps_without_the_head_do_not_compute_its_losses(toy_tokens, data):
    calls = []

    class Counted:
        rows = data.rows

        @staticmethod
        def build_model(config):
            model = data.build_model(config)
            losses = model.head.losses
            model.head.losses = lambda *arguments: calls.append(1) or losses(*arguments)
            return model

    found = measure_head(toy_tokens, Counted, num_steps=2, num_repeats=2, num_warmup=2)
    micro_batches = toy_tokens.train.global_batch_rows // toy_tokens.train.micro_batch_rows
    assert len(calls) == micro_batches * (1 + 2 * 2)  # one warm-up step of two, and one of each pair
    assert found["share"] < 1 and found["share_least"] <= found["share"] <= found["share_most"]


def test_peak_memory_counts_from_the_mark():
    big = torch.ones(64 * 2**20, dtype=torch.uint8)
    high = peak_memory_bytes()
    del big
    mark_peak_memory()
    low = peak_memory_bytes()
    again = torch.ones(32 * 2**20, dtype=torch.uint8)
    assert low < high and peak_memory_bytes() >= low + 30 * 2**20 and len(again)


def test_a_doubling_is_expected_to_add_twice_what_the_last_one_added():
    assert expected_peak([10]) == 10 and expected_peak([10, 14]) == 22 and expected_peak([10, 14, 22]) == 38


def test_a_random_backbone_of_a_shape_loads_like_a_real_one(toy_tokens, tmp_path):
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 500, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    folder = write_random_backbone(str(tmp_path / "shape.json"), toy_tokens, tmp_path / "backbone")
    model = load_backbone(BackboneConfig(path=str(folder), lora=LoraConfig(rank=2)), vocab_size=0)
    assert model.get_base_model().config.num_key_value_heads == 2
    assert model.get_base_model().model.layers[0].self_attn.k_proj.base_layer.weight.shape == (16, 32)


def test_the_shape_of_llama_has_its_number_of_parameters():
    shape = read_shape("llama-3.2-1b")
    width, layers, kv = shape["hidden_size"], shape["num_hidden_layers"], shape["num_key_value_heads"] * shape["head_dim"]
    layer = 2 * width * width + 2 * width * kv + 3 * width * shape["intermediate_size"] + 2 * width
    assert shape["vocab_size"] * width + layers * layer + width == 1_235_814_400


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        (["run_dir=/nowhere", "name=a"], ArtifactError, "catalog/items.parquet"),
        (["name=a", "--only", "train,everything"], ConfigError, "everything"),
        (["name=a", "--warmup", "0"], ConfigError, "--warmup"),
        (["name=a", "--micro_batch", "some"], ConfigError, "--micro_batch"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(arguments, error, named):
    with pytest.raises(error, match=named):
        train.run(parse(*arguments))


def test_an_unknown_shape_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="llama-9.*llama-3.2-1b"):
        read_shape("llama-9")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model_type"):
        read_shape(str(tmp_path / "config.json"))


def test_a_job_only_borrows_the_run(toy_tokens, tmp_path):
    job = train._job("train", "train:a:3:2", replace(toy_tokens, name="a"), tmp_path, {})
    run_dir = tmp_path / "runs" / job["name"]
    assert (run_dir / "tokens").resolve() == toy_tokens.folder("tokens").resolve()
    assert (run_dir / "tokens").is_symlink() and not (run_dir / "model").exists()

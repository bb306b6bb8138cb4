"""A watched training on two ranks: probes, TensorBoard, profiler and loader processes change not a bit of the model.

The watched run also cuts every parameter among the ranks (the reference keeps small ones whole), so that probes run over
weights that have to be gathered.
"""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launched import Command, copy_run, file_hashes, run_contrec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contrec_dist.config import Config
from contrec_dist.data.catalog import load_items
from contrec_dist.data.prompts import PromptTexts
from contrec_dist.model.export import load_export
from contrec_dist.training.probe import ValidationProbe

pytestmark = pytest.mark.timeout(900)
PROBE_EVERY = 4
NUM_USERS = 37


@pytest.fixture(scope="module")
def watched(reference, tmp_path_factory) -> tuple[Config, Command]:
    folder = tmp_path_factory.mktemp("watched")
    source = reference[0]
    config = replace(
        source,
        run_dir=str(folder / "run"),
        zero=replace(source.zero, persistence_threshold=0),
        launch=replace(source.launch, loader_workers=1),
        monitor=replace(
            source.monitor, probe_every_steps=PROBE_EVERY, probe_users=NUM_USERS, profile_start_step=5, profile_num_steps=2
        ),
    )
    copy_run(source, config, "catalog", "embeddings", "tokenizer", "tokens")
    command = run_contrec("train", config, folder / "train.log")
    assert command.process.returncode == 0, command.log
    return config, command


@pytest.fixture(scope="module")
def num_steps(watched) -> int:
    return read_lines(watched[0].folder("model") / "metrics.jsonl")[-1]["step"]


def checkpoints(config: Config) -> Path:
    (folder,) = (path for path in config.folder("checkpoints").iterdir() if path.is_dir())
    return folder


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_watched_run_learns_the_same_model_to_the_byte(watched, reference):
    assert file_hashes(watched[0], "model") == file_hashes(reference[0], "model")


def test_probes_stand_where_they_were_asked_for_and_at_the_end(watched, reference, num_steps):
    steps = sorted({*range(PROBE_EVERY, num_steps + 1, PROBE_EVERY), num_steps})
    assert [line["step"] for line in read_lines(checkpoints(watched[0]) / "probe.jsonl")] == steps
    assert [line["step"] for line in read_lines(checkpoints(reference[0]) / "probe.jsonl")] == [num_steps]


def test_last_probe_is_what_the_exported_model_scores(watched):
    """In this process, on one rank, without ZeRO, from the files: the same places for every user."""
    config = replace(watched[0], zero=replace(watched[0].zero, stage=0))
    latents = torch.from_numpy(np.load(config.folder("tokens") / "item_latents.npy"))
    model, tokenizer = load_export(config.folder("model"), item_latents=latents)
    texts = PromptTexts(load_items(config.folder("catalog")), tokenizer, config.prompt)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        figures = ValidationProbe(config, model, texts, None).measure(lambda: False)
    finally:
        dist.destroy_process_group()
    last = read_lines(checkpoints(config) / "probe.jsonl")[-1]
    assert figures["num_users"] == NUM_USERS and last.pop("step") and last == figures


def test_throughput_has_a_line_for_every_line_of_losses(watched, num_steps):
    lines = read_lines(checkpoints(watched[0]) / "throughput.jsonl")
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
    for line in lines:
        assert line["tokens_per_second"] > line["targets_per_second"] > 0 and line["step_seconds"] > 0
        assert 0 <= line["data_wait_share"] <= 1 and 0 < line["mfu"] < 1 and line["num_ranks"] == 2


def test_tensorboard_has_losses_throughput_and_probes(watched, num_steps):
    (folder,) = (watched[0].folder("tensorboard")).iterdir()
    events = EventAccumulator(str(folder)).Reload()
    losses = [line["loss"] for line in read_lines(watched[0].folder("model") / "metrics.jsonl")]
    np.testing.assert_allclose([event.value for event in events.Scalars("loss/loss")], losses, rtol=1e-6)
    assert [event.step for event in events.Scalars("throughput/tokens_per_second")] == list(range(1, num_steps + 1))
    probes = read_lines(checkpoints(watched[0]) / "probe.jsonl")
    assert [event.step for event in events.Scalars("probe/sampler_ndcg@10")] == [line["step"] for line in probes]


def test_every_rank_leaves_a_trace_and_the_log_names_the_top_operators(watched):
    folder = watched[0].folder("profile")
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json.gz", "rank-1.json.gz"]
    for path in folder.iterdir():
        names = {event.get("name") for event in json.loads(gzip.open(path).read())["traceEvents"]}
        assert "aten::mm" in names and {"ProfilerStep#1", "ProfilerStep#2"} <= names
    assert "profile of step 5 on: " in watched[1].log and "aten::mm" in watched[1].log


def test_log_names_the_probes(watched, num_steps):
    assert f"probe at step {num_steps}: HR@10 " in watched[1].log and f"({NUM_USERS} validation users" in watched[1].log

"""DeepSpeed's own switches around launchers/train.py: a JSON of the user's beside the config, and the autotuner."""

import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from launched import ROOT, Command, copy_run, file_hashes, free_port, start, write_config

from contrec_dist.config import Config
from contrec_dist.training.train import STAGE

pytestmark = pytest.mark.timeout(900)
LAUNCHER = str(ROOT / "launchers" / "train.py")


def run_deepspeed(config: Config, folder: Path, settings: dict, *switches: str, **extra: str) -> Command:
    """`deepspeed SWITCHES launchers/train.py --deepspeed --deepspeed_config ds.json --config toy.yaml` to its end."""
    (folder / "ds.json").write_text(json.dumps(settings))
    path = write_config(config, folder / "toy.yaml")
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    script = [LAUNCHER, "--deepspeed", "--deepspeed_config", "ds.json", "--config", str(path)]
    command = start([*runner, *switches, *script], folder / "deepspeed.log", **extra)
    try:
        command.wait()
    finally:
        command.end()
    return command


def test_settings_that_say_how_reach_deepspeed_and_leave_the_model_as_it_is(reference, new_run, tmp_path):
    config = copy_run(reference[0], new_run, *STAGE["inputs"], "embeddings")
    profile = tmp_path / "flops.txt"
    settings = {
        "train_batch_size": "auto",
        "zero_optimization": {"stage": config.zero.stage, "reduce_bucket_size": 1000},
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": str(profile)},
    }
    command = run_deepspeed(config, tmp_path, settings)
    assert command.process.returncode == 0, command.log
    assert "Flops Profiler" in profile.read_text()
    assert file_hashes(config, "model") == file_hashes(reference[0], "model")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("tabulate") is None, reason="DeepSpeed's autotuner needs tabulate")
def test_the_autotuner_measures_trials_and_leaves_the_run_alone(reference, new_run, tmp_path):
    """Its profile run and one trial on two CPU ranks; LOCAL_SIZE is how it counts CPU ranks before it reads --num_gpus.

    It takes a CPU rank's activations from what a forward pass adds to the process's memory: of the toy's own they drown in what
    the allocator keeps and gives back, and where the sum is negative nothing is tried. So the layers are wide, 168 MB of activations.
    """
    config = copy_run(reference[0], new_run, *STAGE["inputs"], "embeddings", "model")
    wide = replace(config.backbone.shape, intermediate_size=32_768)
    config = replace(config, backbone=replace(config.backbone, shape=wide))
    before = file_hashes(config, "model")
    settings = {
        "train_micro_batch_size_per_gpu": [4],
        "zero_optimization": {"stage": 2},
        "autotuning": {"enabled": True, "fast": True, "start_profile_step": 1, "end_profile_step": 2},
    }
    tools = tmp_path / "tools"  # the autotuner asks pdsh to end every process with a trial's name: here none is left
    tools.mkdir()
    (tools / "pdsh").write_text("#!/bin/sh\n")
    (tools / "pdsh").chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = run_deepspeed(config, tmp_path, settings, "--autotuning", "tune", LOCAL_SIZE="2", PATH=path)
    assert command.process.returncode == 0, command.log
    results = tmp_path / "autotuning_results"
    profiled = json.loads((results / "profile_model_info" / "model_info.json").read_text())
    assert profiled["num_params"] > 0 and profiled["activation_mem_per_gpu"] > 0
    trials = [json.loads(path.read_text()) for path in results.glob("z2_*/metrics.json")]
    assert [trial["throughput"] > 0 for trial in trials] == [True], command.log
    best = json.loads((results / "ds_config_optimal.json").read_text())
    assert best["train_micro_batch_size_per_gpu"] == 4 and best["train_batch_size"] == 8
    assert file_hashes(config, "model") == before
    assert {path.name for path in Path(config.run_dir).iterdir()} == {*STAGE["inputs"], "embeddings", "model"}

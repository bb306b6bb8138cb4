"""A training run that was stopped, killed and given a damaged checkpoint ends with the bytes of one that never was."""

import json
import re
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from launched import Command, copy_run, file_hashes, run_contrec, start_contrec, wait_for
from safetensors.torch import load_file

from contrec_dist.config import Config
from contrec_dist.training.checkpoint_files import LATEST_NAME, verify_checkpoint
from contrec_dist.training.stop import stop_file

pytestmark = pytest.mark.timeout(900)


@dataclass
class Story:
    """What happened to one run: asked to stop, killed, damaged, finished (asked to stop during its export)."""

    config: Config
    refused: Command
    stopped: Command
    killed: Command
    survivors: list[psutil.Process]
    damaged: Path
    finished: Command
    steps: dict[str, list[int]]
    resumed_at: dict


@pytest.fixture(scope="module")
def story(reference, run_config, tmp_path_factory) -> Story:
    folder = tmp_path_factory.mktemp("disturbed")
    config = replace(run_config, run_dir=str(folder / "run"))
    copy_run(reference[0], config, "catalog", "embeddings", "tokenizer", "tokens")
    steps = {}

    stopped = start_contrec("train", config, folder / "stopped.log")
    try:
        wait_for(lambda: _checkpoints(config), stopped, "a first checkpoint")
        stopped.send_to_group(signal.SIGSTOP)
        refused = run_contrec("train", config, folder / "refused.log")
        stopped.process.terminate()
        stopped.send_to_group(signal.SIGCONT)
        stopped.wait()
    finally:
        stopped.end()
    steps["stopped"] = sorted(_checkpoints(config))
    shutil.copytree(config.run_dir, folder / "as_stopped")

    killed = start_contrec("train", config, folder / "killed.log")
    try:
        wait_for(lambda: min(_checkpoints(config)) > max(steps["stopped"]), killed, "two later checkpoints")
        below = killed.below()
        killed.send_to_group(signal.SIGKILL)
        killed.wait()
        _, survivors = psutil.wait_procs(below, timeout=30)
    finally:
        killed.end()
    steps["killed"] = sorted(_checkpoints(config))

    damaged = next(_checkpoints(config)[max(steps["killed"])].rglob("*optim_states.pt"))
    _flip_byte(damaged)
    older = _checkpoints(config)[steps["killed"][-2]]
    resumed_at = json.loads((older / "complete.json").read_text())["position"]
    finished = start_contrec("pipeline", config, folder / "finished.log", "launch.requeue_exit_code=75")
    try:
        export = config.folder("model").with_name(".model.partial")
        wait_for((export / "head.safetensors").is_file, finished, "an export at work")
        finished.process.terminate()
        finished.wait()
    finally:
        finished.end()
    steps["finished"] = sorted(_checkpoints(config))
    return Story(config, refused, stopped, killed, survivors, damaged, finished, steps, resumed_at)


def test_second_trainer_of_a_run_is_refused(story):
    assert story.refused.process.returncode == 1
    assert "another process that writes it" in story.refused.log
    assert "Traceback" not in story.refused.log


def test_sigterm_leaves_a_checkpoint_of_the_last_step_and_a_clear_message(story):
    last = max(story.steps["stopped"])
    assert story.stopped.process.returncode == 0  # asked for, not failed
    assert f"stopped at step {last} by a signal; run the same command again to go on" in story.stopped.log
    assert "training stopped before its end; run the same command again to go on" in story.stopped.log
    assert "Traceback" not in story.stopped.log


def test_sigkill_of_the_group_leaves_no_rank_alive(story):
    assert story.survivors == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_no_run_leaves_shared_memory_behind_not_even_a_killed_one(story):
    ports = [re.search(r"--master_port (\d+)", command.log)[1] for command in (story.stopped, story.killed, story.finished)]
    assert [path for port in ports for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*")] == []


def test_damaged_checkpoint_is_named_and_the_older_one_taken(story):
    older, newest = story.steps["killed"][-2:]
    assert f"checkpoint skipped: {story.damaged}" in story.finished.log
    assert f"resumed at step {older} " in story.finished.log
    assert newest > older
    latest = story.damaged.parents[2] / LATEST_NAME
    assert f"{latest} names step-{newest:08d}, which is missing or damaged: step-{older:08d} is taken" in story.finished.log
    assert latest.read_text() == f"step-{max(story.steps['finished']):08d}\n"


def test_train_killed_and_run_again_in_mid_epoch_equals_undisturbed(story, reference):
    epochs = [json.loads(line)["epoch"] for line in open(story.config.folder("model") / "metrics.jsonl")]
    assert story.resumed_at["step"] == story.steps["killed"][-2]
    assert 0 < story.resumed_at["epoch_step"] < epochs.count(story.resumed_at["epoch"])
    assert file_hashes(story.config, "model") == file_hashes(reference[0], "model")


def test_signal_during_the_export_lets_it_finish_and_stops_the_pipeline_after_it(story):
    """With the code that a scheduler takes for "put me in the queue again"."""
    assert story.finished.process.returncode == 75, story.finished.log
    assert "training is complete; stopped after it, as asked" in story.finished.log
    assert (story.config.folder("model") / "manifest.json").is_file()
    assert "contrec.index" not in story.finished.log and not story.config.folder("index").exists()


def test_going_back_to_a_step_keeps_the_later_checkpoint_and_a_stop_file_ends_the_run_after_a_step(story, tmp_path):
    config = replace(story.config, run_dir=str(tmp_path / "run"))
    copy_run(story.config, config, "catalog", "embeddings", "tokenizer", "tokens", "checkpoints")
    older, newer = story.steps["finished"]
    stop_file(config).touch()
    command = run_contrec(
        "train", config, tmp_path / "stopped.log", f"launch.resume={older}", "launch.requeue_exit_code=75"
    )
    assert command.process.returncode == 75, command.log
    assert f"resumed at step {older} " in command.log and f"stopped at step {older + 1} by the stop-file STOP" in command.log
    assert f"{stop_file(config)}: honoured and removed" in command.log and not stop_file(config).exists()
    assert sorted(_checkpoints(config)) == [older, older + 1] and not config.folder("model").exists()
    (aside,) = Path(config.run_dir).glob("checkpoints/*/set-aside-1")
    verify_checkpoint(aside / f"step-{newer:08d}")
    assert f"set aside in {aside}: step-{newer:08d}" in command.log
    assert "Traceback" not in command.log


def test_run_goes_on_with_another_number_of_ranks(story, reference, tmp_path):
    """ZeRO-3 cut the checkpoint in two; one rank goes on from it. Only the order of fp32 sums differs."""
    config = replace(story.config, run_dir=str(tmp_path / "run"))
    shutil.copytree(Path(story.config.run_dir).with_name("as_stopped"), config.run_dir)
    command = run_contrec("train", config, tmp_path / "one_rank.log", "launch.num_ranks=1")
    assert command.process.returncode == 0, command.log
    assert f"resumed at step {max(story.steps['stopped'])} " in command.log
    model, undisturbed = (one.folder("model") for one in (config, reference[0]))
    for name, expected in load_file(undisturbed / "head.safetensors").items():
        torch.testing.assert_close(load_file(model / "head.safetensors")[name], expected, rtol=1e-4, atol=1e-5)
    losses = [[json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")] for folder in (model, undisturbed)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_only_keep_last_n_checkpoints_stay(story):
    assert len(story.steps["finished"]) == story.config.train.keep_last_n


def test_training_is_quiet(story):
    for noise in ("FutureWarning", "Writing model shards", "Loading weights", "untested optimizer"):
        assert noise not in story.finished.log


def _checkpoints(config: Config) -> dict[int, Path]:
    """Step -> folder of the complete checkpoints."""
    marks = Path(config.run_dir).glob("checkpoints/*/step-*/complete.json")
    return {int(mark.parent.name.removeprefix("step-")): mark.parent for mark in marks}


def _flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

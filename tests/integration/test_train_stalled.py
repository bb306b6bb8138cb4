"""A rank that is frozen in the middle of training: the run ends by itself, says who, and goes on afterwards."""

import json
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from launched import Command, copy_run, file_hashes, run_contrec, start_contrec, wait_for

from contrec_dist.config import Config

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
STALL_SECONDS = 30  # more than any step between two signs of progress takes on a busy machine


@dataclass
class Stall:
    config: Config
    ended: Command
    survivors: list[psutil.Process]


@pytest.fixture(scope="module")
def stall(reference, run_config, tmp_path_factory) -> Stall:
    """Rank 1 of two gets a SIGSTOP after the first checkpoint, and never a SIGCONT."""
    folder = tmp_path_factory.mktemp("stalled")
    config = replace(run_config, run_dir=str(folder / "run"))
    copy_run(reference[0], config, "catalog", "embeddings", "tokenizer", "tokens")
    command = start_contrec("train", config, folder / "ended.log", f"launch.stall_seconds={STALL_SECONDS}")
    try:
        wait_for(lambda: list(Path(config.run_dir).glob("checkpoints/*/step-*")), command, "a first checkpoint")
        below = command.below()
        (frozen,) = [one for one in below if one.environ().get("RANK") == "1"]
        frozen.send_signal(signal.SIGSTOP)
        command.wait()
        _, survivors = psutil.wait_procs(below, timeout=60)
    finally:
        command.end()
    return Stall(config, command, survivors)


def test_run_that_stands_still_ends_with_an_error_and_nobody_left(stall):
    assert stall.ended.process.returncode == 1
    assert stall.survivors == []
    assert "training ended with exit code 1; its log is above, its checkpoints are kept" in stall.ended.log


def test_stacks_show_where_the_ranks_wait_and_the_frozen_one_is_named(stall):
    stacks = Path(stall.config.run_dir) / "logs" / "rank-0.stacks.txt"
    assert "_train_and_export" in stacks.read_text()
    (still,) = re.findall(r"rank 0: no progress for (\d+) s since: ", stall.ended.log)
    assert int(still) >= STALL_SECONDS and str(stacks) in stall.ended.log
    assert "no sign of life from rank 1" in stall.ended.log


def test_run_that_stood_still_goes_on_and_equals_undisturbed(stall, reference):
    finished = run_contrec("train", stall.config, Path(stall.config.run_dir).with_name("finished.log"))
    assert finished.process.returncode == 0, finished.log
    assert "resumed at step " in finished.log
    assert file_hashes(stall.config, "model") == file_hashes(reference[0], "model")
    steps = [json.loads(line)["step"] for line in open(stall.config.folder("model") / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))

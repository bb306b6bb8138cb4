"""training/watchdog.py with ranks of a few lines: who is dumped, who is named, who is left alone. No time is asserted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from contrec_dist.training.watchdog import EXIT_CODE, Watchdog

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 120
STALL_SECONDS = 4
RANK = """
import ctypes, sys, time
from contrec_dist.training.watchdog import Watchdog

folder, rank, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def wait_for_ever():
    (ctypes.PyDLL if how == "outside Python" else ctypes.CDLL)(None).sleep(1000)  # PyDLL keeps the interpreter's lock

with Watchdog(STALL_SECONDS, folder, rank=rank, world_size=2) as watchdog:
    watchdog.beat("step 7")
    print("up", flush=True)
    wait_for_ever()
""".replace("STALL_SECONDS", str(STALL_SECONDS))


@pytest.fixture
def start_ranks(tmp_path):
    """start(how of rank 0, how of rank 1) -> two processes that stand still."""
    processes = []

    def start(*ways: str) -> list[subprocess.Popen]:
        for rank, how in enumerate(ways):
            processes.append(subprocess.Popen(
                [sys.executable, "-c", RANK, str(tmp_path), str(rank), how], stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
            ))  # fmt: skip
        for process in processes:
            assert process.stdout.readline() == "up\n"
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_every_rank_that_stands_still_is_dumped_and_ended_even_one_that_is_blocked_outside_python(start_ranks, tmp_path):
    ranks = start_ranks("waiting for the other", "outside Python")
    _, log = ranks[0].communicate(timeout=WAIT_SECONDS)
    assert [rank.wait(timeout=WAIT_SECONDS) for rank in ranks] == [EXIT_CODE, EXIT_CODE]
    for rank in (0, 1):
        assert "wait_for_ever" in (tmp_path / f"rank-{rank}.stacks.txt").read_text()
    assert "rank 0: no progress for" in log and "since: step 7" in log and str(tmp_path / "rank-0.stacks.txt") in log
    assert "no sign of life from rank 1" in log  # its thread cannot run either


def test_rank_that_is_frozen_is_named_by_the_others(start_ranks):
    ranks = start_ranks("waiting for the other", "waiting for the other")
    ranks[1].send_signal(signal.SIGSTOP)
    _, log = ranks[0].communicate(timeout=WAIT_SECONDS)
    assert ranks[0].returncode == EXIT_CODE and "no sign of life from rank 1" in log


def test_progress_of_another_rank_counts(tmp_path):
    watchdog = Watchdog(1000, tmp_path, rank=0, world_size=2)
    tell = lambda beats: (tmp_path / "rank-1.alive.json").write_text(json.dumps({"beats": beats, "looks": beats}))  # noqa: E731
    long_ago = watchdog._moved_at - 900
    for beats, moved in ((3, False), (3, False), (4, True)):  # the first look only learns the count
        watchdog._moved_at = long_ago
        tell(beats)
        watchdog._look()
        assert (watchdog._moved_at > long_ago) is moved


def test_run_that_ends_leaves_no_files(tmp_path):
    with Watchdog(1000, tmp_path / "logs", rank=0, world_size=1) as watchdog:
        watchdog.beat("step 1")
    assert list((tmp_path / "logs").iterdir()) == []


def test_no_watch_is_kept_when_it_is_off(tmp_path):
    with Watchdog(0, tmp_path / "logs", rank=0, world_size=1) as watchdog:
        watchdog.beat("step 1")
    assert not (tmp_path / "logs").exists()


def test_stacks_of_an_earlier_stall_are_kept(tmp_path):
    (tmp_path / "rank-0.stacks.txt").write_text("earlier\n")
    with Watchdog(1000, tmp_path, rank=0, world_size=1):
        pass
    assert (tmp_path / "rank-0.stacks.txt").read_text() == "earlier\n"

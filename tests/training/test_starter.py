"""The tie between `contrec train` and its ranks, with a launcher and a rank of a few lines in the places of DeepSpeed's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 60
RANK = """
import signal, sys, time
from pathlib import Path
from contrec_dist.training.starter import stop_with_starter

folder = Path(sys.argv[-1])

def stop(*_):
    (folder / "stopped").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
stop_with_starter()
(folder / "ready").touch()
while True:
    time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, sys.argv[1], "--local_rank=0", sys.argv[2]])
sys.exit(rank.wait())
"""
STARTER = """
import os, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()  # libraries have threads too
from contrec_dist.training.starter import run_launcher

code, asked = run_launcher([sys.executable, *sys.argv[1:]], dict(os.environ))
print(f"code {code}, asked {asked}", flush=True)
"""


@pytest.fixture
def started(tmp_path):
    """(starter process, {"launcher", "rank"}: processes below it), once the rank is up."""
    for name, text in {"rank": RANK, "launcher": LAUNCHER, "starter": STARTER}.items():
        (tmp_path / f"{name}.py").write_text(text)
    command = [sys.executable, *(str(tmp_path / f"{name}.py") for name in ("starter", "launcher", "rank")), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    starter = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    _wait_for(tmp_path / "ready")
    launcher, rank = psutil.Process(starter.pid).children(recursive=True)
    yield starter, {"launcher": launcher, "rank": rank}
    for process in (launcher, rank, psutil.Process(starter.pid) if starter.poll() is None else None):
        if process is not None and process.is_running():
            process.kill()
    starter.wait(timeout=WAIT_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_at_the_command_reaches_the_ranks_and_is_waited_for(started, tmp_path, number):
    starter, _ = started
    starter.send_signal(number)
    output, _ = starter.communicate(timeout=WAIT_SECONDS)
    assert output == "code 0, asked True\n"
    assert (tmp_path / "stopped").exists()


def test_signal_at_a_frozen_command_counts_when_it_goes_on(started, tmp_path):
    """Which of its threads is then given the signal is up to the system."""
    starter, _ = started
    starter.send_signal(signal.SIGSTOP)
    starter.send_signal(signal.SIGTERM)
    starter.send_signal(signal.SIGCONT)
    output, _ = starter.communicate(timeout=WAIT_SECONDS)
    assert output == "code 0, asked True\n"
    assert (tmp_path / "stopped").exists()


def test_ctrl_c_at_the_terminal_does_not_end_the_launcher_before_its_ranks(started, tmp_path):
    """A terminal sends SIGINT to the launcher too."""
    starter, below = started
    below["launcher"].send_signal(signal.SIGINT)
    starter.send_signal(signal.SIGINT)
    output, _ = starter.communicate(timeout=WAIT_SECONDS)
    assert output == "code 0, asked True\n"
    assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize("killed", ["starter", "launcher"])
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfds, which this system does not have")
def test_rank_stops_when_the_command_or_the_launcher_is_killed(started, tmp_path, killed):
    starter, below = started
    (starter if killed == "starter" else below["launcher"]).kill()
    _, alive = psutil.wait_procs([below["rank"]], timeout=WAIT_SECONDS)
    assert alive == [] and (tmp_path / "stopped").exists()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path} in {WAIT_SECONDS} s"
        time.sleep(0.005)

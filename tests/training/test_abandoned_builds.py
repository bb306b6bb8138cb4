"""training/abandoned_builds.py: whose lock is removed, against the lock that torch's loader really takes."""

import os
import subprocess
import sys
import time

import pytest
from torch.utils.file_baton import FileBaton

from contrec_dist.training.abandoned_builds import ABANDONED_SECONDS, release_abandoned, releasing_abandoned_builds

HOLDER = """
import sys
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
sys.stdin.read()
"""

IMPORTS_BESIDE = """
import sys, threading
from contrec_dist.training.abandoned_builds import releasing_abandoned_builds

class Watcher:
    def find_spec(name, path=None, target=None):
        if threading.current_thread() is not threading.main_thread():
            print(name)

sys.meta_path.insert(0, Watcher)
with releasing_abandoned_builds():
    pass
"""

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc, which this system does not have")


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "py3_cpu" / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def holder(lock):
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def make_old(path):
    long_ago = time.time() - 2 * ABANDONED_SECONDS
    os.utime(path, (long_ago, long_ago))


def test_lock_of_a_killed_process_is_removed_and_that_of_a_living_one_stays(lock, holder, tmp_path):
    make_old(lock)
    assert release_abandoned(tmp_path) == [] and lock.exists()
    holder.kill()
    holder.wait()
    assert release_abandoned(tmp_path) == [lock] and not lock.exists()


def test_young_lock_stays(lock, tmp_path):
    lock.touch()
    assert release_abandoned(tmp_path) == [] and lock.exists()


def test_start_that_waits_for_the_dead_goes_on(lock, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock.touch()
    make_old(lock)
    with releasing_abandoned_builds():
        FileBaton(str(lock)).wait()  # as a rank does inside deepspeed.init_distributed
    assert not lock.exists()


def test_the_thread_imports_nothing_while_deepspeed_imports(tmp_path):
    """setuptools in one thread and distutils in another: one import fails, the other warns of errors, and the autotuner gives up."""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "LOCAL_RANK": "0"}
    command = [sys.executable, "-c", IMPORTS_BESIDE]
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout == ""

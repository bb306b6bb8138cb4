"""The tie between `contrec train` and the ranks that DeepSpeed starts for it.

Stage    train. On one machine the processes are contrec -> deepspeed runner -> deepspeed launch -> ranks, all in the
         process group of contrec: SIGKILL of the group ends everything.
Promise  SIGTERM or Ctrl-C at contrec reaches the ranks, which write a checkpoint and end. When contrec or the launcher
         is killed alone, the ranks do the same instead of training on with nobody to report to.
"""

import os
import select
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator

STARTER_VARIABLE = "CONTREC_STARTER"
POLL_SECONDS = 0.2


def run_launcher(command: list[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Run DeepSpeed's launcher to its end. -> (its exit code, whether we were asked to stop meanwhile)"""
    asked = threading.Event()

    def pass_on(number: int, frame: object) -> None:
        asked.set()
        _ask_ranks_to_stop()

    environment = {**environment, STARTER_VARIABLE: f"{socket.gethostname()}:{os.getpid()}"}
    # The runner has no handler for Ctrl-C and would end before its ranks: it inherits that SIGINT is ignored.
    with _handling(signal.SIGINT, signal.SIG_IGN):
        process = subprocess.Popen(command, env=environment)
    with _handling(signal.SIGINT, pass_on), _handling(signal.SIGTERM, pass_on):
        return _wait(process), asked.is_set()


def _wait(process: subprocess.Popen) -> int:
    """Its exit code. Handlers run in the main thread, and a signal that another thread was given does not end a wait."""
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
    return process.returncode


def stop_with_starter() -> None:
    """On a rank: get a SIGTERM when the launcher or the `contrec train` above it is gone (where the system has pidfds)."""
    if not hasattr(os, "pidfd_open"):
        return
    poller = select.poll()
    try:
        for process in {os.getppid(), *_starter_on_this_host()}:
            poller.register(os.pidfd_open(process), select.POLLIN)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=_stop_when_ready, args=(poller,), name="starter", daemon=True).start()


def _stop_when_ready(poller: select.poll) -> None:
    poller.poll()
    os.kill(os.getpid(), signal.SIGTERM)


def _starter_on_this_host() -> list[int]:
    """Process id of the `contrec train` above; none where a launcher was started by hand or on another machine."""
    host, _, process = os.environ.get(STARTER_VARIABLE, "").rpartition(":")
    return [int(process)] if host == socket.gethostname() else []


def _ask_ranks_to_stop() -> None:
    """SIGTERM to the ranks themselves: the launcher, asked the same, kills them 30 seconds later, checkpoint or not.

    While there are no ranks on this machine (not yet, or they run on others) everything below is asked.
    """
    import psutil

    below = psutil.Process().children(recursive=True)
    for process in [one for one in below if _is_rank(one)] or below:
        try:
            process.send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            pass


def _is_rank(process) -> bool:
    import psutil

    try:
        return any(argument.startswith("--local_rank=") for argument in process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def _handling(number: int, handler: Callable | signal.Handlers) -> Iterator[None]:
    """Have a signal handled so; Python allows it in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)

"""Locks that a killed process left on DeepSpeed's compiled parts.

DeepSpeed compiles its CPU parts once and loads them at every start, under a lock that is a mere file: a process that is
killed meanwhile leaves it there, and every later start on this machine waits for it for ever, without a word. While a rank
starts, the first one of each machine looks for such locks and removes them.
Promise  Only a lock is removed that is older than a build takes and that no process of this machine has open, as whoever holds
         it has. On file systems that machines share, age alone tells for the others.
"""

import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from contrec_dist.progress import get_logger

ABANDONED_SECONDS = 180.0  # a build takes 35 to 90 seconds
LOOK_SECONDS = 5.0


@contextmanager
def releasing_abandoned_builds() -> Iterator[None]:
    """While DeepSpeed may load or compile, nobody waits for the dead."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    folder = builds_folder()  # here, as it imports setuptools: beside the import of distutils in DeepSpeed's checks one of the two fails
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(folder, ended), name="abandoned builds", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def release_abandoned(root: Path) -> list[Path]:
    """Remove the abandoned locks of DeepSpeed's parts below `root`; which ones."""
    released = []
    for lock in root.glob("**/deepspeed_*/lock"):
        if _is_old(lock) and not _is_open(lock) and _is_old(lock):  # again: it may have changed hands meanwhile
            lock.unlink(missing_ok=True)
            get_logger("train").warning("%s: removed, a process that was killed while it compiled or loaded left it", lock)
            released.append(lock)
    return released


def builds_folder() -> Path:
    """Where compiled parts lie."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _watch(folder: Path, ended: threading.Event) -> None:
    while not ended.is_set():
        release_abandoned(folder)
        ended.wait(LOOK_SECONDS)


def _is_old(lock: Path) -> bool:
    try:
        return time.time() - lock.stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def _is_open(lock: Path) -> bool:
    """Whether a process of this machine (that we may look into) has the file open."""
    wanted = os.path.realpath(lock)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == wanted:
                return True
        except OSError:  # ended, or somebody else's
            continue
    return False

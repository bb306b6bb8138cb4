"""The most memory that this process held since a mark: device memory on a GPU, resident memory on a CPU."""

import ctypes
import gc
import re
import resource
import sys

from contrec_dist.errors import ContRecError


def mark_peak_memory() -> None:
    """Start a new high-water mark; a CPU process gives back what is free, a GPU keeps its cache, which is not counted."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the kernel's way to reset VmHWM


def peak_memory_bytes() -> int:
    """High-water mark since mark_peak_memory; off Linux since the start of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return _status_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_memory_bytes() -> int:
    """What this process could still take: of its GPU, or of the machine's memory."""
    import psutil
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return psutil.virtual_memory().available


def held_memory_bytes() -> int:
    """What this process holds now."""
    import psutil
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"{name}:\s+(\d+) kB", file.read())
    if found is None:
        raise ContRecError(f"/proc/self/status: no {name}, expected Linux's own line of it")
    return 1024 * int(found[1])

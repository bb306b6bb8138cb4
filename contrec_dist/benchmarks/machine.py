"""What was measured on: processor, cores, memory, GPUs, versions; and the machine's own rate of matrix products."""

import os
import platform
import statistics
import time

from contrec_dist.manifest import package_versions


def describe_machine() -> dict:
    """Names and sizes that a figure must be read with."""
    import psutil
    import torch

    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def processor_name() -> str:
    """The processor's model name, as the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


MATMUL_SIZES = {"cpu": 1024, "cuda": 8192}
"on a CPU the fastest of 512 to 4096 where it was tried; a GPU needs large ones to be filled"


def matmul_flops_per_second(dtype, *, size: int = 0, repeats: int = 9) -> float:
    """Dense matrix products (size x size; 0: the device's best) a second with torch's current threads, in FLOP/s; the median."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = size or MATMUL_SIZES[device]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])

"""How fast training goes: tokens and targets a second, share of the time that waits for data, MFU, peak memory.

Units    tokens are positions that hold something, targets are supervised items; both over all ranks
         MFU: FLOPs that the model's formula needs (benchmarks/flops.py) over what this machine's matrix products reach,
         measured on all ranks at once when training starts
Cost     A fifth of a second at the start; two small collectives and the count of one step's FLOPs a line of figures.
"""

import resource
import sys
import time
from contextlib import contextmanager
from typing import Iterable, Iterator, TypeVar

import torch
import torch.distributed as dist

from contrec_dist.benchmarks.flops import BatchCounts, training_flops
from contrec_dist.benchmarks.machine import matmul_flops_per_second
from contrec_dist.data.packed_batch import PackedBatch

Item = TypeVar("Item")
MATMUL_SIZES = {"cpu": 1024, "cuda": 8192}


class ThroughputMeter:
    """Collects the steps since the last line of figures. All ranks call `measure` together."""

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.machine_flops_per_second = self._sum_over_ranks(measure_matmul_rate(model, device))
        self.started = time.perf_counter()
        self._reset()

    def waiting(self, steps: Iterable[Item]) -> Iterator[Item]:
        """The same steps; what the next one takes to arrive is counted as waiting for data."""
        steps = iter(steps)
        while True:
            with self.data_wait():
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """The time inside is waiting for data."""
        start = time.perf_counter()
        yield
        self.wait_seconds += time.perf_counter() - start

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """The time inside (a checkpoint, a probe) is no part of the steps."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.pause_seconds += time.perf_counter() - start

    def count_step(self, num_tokens: int, num_targets: int) -> None:
        """One more step, of so many tokens and targets over all ranks."""
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.num_targets += num_targets

    def measure(self, micro_batches: list[PackedBatch]) -> dict[str, float]:
        """Figures of the steps since the last call; FLOPs are those of `micro_batches`, this rank's newest step."""
        now = time.perf_counter()
        seconds = max(now - self.window_start - self.pause_seconds, 1e-9)
        counts = [BatchCounts.of(self.model, batch) for batch in micro_batches]
        flops = sum(sum(training_flops(self.model, one).values()) for one in counts)
        flops_per_second = self._sum_over_ranks(flops) * self.num_steps / seconds
        wait_seconds, peak_memory = self._largest_over_ranks(self.wait_seconds, peak_memory_bytes(self.device))
        figures = {
            "seconds_since_start": now - self.started,
            "step_seconds": seconds / self.num_steps,
            "tokens_per_second": self.num_tokens / seconds,
            "targets_per_second": self.num_targets / seconds,
            "data_wait_share": min(1.0, wait_seconds / seconds),
            "mfu": flops_per_second / self.machine_flops_per_second,
            "peak_memory_bytes": peak_memory,
            "pause_seconds": self.pause_seconds,
        }
        self._reset()
        return figures

    def _reset(self) -> None:
        self.window_start = time.perf_counter()
        self.wait_seconds = self.pause_seconds = 0.0
        self.num_steps = self.num_tokens = self.num_targets = 0

    def _sum_over_ranks(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def _largest_over_ranks(self, *values: float) -> list[float]:
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()


def measure_matmul_rate(model: torch.nn.Module, device: torch.device) -> float:
    """FLOP/s of dense products in the dtype that the model multiplies in; leaves the random state alone."""
    dtype = torch.bfloat16 if isinstance(model.autocast(device), torch.autocast) else torch.float32
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return matmul_flops_per_second(dtype, size=MATMUL_SIZES[device.type], repeats=3)


def peak_memory_bytes(device: torch.device) -> float:
    """Most memory that this rank held so far: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

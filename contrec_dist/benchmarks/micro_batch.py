"""The largest micro-batch that memory carries, found by doubling on the real engine.

All ranks call it together. Two steps (the first one allocates the optimizer's state) are run with 1, 2, 4, .. rows; it ends
where the next doubling, by the growth of the last one, would pass nine tenths of the memory. A size that ran is returned.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from contrec_dist.benchmarks.memory import free_memory_bytes, held_memory_bytes, mark_peak_memory, peak_memory_bytes
from contrec_dist.benchmarks.timed_loop import run_instead
from contrec_dist.config import Config
from contrec_dist.errors import ContRecError
from contrec_dist.progress import get_logger
from contrec_dist.training.loop import TERMS, TrainingLoop

USABLE_SHARE = 0.9
STEPS_A_SIZE = 2


class DoublingLoop(TrainingLoop):
    """Instead of training, tries micro-batches; `rows_that_fit` is the largest that ran."""

    def __init__(self, *arguments, max_rows: int):
        super().__init__(*arguments)
        self.max_rows, self.rows_that_fit, self.peaks = max_rows, 0, []

    def fit(self) -> None:
        self.plan, size = self.rows.plan(0), 1
        budget = USABLE_SHARE * (held_memory_bytes() + free_memory_bytes() / self._processes_sharing_memory())
        while size <= min(self.max_rows, len(self.plan.rows)):
            if not self._runs(size):
                break
            self.rows_that_fit = size
            if self._any_rank(expected_peak(self.peaks) > budget):
                break
            size *= 2
        if not self.rows_that_fit:
            raise ContRecError("not even one row a micro-batch fits memory")

    def _runs(self, size: int) -> bool:
        """Whether two steps of `size` rows ran; out of memory is survived by a rank that is alone, which holds no collective up."""
        mark_peak_memory()
        try:
            for step in range(STEPS_A_SIZE):
                batch = self.rows.build(self.plan, (np.arange(size) + dist.get_rank() * size) % len(self.plan.rows), size)
                out = self.engine(batch.to(self.engine.device), step)
                scale = out["num_targets"].clamp(min=1)
                self.engine.backward(sum(out[name] for name in TERMS) / scale)
                self.engine.step()
        except torch.OutOfMemoryError:
            if dist.get_world_size() > 1:
                raise
            return False
        self.peaks.append(peak_memory_bytes())
        return True

    def _any_rank(self, value: bool) -> bool:
        found = torch.tensor(float(value), device=self.engine.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found > 0)

    def _processes_sharing_memory(self) -> int:
        return dist.get_world_size() if self.engine.device.type == "cpu" else 1


def expected_peak(peaks: list[int]) -> float:
    """Peak memory of the next doubling: a doubling adds twice what the last one added."""
    return peaks[-1] + 2 * (peaks[-1] - peaks[-2]) if len(peaks) > 1 else peaks[-1]


def find_micro_batch(config: Config, max_rows: int) -> Config:
    """The config with the largest micro-batch that fits, the global batch rounded up to a multiple of it and the ranks."""
    ranks = dist.get_world_size()
    train = replace(config.train, micro_batch_rows=1, global_batch_rows=ranks)
    tried = run_instead(replace(config, train=train), partial(DoublingLoop, max_rows=max_rows))
    rows, peaks = tried.rows_that_fit, tried.peaks
    tried.engine.destroy()
    if dist.get_rank() == 0:
        sizes = ", ".join(f"{2**power}: {peak / 2**30:.2f} GiB" for power, peak in enumerate(peaks))
        get_logger("benchmark").info("micro-batch of %d rows (peak memory by rows: %s)", rows, sizes)
    whole = -(-config.train.global_batch_rows // (rows * ranks)) * rows * ranks
    return replace(config, train=replace(config.train, micro_batch_rows=rows, global_batch_rows=whole))

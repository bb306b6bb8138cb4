"""The training loop with a clock: what is measured is the product's own loop on the product's own engine.

`run_instead` goes a rank's whole way into training (train_and_export) with another loop in the place of its own, and leaves
it when that loop is done: nothing is saved, nothing exported. All ranks call it together.
"""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist

from contrec_dist.benchmarks.flops import BatchCounts, training_flops
from contrec_dist.benchmarks.machine import matmul_flops_per_second
from contrec_dist.benchmarks.memory import held_memory_bytes, mark_peak_memory, peak_memory_bytes
from contrec_dist.config import Config
from contrec_dist.errors import ContRecError
from contrec_dist.manifest import IDENTITY_NAME, write_json
from contrec_dist.training import loop, rank

IDENTITY = "benchmark"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Optimizer steps: `warmup_steps` that count for nothing, then `num_repeats` blocks of `num_steps`."""

    num_steps: int
    num_repeats: int
    warmup_steps: int

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.num_steps * self.num_repeats


@dataclass
class Block:
    """What one rank did in one block of steps."""

    seconds: float = 0.0
    waited_seconds: float = 0.0
    positions: int = 0
    tokens: int = 0
    targets: int = 0
    flops: dict[str, float] = field(default_factory=dict)


class TimedLoop(loop.TrainingLoop):
    """Notes when every step had its data and when it was done; counts outside the clock; saves nothing."""

    def __init__(self, *arguments, timing: Timing):
        super().__init__(*arguments)
        self.timing, self.blocks, self.done_steps = timing, [], 0
        self.ready = 0.0
        self.start_bytes = held_memory_bytes()

    def _train_step(self, micro_batches, *rest) -> None:
        began = time.perf_counter()
        super()._train_step(micro_batches, *rest)
        self.done_steps += 1
        if self.done_steps > self.timing.warmup_steps:
            ended = time.perf_counter()
            block = self.blocks[-1]
            block.waited_seconds += began - self.ready
            self._count(block, micro_batches)
            self.ready += time.perf_counter() - ended  # counting is not part of the step

    def _checkpoint_if_due(self) -> None:
        super()._checkpoint_if_due()
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        measured = self.done_steps - self.timing.warmup_steps
        if measured > 0:
            self.blocks[-1].seconds += now - self.ready
        if measured == 0:
            mark_peak_memory()
            now = time.perf_counter()
        if measured >= 0 and measured % self.timing.num_steps == 0 and self.done_steps < self.timing.total_steps:
            self.blocks.append(Block())
        self.ready = now

    def _save_checkpoint(self) -> None:
        pass

    def _count(self, block: Block, micro_batches) -> None:
        for _, batch in micro_batches:
            block.positions += batch.tokens.numel()
            block.tokens += int((batch.segments > 0).sum())
            block.targets += len(batch.target_idx)
            for part, flops in training_flops(self.engine.module, BatchCounts.of(self.engine.module, batch)).items():
                block.flops[part] = block.flops.get(part, 0.0) + flops


def measure_training(config: Config, timing: Timing) -> dict:
    """Train `timing.total_steps` steps. -> this rank's blocks, memory and rate of matrix products."""
    steps = timing.total_steps
    train = replace(config.train, max_steps=steps, num_epochs=steps, checkpoint_every_steps=10**9, log_every_steps=10**9)
    timed = run_instead(replace(config, train=train), partial(TimedLoop, timing=timing))
    found = _describe(config, timed)
    timed.engine.destroy()
    return found


def run_instead(config: Config, loop_class: Callable[..., loop.TrainingLoop]) -> loop.TrainingLoop:
    """Go the way of a training rank up to its loop, have `loop_class` in its place, and leave when that one's fit returns."""
    config = replace(config, monitor=replace(config.monitor, probe_every_steps=0, trackers=[]))
    work = Path(config.run_dir) / "model"
    if dist.get_rank() == 0:
        work.mkdir(exist_ok=True)
        write_json(work / IDENTITY_NAME, {"identity": IDENTITY})
    dist.barrier()
    parent = loop.TrainingLoop
    loop.TrainingLoop = partial(_LeavingLoop, loop_class)
    try:
        rank.train_and_export(config, work)
    except _Left as left:
        return left.args[0]
    finally:
        loop.TrainingLoop = parent
    raise ContRecError("training ended before its loop did")


class _Left(Exception):
    """Leaves training when its loop is done, before anything is exported; carries the loop."""


class _LeavingLoop:
    def __init__(self, loop_class, *arguments):
        self.loop = loop_class(*arguments)

    def fit(self) -> None:
        self.loop.fit()
        raise _Left(self.loop)


def _describe(config: Config, timed: TimedLoop) -> dict:
    """Everything but the blocks is read when training is over: the model and the threads are as they were in it."""
    peak, engine = peak_memory_bytes(), timed.engine
    dtype = torch.bfloat16 if isinstance(engine.module.autocast(engine.device), torch.autocast) else torch.float32
    sizes = [(getattr(one, "ds_numel", one.numel()), one.requires_grad) for one in engine.module.parameters()]
    dist.barrier()  # the ranks' matrix products run at the same time, as their training did
    return {
        "blocks": [vars(block) for block in timed.blocks],
        "peak_bytes": peak,
        "start_bytes": timed.start_bytes,
        "matmul_flops_per_second": matmul_flops_per_second(dtype),
        "precision": str(dtype).removeprefix("torch."),
        "device": engine.device.type,
        "threads": torch.get_num_threads(),
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "micro_batch_rows": config.train.micro_batch_rows,
        "global_batch_rows": config.train.global_batch_rows,
        "row_tokens": config.train.row_tokens,
    }

"""What people watch while training runs, behind a few calls of the loop: throughput, trackers, probe, profiler.

Nothing here changes what is trained. Files: see step_lines.py, trackers.py and profiler.py. All ranks call every method
together.
"""

import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch.distributed as dist

from contrec_dist.config import Config
from contrec_dist.data.packed_batch import PackedBatch
from contrec_dist.progress import get_logger
from contrec_dist.training.probe import ValidationProbe
from contrec_dist.training.profiler import ProfilerWindow
from contrec_dist.training.step_lines import PROBE_NAME, THROUGHPUT_NAME, append_line, last_step, trim_lines
from contrec_dist.training.throughput import ThroughputMeter
from contrec_dist.training.trackers import open_trackers


class TrainingMonitor:
    """Watches a training whose lines lie in `folder` (the checkpoints' folder). `probe` None: no probes."""

    def __init__(self, config: Config, engine, folder: Path, probe: ValidationProbe | None):
        self.config, self.engine, self.folder, self.probe = config, engine, folder, probe
        self.log = get_logger("train")
        self.first_rank = dist.get_rank() == 0
        self.profiler = ProfilerWindow(config.monitor, Path(config.run_dir) / "profile")
        self.trackers: list = []
        self.latest: dict[str, float] = {}

    def start(self, step: int) -> None:
        """Go on behind `step`, which training stands at."""
        self.probed_step = -1
        if self.first_rank:
            for name in (THROUGHPUT_NAME, PROBE_NAME):
                trim_lines(self.folder / name, step)
            self.probed_step = last_step(self.folder / PROBE_NAME)
            self.trackers = open_trackers(self.config, self.folder.name, first_step=step + 1)
        told = [self.probed_step]
        dist.broadcast_object_list(told, src=0)
        self.probed_step = told[0]
        self.meter = ThroughputMeter(self.engine.module, self.engine.device)

    def waiting(self, steps: Iterable) -> Iterator:
        """The same steps, the time until each arrives counted."""
        return self.meter.waiting(steps)

    def data_wait(self) -> AbstractContextManager:
        """The time inside is waiting for data."""
        return self.meter.data_wait()

    def pausing(self) -> AbstractContextManager:
        """The time inside is no part of the steps."""
        return self.meter.pausing()

    def before_step(self, step: int) -> None:
        """In front of optimizer step `step`, counted from 1."""
        self.profiler.before_step(step)

    def after_step(
        self, step: int, batches: list[PackedBatch], losses: dict[str, float], num_tokens: int, num_targets: int
    ) -> None:
        """Optimizer step `step` is done; counts are over all ranks."""
        self.profiler.after_step()
        self.meter.count_step(num_tokens, num_targets)
        self.latest["loss"] = losses["loss"]
        if step % self.config.train.log_every_steps == 0:
            figures = self.meter.measure(batches)
            self.latest |= figures
            if self.first_rank:
                line = {"step": step, **figures, "num_ranks": dist.get_world_size()}
                append_line(self.folder / THROUGHPUT_NAME, line)
            self.track(step, {f"loss/{name}": value for name, value in losses.items()})
            self.track(step, {f"throughput/{name}": value for name, value in figures.items()})

    def probe_if_due(self, step: int, is_asked_to_stop: Callable[[], bool], *, at_end: bool = False) -> None:
        """Probe where the config says so and at the end of training, unless this step has its probe already."""
        every = self.config.monitor.probe_every_steps
        if self.probe is None or self.probed_step == step or step == 0 or not (at_end or step % every == 0):
            return
        start = time.perf_counter()
        with self.pausing():
            figures = self.probe.measure(is_asked_to_stop)
        if figures is None:
            return
        self.probed_step = step
        if self.first_rank:
            append_line(self.folder / PROBE_NAME, {"step": step, **figures})
            k = self.config.monitor.probe_k
            self.log.info(
                "probe at step %d: HR@%d %.4f by query, %.4f by sampler (%d validation users, %.1f s)",
                step, k, figures[f"query_hr@{k}"], figures[f"sampler_hr@{k}"], self.probe.num_users,
                time.perf_counter() - start,
            )  # fmt: skip
        self.track(step, {f"probe/{name}": value for name, value in figures.items()})

    def track(self, step: int, values: dict[str, float]) -> None:
        """Send finite values to every tracker (rank 0 has them)."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self.trackers:
            tracker.log(step, finite)

    def describe(self) -> str:
        """The newest figures, for the log's progress line."""
        parts = [f"loss {self.latest['loss']:.4g}"] if "loss" in self.latest else []
        if "tokens_per_second" in self.latest:
            parts.append(f"{self.latest['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"data wait {self.latest['data_wait_share']:.1%}")
        return ", ".join(parts)

    def close(self) -> None:
        """End the profiler and the trackers."""
        self.profiler.close()
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []

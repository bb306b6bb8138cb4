"""The profiler window: what a few optimizer steps spend their time on.

Writes   run_dir/profile/rank-<r>.json.gz, a Chrome trace a rank (chrome://tracing, Perfetto); rank 0 logs the top
         operators
Cost     Only inside the window and one warm-up step before it; steps there are slower, their results the same.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from contrec_dist.config import MonitorConfig
from contrec_dist.progress import get_logger

TOP_OPERATORS = 15


class ProfilerWindow:
    """Records the optimizer steps monitor.profile_start_step and the profile_num_steps - 1 after it."""

    def __init__(self, monitor: MonitorConfig, folder: Path):
        self.first, self.count, self.folder = max(1, monitor.profile_start_step), monitor.profile_num_steps, folder
        self.profiler: profile | None = None

    def before_step(self, step: int) -> None:
        """In front of optimizer step `step`, counted from 1. A resumed run that missed the start records nothing."""
        warm_up = max(1, self.first - 1)
        if self.count and step == warm_up and self.profiler is None:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            plan = schedule(wait=0, warmup=self.first - warm_up, active=self.count, repeat=1)
            self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
            self.profiler.start()

    def after_step(self) -> None:
        """Called after every optimizer step."""
        if self.profiler is not None:
            self.profiler.step()
            if self.profiler.step_num >= self.first - max(1, self.first - 1) + self.count:
                self.close()

    def close(self) -> None:
        """End the recording; a window that the run's end cut short is written as far as it got."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler, self.count = None, 0

    def _write(self, recorded: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{dist.get_rank()}.json.gz"
        partial = self.folder / f".rank-{dist.get_rank()}.partial.json.gz"  # the suffix decides that it is compressed
        recorded.export_chrome_trace(str(partial))
        os.replace(partial, path)
        if dist.get_rank() == 0:
            order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = recorded.key_averages().table(sort_by=order, row_limit=TOP_OPERATORS, max_name_column_width=60)
            get_logger("train").info("profile of step %d on: %s\n%s", self.first, path, table)

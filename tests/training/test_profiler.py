"""training/profiler.py: the window holds the steps that were asked for."""

import gzip
import json

import pytest
import torch

from contrec_dist.config import MonitorConfig
from contrec_dist.training.profiler import ProfilerWindow


def run_steps(window: ProfilerWindow, first: int, last: int) -> None:
    for step in range(first, last + 1):
        window.before_step(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(4) + 1
        window.after_step()
    window.close()


def recorded(folder) -> set[str]:
    trace = json.loads(gzip.open(folder / "rank-0.json.gz").read())
    return {event["name"] for event in trace["traceEvents"] if event["name"].startswith("step ")}


@pytest.mark.parametrize("start", [1, 3])
def test_trace_holds_the_steps_of_the_window_alone(one_rank, tmp_path, start):
    run_steps(ProfilerWindow(MonitorConfig(profile_start_step=start, profile_num_steps=2), tmp_path), 1, 7)
    assert recorded(tmp_path) == {f"step {start}", f"step {start + 1}"}
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0.json.gz"]


def test_window_that_the_end_cuts_short_is_written_as_far_as_it_got(one_rank, tmp_path):
    run_steps(ProfilerWindow(MonitorConfig(profile_start_step=3, profile_num_steps=9), tmp_path), 1, 4)
    assert recorded(tmp_path) == {"step 3", "step 4"}


@pytest.mark.parametrize("monitor", [MonitorConfig(), MonitorConfig(profile_start_step=2, profile_num_steps=1)])
def test_nothing_is_recorded_without_steps_or_past_the_window(tmp_path, monitor):
    run_steps(ProfilerWindow(monitor, tmp_path / "profile"), 5, 12)
    assert not (tmp_path / "profile").exists()

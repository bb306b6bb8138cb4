"""training/throughput.py: figures that can be worked out from a clock that the test sets."""

import numpy as np
import pytest
import torch

from contrec_dist.benchmarks.flops import BatchCounts, training_flops
from contrec_dist.training import throughput
from contrec_dist.training.throughput import ThroughputMeter

HISTORIES = [[1, 4, 7, 10, 13, 2, 5], [20, 21, 22, 23, 24], [11, 8, 14, 3]]
RATE = 1e9


class Clock:
    """time.perf_counter that goes on when it is told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "measure_matmul_rate", lambda model, device: RATE)
    return clock


@pytest.fixture
def world(make_world):
    return make_world(HISTORIES)


def build_batch(world):
    rows = world.rows
    plan = rows.plan(0)
    return rows.build(plan, np.arange(len(plan.rows)), len(plan.rows))


def test_figures_are_those_of_the_steps_alone(one_rank, clock, world):
    """Two steps of 3 s, of which 0.5 s and 0.25 s waited for data, and 10 s of pause between them."""
    model, batch = world.build_model(), build_batch(world)
    meter = ThroughputMeter(model, torch.device("cpu"))

    def load():
        for wait in (0.5, 0.25):
            clock.now += wait
            yield wait

    for wait in meter.waiting(load()):
        clock.now += 3.0 - wait
        meter.count_step(num_tokens=600, num_targets=60)
        if wait == 0.5:
            with meter.pausing():
                clock.now += 10.0
    figures = meter.measure([batch])
    flops = sum(training_flops(model, BatchCounts.of(model, batch)).values())
    assert figures.pop("peak_memory_bytes") > 1e7
    assert figures == pytest.approx({
        "seconds_since_start": 16.0, "step_seconds": 3.0, "tokens_per_second": 200.0, "targets_per_second": 20.0,
        "data_wait_share": 0.125, "mfu": flops / 3.0 / RATE, "pause_seconds": 10.0,
    })  # fmt: skip


def test_every_line_starts_anew(one_rank, clock, world):
    meter = ThroughputMeter(world.build_model(), torch.device("cpu"))
    for seconds in (4.0, 2.0):
        clock.now += seconds
        meter.count_step(num_tokens=100, num_targets=10)
        assert meter.measure([build_batch(world)])["step_seconds"] == pytest.approx(seconds)


def test_measuring_the_machine_leaves_the_random_state(world):
    before = torch.get_rng_state()
    assert throughput.measure_matmul_rate(world.build_model(), torch.device("cpu")) > 1e8
    assert torch.equal(torch.get_rng_state(), before)

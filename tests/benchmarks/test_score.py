"""benchmarks/score.py: what its figures are made of."""

import argparse

import pytest

from contrec_dist.benchmarks.score import add_arguments, compare_workers, describe_growth, open_run, pick_sizes, plot_growth, summarize
from contrec_dist.errors import ConfigError


def make_facts(users, busy, cpu, driver=100, worker=200):
    return {
        "users": users, "worker_seconds": {"model": 0.75 * busy, "search": 0.25 * busy}, "worker_cpu_seconds": cpu,
        "driver_peak_bytes": driver, "worker_peak_bytes": worker, "worker_own_bytes": worker // 2,
    }  # fmt: skip


def test_rates_are_users_by_wall_clock_by_core_and_by_cpu_time():
    record = summarize(make_facts(1000, busy=40.0, cpu=20.0), seconds=25.0, num_workers=2)
    assert record["users_per_second"] == 40 and record["users_per_second_per_core"] == 20
    assert record["users_per_cpu_second"] == 50 and record["busy_seconds"] == 20
    assert record["shares"] == {"model": 0.75, "search": 0.25}


def test_growth_is_one_where_cost_is_linear(capsys):
    small, large = (summarize(make_facts(n, n / 10, n / 20, driver=n), n / 8, 1) for n in (100, 10_000))
    figures = describe_growth([small, large])
    assert figures["growth_exponent"] == pytest.approx(1.0) == figures["cpu_growth_exponent"]
    assert figures["added_driver_bytes"] == 9_900 and figures["added_worker_bytes"] == 0
    assert "users^1.00" in capsys.readouterr().out and describe_growth([small]) == {}


def test_quadratic_cost_is_seen():
    small, large = (summarize(make_facts(n, n**2, n**2), n**2, 1) for n in (10, 1000))
    figures = describe_growth([small, large])
    assert figures["growth_exponent"] == pytest.approx(2.0) == figures["cpu_growth_exponent"]


def test_workers_are_compared_by_wall_clock():
    one, two = (summarize(make_facts(100, 10, 10), seconds, workers) for seconds, workers in ((30.0, 1), (20.0, 2)))
    assert compare_workers([two, one]) == {"worker_ratio": 1.5, "worker_ratio_users": 100} and compare_workers([one]) == {}


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*arguments])


def test_a_finished_run_is_opened_with_its_own_config_and_scored_as_the_options_say(tmp_path):
    (tmp_path / "run.yaml").write_text("name: real\nhead: {query_dim: 48}\nscore: {splits: [test], k: 7, batch_users: 32}\n")
    parsed = parse("--config", str(tmp_path / "run.yaml"), f"run_dir={tmp_path / 'run'}", "score.batch_users=64", "--k", "20")
    config = open_run(parsed)
    assert config.run_dir == str(tmp_path / "run") and config.head.query_dim == 48 and config.score.batch_users == 64
    assert config.score.splits == ["next"] and config.score.k == 20 and not (tmp_path / "run").exists()


def test_values_of_a_finished_run_without_one_are_refused():
    with pytest.raises(ConfigError, match="--config FILE"):
        open_run(parse("run_dir=somewhere"))


def test_no_more_users_are_measured_than_there_are():
    assert pick_sizes([1000, 10, 100], 50) == [10, 50] and pick_sizes([10, 100], 1000) == [10, 100]


def test_the_plot_is_the_same_bytes_twice(tmp_path):
    records = [summarize(make_facts(n, n / 10, n / 20), n / 8, 1) for n in (100, 1000)]
    for name in ("a.png", "b.png"):
        plot_growth(records, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

"""benchmarks/precompute: both sides do the same work, and the figures are read from both."""

import argparse

import pytest

from contrec_dist.benchmarks import precompute, precompute_runs
from contrec_dist.benchmarks.precompute_inputs import make_inputs
from contrec_dist.errors import ArtifactError, ConfigError

MIB = 2**20
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def in_this_process():
    """Both sides without processes of their own: on the Ray that the tests share."""

    def run(side, folder, num_workers):
        return getattr(precompute_runs, f"measure_{side}")(precompute_runs.make_config(folder, num_workers))

    return run


@pytest.fixture
def figures(tmp_path, monkeypatch, in_this_process, capsys):
    monkeypatch.setattr(precompute, "run_apart", in_this_process)
    parser = argparse.ArgumentParser()
    precompute.add_arguments(parser)
    plot = tmp_path / "plots" / "cost.png"
    asked = f"--sizes 200 100 --repeats 1 --workers 1 --plot {plot} --folder {tmp_path}"
    figures = precompute.run(parser.parse_args(asked.split()))
    assert plot.stat().st_size > 10_000 and "400" in capsys.readouterr().out
    return figures


def test_every_size_has_its_rates_and_peaks_and_the_shards_of_both_sides_are_equal(figures):
    assert [record["rows"] for record in figures["sizes"]] == [200, 400]  # items and users
    for record in figures["sizes"]:
        stage, bare = record["stage"], record["bare"]
        assert record["rows_per_second"] == pytest.approx(record["rows"] / stage["seconds"])
        assert record["ratio"] == pytest.approx(bare["seconds"] / stage["seconds"])  # one worker
        assert 20 * MIB < stage["worker_peak_bytes"] < 4096 * MIB and stage["driver_peak_bytes"] > 20 * MIB
        assert 0 < stage["ray_start_seconds"] < stage["seconds"] and stage["cpu_seconds"] > 0 < bare["cpu_seconds"]


def test_a_loop_that_wrote_other_bytes_is_refused(tmp_path, in_this_process):
    config = precompute_runs.make_config(tmp_path, 1)
    make_inputs(config, 60)
    for side in ("stage", "bare"):
        in_this_process(side, tmp_path, 1)
    precompute.check_equal(config.folder("tokens"), tmp_path / "bare")
    with open(tmp_path / "bare/shards/000000.tar", "r+b") as file:
        file.seek(600)
        file.write(b"x")
    with pytest.raises(ArtifactError, match="000000.tar"):
        precompute.check_equal(config.folder("tokens"), tmp_path / "bare")


def test_repeats_are_one_number_or_one_a_size():
    assert precompute.pair_repeats([10, 100], [3]) == [(10, 3), (100, 3)]
    assert precompute.pair_repeats([10, 100], [3, 1]) == [(10, 3), (100, 1)]
    with pytest.raises(ConfigError, match="--repeats"):
        precompute.pair_repeats([10, 100, 1000], [3, 1])

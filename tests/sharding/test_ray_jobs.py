"""ray_jobs: every part exactly once, through restarts, deaths of workers and errors. Real Ray, real kills."""

import json
import os
import signal
from pathlib import Path

import pytest
import ray

from contrec_dist.config import RayConfig
from contrec_dist.errors import ArtifactError, ConfigError
from sharding.ray_jobs import Part, PartError, ray_session, remove_part_records, run_parts


ONE_WORKER = RayConfig(num_workers=1)
pytestmark = pytest.mark.usefixtures("ray_cluster")


class Counter:
    """Writes `number` lines; notes every call, so that a test can count how often a part was made."""

    def __init__(self, calls: Path, die_on: str = "", times: int = 1, fail_on: str = ""):
        self.calls, self.die_on, self.times, self.fail_on = calls, die_on, times, fail_on

    def process(self, payload: dict, *paths: Path) -> dict:
        name = payload["name"]
        with open(self.calls / name, "a") as file:
            file.write(f"{os.getpid()}\n")
        for path in paths:
            path.write_text("half")
        if name == self.die_on and len((self.calls / name).read_text().split()) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == self.fail_on:
            raise ArtifactError("input.npy", "row 7 of NaN", "numbers")
        for path in paths:
            path.write_text("\n".join(f"{name} {i}" for i in range(payload["number"])))
        return {"lines": payload["number"]}


class NeverStarts:
    def __init__(self):
        raise ArtifactError("model/", "no such folder", "a model")


def make_parts(num_parts: int = 6) -> list[Part]:
    return [Part(name=f"sub/{i:03d}.txt", payload={"name": f"{i:03d}", "number": i + 2}) for i in range(num_parts)]


def run(parts, tmp_path, workers=ONE_WORKER, output="out", worker=Counter, **arguments):
    calls = tmp_path / f"calls-{output}"
    calls.mkdir(exist_ok=True)
    arguments = {"calls": calls, **arguments} if worker is Counter else arguments
    options = {"output_folder": tmp_path / output, "workers": workers, "stage": "test", "unit": "parts"}
    return run_parts(parts, worker, arguments, **options)


def num_calls(tmp_path, output="out") -> dict[str, int]:
    return {path.name: len(path.read_text().split()) for path in (tmp_path / f"calls-{output}").iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_part_is_made_once_even_with_more_workers_than_the_cluster_holds(tmp_path):
    facts = run(make_parts(), tmp_path, RayConfig(num_workers=4))
    assert facts == [{"lines": i + 2} for i in range(6)]
    assert num_calls(tmp_path) == {f"{i:03d}": 1 for i in range(6)}
    assert (tmp_path / "out/sub/001.txt").read_text() == "001 0\n001 1\n001 2"
    remove_part_records(tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [f"sub/{i:03d}.txt" for i in range(6)]


def test_only_missing_and_damaged_parts_are_made_again(tmp_path):
    first = run(make_parts(), tmp_path)
    before = contents(tmp_path / "out")
    (tmp_path / "out/sub/001.txt").unlink()
    (tmp_path / "out/sub/002.txt").write_text("002 0\n002 1\n002 2\n002 x")  # same size
    (tmp_path / "out/.parts/sub/003.txt.json").unlink()
    (tmp_path / "out/sub/.004.txt.99.tmp").write_text("left by a killed worker")
    assert run(make_parts(), tmp_path) == first
    assert num_calls(tmp_path) == {"000": 1, "001": 2, "002": 2, "003": 2, "004": 1, "005": 1}
    assert contents(tmp_path / "out") == before


def test_part_of_another_payload_is_made_again(tmp_path):
    run(make_parts(2), tmp_path)
    longer = Part(name="sub/001.txt", payload={"name": "001", "number": 9})
    assert run([make_parts(1)[0], longer], tmp_path) == [{"lines": 2}, {"lines": 9}]


def test_killed_worker_is_replaced_and_the_bytes_are_those_of_one_undisturbed_worker(tmp_path):
    run(make_parts(), tmp_path, output="undisturbed")
    run(make_parts(), tmp_path, RayConfig(num_workers=2), "killed", die_on="002")
    assert num_calls(tmp_path, "killed")["002"] == 2
    assert len(set((tmp_path / "calls-killed/002").read_text().split())) == 2  # another process
    for path in (tmp_path / "killed").rglob(".*.tmp"):  # what the dead process held; the manifest driver removes it
        path.unlink()
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_part_that_always_kills_its_worker_ends_the_job(tmp_path):
    with pytest.raises(PartError, match="sub/000.txt.*died 4 times"):
        run(make_parts(1), tmp_path, die_on="000", times=100)
    assert num_calls(tmp_path) == {"000": 4}


def test_error_of_a_part_ends_the_job_at_once_and_names_it(tmp_path):
    with pytest.raises(PartError, match="test, part 'sub/003.txt': ArtifactError: input.npy: got row 7") as caught:
        run(make_parts(), tmp_path, fail_on="003")
    assert caught.value.part == "sub/003.txt"
    assert num_calls(tmp_path)["003"] == 1
    assert not (tmp_path / "out/sub/003.txt").exists()
    run(make_parts(), tmp_path)  # repaired: the finished ones are kept
    assert num_calls(tmp_path)["000"] == 1 and num_calls(tmp_path)["003"] == 2


def test_worker_that_cannot_be_made_ends_the_job_with_its_reason(tmp_path):
    with pytest.raises(PartError, match="sub/000.txt.*no such folder"):
        run(make_parts(1), tmp_path, worker=NeverStarts)


def test_part_of_two_files_is_recorded_as_one(tmp_path):
    part = Part(name="a", payload={"name": "a", "number": 1}, files=("x/a.tar", "y/a.idx"))
    run([part], tmp_path)
    record = json.loads((tmp_path / "out/.parts/a.json").read_text())
    assert sorted(record["files"]) == ["x/a.tar", "y/a.idx"]
    (tmp_path / "out/y/a.idx").unlink()
    run([part], tmp_path)
    assert num_calls(tmp_path) == {"a": 2} and (tmp_path / "out/y/a.idx").read_text() == "a 0"


def test_parts_behind_the_one_that_killed_their_worker_are_not_blamed(tmp_path):
    """One worker with two parts in flight: its death counts for the part at work."""
    run(make_parts(), tmp_path, die_on="002", times=3)
    assert num_calls(tmp_path) == {"000": 1, "001": 1, "002": 4, "003": 1, "004": 1, "005": 1}


def test_no_part_is_given_out_before_enough_workers_are_up(tmp_path):
    run(make_parts(2), tmp_path, RayConfig(num_workers=2, min_workers=2))
    makers = {(tmp_path / f"calls-out/00{i}").read_text() for i in range(2)}
    assert len(makers) == 2  # with one worker up, it would have been given both


def test_range_of_workers_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="ray.min_workers.*1 to ray.num_workers"):
        RayConfig(num_workers=2, min_workers=3)


def test_workers_reserve_memory(tmp_path):
    """Two workers do not fit side by side where each reserves more than half: they work one after the other."""
    most = int(ray.cluster_resources()["memory"] * 0.6)
    run(make_parts(), tmp_path, RayConfig(num_workers=2, memory_bytes_per_worker=most))
    assert len({(tmp_path / f"calls-out/00{i}").read_text() for i in range(6)}) == 1


def test_two_parts_with_one_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'b'.*a.txt"):
        run([Part(name="a.txt", payload={}), Part(name="b", payload={}, files=("a.txt",))], tmp_path)


def test_no_parts_are_no_work(tmp_path):
    assert run([], tmp_path) == []


def test_session_inside_a_session_leaves_it_open():
    with ray_session(RayConfig(num_workers=1)):
        pass
    assert ray.is_initialized()
    assert ray.cluster_resources()["CPU"] == 2

"""A scoring job that was killed, and whose worker was killed when it ran again, gives the bytes of one that never was."""

import signal
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from launched import Command, copy_run, file_hashes, start_contrec, wait_for

from contrec_dist.config import Config

pytestmark = pytest.mark.timeout(900)


@dataclass
class Story:
    """What happened to one job: killed with all that belongs to it, then a worker of its second run."""

    config: Config
    survivors: list[psutil.Process]
    killed_parts: dict[str, int]
    finished_parts: dict[str, int]
    worker_died: bool
    finished: Command


@pytest.fixture(scope="module")
def story(reference, run_config, tmp_path_factory) -> Story:
    folder = tmp_path_factory.mktemp("disturbed_score")
    config = replace(run_config, run_dir=str(folder / "run"))
    copy_run(reference[0], config, "catalog", "embeddings", "tokenizer", "tokens", "model", "index")

    killed = start_contrec("score", config, folder / "killed.log")
    try:
        wait_for(lambda: _parts(config), killed, "a first part")
        below = killed.below()
        killed.send_to_group(signal.SIGKILL)
        killed.wait()
        _, survivors = psutil.wait_procs(below, timeout=60)
        killed_parts = _parts(config)
    finally:
        killed.end()

    finished = start_contrec("score", config, folder / "finished.log")
    try:
        wait_for(lambda: len(_parts(config)) > len(killed_parts), finished, "a further part")
        worker = wait_for(lambda: next(filter(_is_worker, finished.below()), None), finished, "a Ray worker")
        worker.kill()
        worker_died = bool(psutil.wait_procs([worker], timeout=60)[0])
        finished_parts = _parts(config)
        finished.wait()
    finally:
        finished.end()
    return Story(config, survivors, killed_parts, finished_parts, worker_died, finished)


def test_sigkill_of_the_group_leaves_no_process_of_the_job(story):
    assert story.survivors == []


def test_disturbances_came_in_mid_job(story, reference):
    num_parts = len(story.config.score.splits) * -(-150 // story.config.score.users_per_part)
    assert 0 < len(story.killed_parts) < num_parts
    assert story.worker_died and len(story.finished_parts) < num_parts


def test_parts_of_the_killed_job_are_kept(story):
    """The second run does not make them again: their records are the same files."""
    assert {name: story.finished_parts[name] for name in story.killed_parts} == story.killed_parts


def test_score_killed_and_run_again_equals_undisturbed(story, reference):
    assert story.finished.process.returncode == 0, story.finished.log
    assert file_hashes(story.config, "recommendations") == file_hashes(reference[0], "recommendations")


def _parts(config: Config) -> dict[str, int]:
    """Record of a finished candidate part -> its inode."""
    records = Path(config.run_dir).glob(".recommendations.partial/.candidates/.parts/*.json")
    return {path.name: path.stat().st_ino for path in records if not path.name.startswith(".")}


def _is_worker(process: psutil.Process) -> bool:
    """Ray names the process of an actor after its class."""
    try:
        return any("_PartActor" in argument for argument in process.cmdline())
    except psutil.Error:
        return False

"""The Ray stages as people run them, on a cluster of two nodes: submitted as a job, and with each part of it killed."""

import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from launched import Command, free_port, start, wait_for, write_config
from omegaconf import OmegaConf
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from contrec_dist.config import Config
from contrec_dist.data import precompute
from contrec_dist.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
ENDED = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}
# Of the 12 parts of the toy run: after the two tables of latents, while shards are left for both workers.
KILL_POINTS = (3, 7)

# `contrec precompute` that stops after so many parts, says so, and goes on when it is told to.
PAUSED_RUN = """
import sys, time
from pathlib import Path
import sharding.ray_jobs
from contrec_dist.__main__ import main

real_track, countdown, folder = sharding.ray_jobs.track, [int(sys.argv[1])], Path(sys.argv[2])

def pause_after(items, **options):
    for item in real_track(items, **options):
        countdown[0] -= 1
        if countdown[0] == 0:
            (folder / "paused").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        yield item

sharding.ray_jobs.track = pause_after
sys.exit(main(["precompute", "--config", sys.argv[3]]))
"""


class TwoNodes:
    """A head and a further node of one CPU each, in processes of their own, with the job server.

    Every node's agent gets a port of its own: with Ray's default, one node of a machine has an agent that takes jobs.
    """

    def __init__(self):
        self.cluster = Cluster(initialize_head=True, head_node_args={**node_arguments(), "include_dashboard": True})
        self.complete()

    def complete(self) -> None:
        """Start the further node if there is none."""
        if not self.cluster.worker_nodes:
            self.cluster.add_node(**node_arguments())

    def workers(self, node) -> list[psutil.Process]:
        """Processes of a node that make parts; Ray names them after the class."""
        below = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        return [process for process in below if is_worker(process)]

    def rest(self) -> None:
        """Wait until the workers of earlier jobs have ended: one of them would be struck in place of this job's."""
        earlier = [worker for node in (self.cluster.head_node, *self.cluster.worker_nodes) for worker in self.workers(node)]
        _, alive = psutil.wait_procs(earlier, timeout=120)
        assert not alive

    def kill(self, node) -> None:
        """SIGKILL to all processes of a node."""
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self.cluster.worker_nodes.discard(node)


def is_worker(process: psutil.Process) -> bool:
    try:
        return any("_PartActor" in argument for argument in process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def node_arguments() -> dict:
    return {"num_cpus": 1, "object_store_memory": 80_000_000, "dashboard_agent_listen_port": free_port()}


@pytest.fixture(scope="module")
def nodes():
    nodes = TwoNodes()
    yield nodes
    nodes.cluster.shutdown()


def take_inputs(toy_tokens: Config, run_dir: Path) -> Config:
    """The config of a run that has all that precompute reads; two workers, one a node."""
    ray = replace(toy_tokens.ray, num_workers=2, min_workers=2)
    config = replace(toy_tokens, run_dir=str(run_dir), ray=ray)
    run_dir.mkdir()
    for folder in ("catalog", "embeddings", "tokenizer"):
        (run_dir / folder).symlink_to(toy_tokens.folder(folder))
    return config


def submit_once_up(client: JobSubmissionClient, entrypoint: str) -> str:
    """Submit a job; a cluster that is still starting answers that its agent is not there yet, try again later."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def test_precompute_submitted_to_a_cluster_gives_the_bytes_of_a_local_run(nodes, toy_tokens, tmp_path):
    config = take_inputs(toy_tokens, tmp_path / "run")
    settings = tmp_path / "config.yaml"
    settings.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    client = JobSubmissionClient(f"http://{nodes.cluster.webui_url}")
    launcher = ROOT / "launchers" / "precompute.py"
    job = submit_once_up(client, f"{sys.executable} {launcher} --config {settings}")
    while client.get_job_status(job) not in ENDED:
        time.sleep(0.5)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    assert "joined the cluster" in client.get_job_logs(job) and "2 CPU" in client.get_job_logs(job)
    submitted, local = Manifest.load(config.folder("tokens")), Manifest.load(toy_tokens.folder("tokens"))
    assert submitted.files == local.files


def strike(victim: str, nodes: TwoNodes, job: Command) -> None:
    """SIGKILL to a worker, to the driver, to all processes of the further node, or to all of the head."""
    head, (further,) = nodes.cluster.head_node, nodes.cluster.worker_nodes
    if victim == "driver":
        job.process.send_signal(signal.SIGKILL)
    elif victim == "worker":
        (nodes.workers(head) + nodes.workers(further))[0].kill()
    else:
        wait_for(lambda: all(nodes.workers(node) for node in (head, further)), job, "a worker on either node")
        nodes.kill(head if victim == "head" else further)


@pytest.mark.parametrize("victim", ["worker", "driver", "node", "head"])  # the head last: the others need it
def test_precompute_survives_the_loss_of_any_part_and_its_files_are_those_of_an_undisturbed_run(
    victim, nodes, toy_tokens, tmp_path
):
    nodes.complete()
    nodes.rest()
    config = take_inputs(toy_tokens, tmp_path / "run")
    seed = ["worker", "driver", "node", "head"].index(victim)
    num_parts = int(np.random.default_rng(seed).integers(*KILL_POINTS))
    settings = write_config(config, tmp_path / "config.yaml")
    arguments = [sys.executable, "-c", PAUSED_RUN, str(num_parts), str(tmp_path), str(settings)]
    quick = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5", "RAY_ADDRESS": nodes.cluster.address}
    job = start(arguments, tmp_path / "job.log", **quick)
    try:
        wait_for((tmp_path / "paused").exists, job, f"part {num_parts}")
        strike(victim, nodes, job)
        (tmp_path / "go").touch()
        exit_code = job.wait()
    finally:
        job.end()
    if victim in ("worker", "node"):
        assert exit_code == 0, job.log
        # The further node's worker may still be loading when it is lost: then no part of its own is made again.
        assert victim == "node" or "a worker died" in job.log, job.log
    else:
        assert exit_code != 0 and not config.folder("tokens").exists(), job.log
        assert list((tmp_path / "run/.tokens.partial").rglob(".parts/**/*.json")), "the finished parts are gone"
        precompute.run(config)  # the same again, on the cluster that this process is in
    written, undisturbed = Manifest.load(config.folder("tokens")), Manifest.load(toy_tokens.folder("tokens"))
    assert written.files == undisturbed.files
    written.check_files(config.folder("tokens"), deep=True)

"""The Ray stages as people run them: submitted to a running cluster as a job, on two nodes."""

import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from contrec_dist.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
ENDED = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}


@pytest.fixture
def cluster():
    """Two nodes of one CPU each in processes of their own, with the job server.

    Every node's agent gets a port of its own: with Ray's default, only one node of a machine has an agent that takes jobs.
    """
    cluster = Cluster(initialize_head=True, head_node_args={**node_arguments(), "include_dashboard": True})
    cluster.add_node(**node_arguments())
    yield cluster
    cluster.shutdown()


def node_arguments() -> dict:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    return {"num_cpus": 1, "object_store_memory": 80_000_000, "dashboard_agent_listen_port": port}


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


def test_precompute_submitted_to_a_cluster_gives_the_bytes_of_a_local_run(cluster, toy_tokens, tmp_path):
    config = replace(toy_tokens, run_dir=str(tmp_path), ray=replace(toy_tokens.ray, num_workers=2))
    for folder in ("catalog", "embeddings", "tokenizer"):
        (tmp_path / folder).symlink_to(toy_tokens.folder(folder))
    settings = tmp_path / "config.yaml"
    settings.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    client = JobSubmissionClient(f"http://{cluster.webui_url}")
    launcher = ROOT / "launchers" / "precompute.py"
    job = submit_once_up(client, f"{sys.executable} {launcher} --config {settings}")
    while client.get_job_status(job) not in ENDED:
        time.sleep(0.5)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    assert "joined the cluster" in client.get_job_logs(job) and "2 CPU" in client.get_job_logs(job)
    submitted, local = Manifest.load(config.folder("tokens")), Manifest.load(toy_tokens.folder("tokens"))
    assert submitted.files == local.files

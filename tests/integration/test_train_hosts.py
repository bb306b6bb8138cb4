"""Two hosts: `deepspeed --hostfile` with two addresses of this machine, each started by hand with its node rank, as
configs/cluster/slurm_train.sbatch does. (ssh and pdsh only carry the same command to the hosts.)
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launched import ROOT, Command, copy_run, file_hashes, free_port, start, wait_for, write_config

from contrec_dist.config import Config

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
HOSTS = ("127.0.0.1", "127.0.0.2")


@pytest.fixture(scope="module")
def config(reference, run_config, tmp_path_factory) -> Config:
    """The reference's training, with as many threads a process as two ranks of one host take."""
    launch = replace(run_config.launch, threads=max(1, (os.cpu_count() or 1) // 2), requeue_exit_code=0)
    config = replace(run_config, run_dir=str(tmp_path_factory.mktemp("hosts") / "run"), launch=launch)
    return copy_run(reference[0], config, "catalog", "embeddings", "tokenizer", "tokens")


@pytest.fixture(scope="module")
def interrupted(config) -> list[Command]:
    """Ctrl-C at one host after the first checkpoint."""
    nodes = _start_nodes(config, "interrupted")
    try:
        wait_for(lambda: list(Path(config.run_dir).glob("checkpoints/*/step-*")), nodes[0], "a first checkpoint")
        nodes[1].send_to_group(signal.SIGINT)
        for node in nodes:
            node.wait()
    finally:
        for node in nodes:
            node.end()
    return nodes


@pytest.fixture(scope="module")
def finished(config, interrupted) -> list[Command]:
    nodes = _start_nodes(config, "finished")
    try:
        for node in nodes:
            node.wait()
    finally:
        for node in nodes:
            node.end()
    return nodes


def test_ctrl_c_at_one_host_stops_both_with_a_checkpoint_of_the_same_step(config, interrupted):
    assert interrupted[0].process.returncode == 0, interrupted[0].log
    assert "by a signal; run the same command again to go on" in interrupted[0].log
    newest = max(Path(config.run_dir).glob("checkpoints/*/step-*/complete.json"))
    assert f"stopped at step {json.loads(newest.read_text())['position']['step']} " in interrupted[0].log


def test_two_hosts_train_the_same_model_as_two_ranks_of_one(config, finished, reference):
    assert [node.process.returncode for node in finished] == [0, 0], finished[0].log + finished[1].log
    assert "resumed at step " in finished[0].log
    assert file_hashes(config, "model") == file_hashes(reference[0], "model")


def _start_nodes(config: Config, name: str) -> list[Command]:
    """The same command on each host but for the node rank."""
    folder = Path(config.run_dir).parent
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    path, port = write_config(config, folder / "config.yaml"), free_port()
    return [
        start(
            [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh", "--node_rank",
             str(rank), "--master_addr", HOSTS[0], "--master_port", str(port),
             str(ROOT / "launchers" / "train.py"), "--config", str(path)],
            folder / f"{name}-{rank}.log",
        )
        for rank in range(len(HOSTS))
    ]  # fmt: skip

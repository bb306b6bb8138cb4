"""configs/cluster/: what the files for Slurm, Kubernetes and Docker promise, as far as it can be held without a cluster.

The Slurm script runs here as it is, in a folder like a checkout; srun, scontrol and deepspeed are stand-ins on its PATH.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "configs" / "cluster"
STAND_INS = {
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; export SLURM_NODEID=0; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "node-0\\nnode-1\\n"; else echo "$@" >> scontrol.txt; fi',
    "deepspeed": """echo "$@" > deepspeed.txt
        while [ -f hold ] && [ ! -f runs/toy/STOP ]; do sleep 0.1; done
        exit "$(cat code)" """,
}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with the configs, an environment to activate, and the stand-ins."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "activate").write_text(f'PATH="{tools}:$PATH"\n')
    for name, body in {**STAND_INS, "python": f'exec {sys.executable} "$@"'}.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    return tmp_path


def start_job(checkout: Path, *, exit_code: int) -> subprocess.Popen:
    (checkout / "code").write_text(str(exit_code))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_GPUS_ON_NODE": "8"}
    script = str(checkout / "configs" / "cluster" / "slurm_train.sbatch")
    return subprocess.Popen(
        ["bash", script, "configs/demo.yaml", "name=toy", "seed=1"], cwd=checkout, text=True,
        env={**os.environ, **slurm, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def requeue_code() -> int:
    return int(re.search(r"^REQUEUE=(\d+)", (CLUSTER / "slurm_train.sbatch").read_text(), re.MULTILINE)[1])


def test_the_slurm_job_starts_the_launcher_with_switches_that_deepspeed_knows(checkout):
    from deepspeed.launcher.runner import parse_args

    job = start_job(checkout, exit_code=0)
    assert job.wait(timeout=120) == 0, job.stdout.read()
    parsed = parse_args((checkout / "deepspeed.txt").read_text().split())
    assert parsed.user_script == "launchers/train.py" and parsed.no_ssh and parsed.master_addr == "node-0"
    assert parsed.user_args[:2] == ["--config", "configs/demo.yaml"] and "seed=1" in parsed.user_args
    assert not (checkout / "scontrol.txt").exists() and not list(checkout.glob("hostfile.*"))


def test_the_slurm_job_asks_for_a_checkpoint_before_its_limit_and_goes_back_into_the_queue(checkout):
    (checkout / "hold").touch()  # trains until the stop-file is there
    job = start_job(checkout, exit_code=requeue_code())
    deadline = time.monotonic() + 120
    while not (checkout / "deepspeed.txt").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM does
    assert job.wait(timeout=120) == requeue_code(), job.stdout.read()
    assert (checkout / "scontrol.txt").read_text() == "requeue 7\n"
    settings = (CLUSTER / "slurm_train.sbatch").read_text()
    assert re.search(r"#SBATCH --signal=B:TERM@\d+", settings) and "#SBATCH --requeue" in settings


def test_a_slurm_job_that_failed_stays_out_of_the_queue(checkout):
    job = start_job(checkout, exit_code=1)
    assert job.wait(timeout=120) == 1, job.stdout.read()
    assert not (checkout / "scontrol.txt").exists()


def test_a_pod_waits_for_the_checkpoint_and_then_starts_again():
    job = yaml.safe_load((CLUSTER / "kubernetes_train.yaml").read_text())
    assert job["spec"]["runPolicy"]["backoffLimit"] > 0
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        variables = {one["name"]: one["value"] for one in container["env"]}
        assert replica["restartPolicy"] == "OnFailure"
        assert not any(argument == "launch.requeue_exit_code=0" for argument in container["args"])
        assert any(argument.startswith("launch.requeue_exit_code=") for argument in container["args"])
        # torchrun kills ranks that save for longer (30 s by default), the kubelet torchrun
        assert 30 < int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


def test_the_image_installs_extras_that_exist_and_copies_files_that_exist():
    text = (CLUSTER / "Dockerfile").read_text()
    setup = (ROOT / "setup.cfg").read_text()
    for extras in re.findall(r"\.\[([^\]]*)\]", text):
        assert all(re.search(rf"^{extra} =", setup, re.MULTILINE) for extra in extras.split(",")), extras
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    wanted = re.search(r"pip install 'faiss-gpu([^']*)'", setup)[1]
    assert f"'faiss-gpu{wanted}'" in text and "pip uninstall --yes faiss-cpu" in text


@pytest.mark.parametrize("script", ["slurm_train.sbatch", "slurm_ray.sbatch"])
def test_scripts_are_valid_shell(script):
    subprocess.run(["bash", "-n", str(CLUSTER / script)], check=True)

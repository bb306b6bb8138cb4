"""What a wheel would hold, and what the cluster files say, against the tree."""

import configparser
import shlex
from pathlib import Path

import pytest
import yaml
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "configs" / "cluster"


def read_setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def test_every_module_lies_in_a_package_that_is_installed():
    include = read_setup()["options.packages.find"]["include"].split()
    packages = set(find_packages(str(ROOT), include=include))
    modules = [path for top in ("contrec_dist", "sharding", "launchers") for path in (ROOT / top).rglob("*.py")]
    left_out = {path.relative_to(ROOT).parent.as_posix().replace("/", ".") for path in modules} - packages
    assert modules and not left_out


def test_every_file_beside_the_modules_is_installed():
    data = read_setup()["options.package_data"]
    others = [path for path in (ROOT / "contrec_dist").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    for path in others:
        package = path.relative_to(ROOT).parent.as_posix().replace("/", ".")
        assert any(path.match(pattern) for pattern in data.get(package, "").split()), f"{path} is not installed"


def test_faiss_cpu_comes_with_every_installation_and_no_extra_adds_the_gpu_build():
    setup = read_setup()
    assert "faiss-cpu" in setup["options"]["install_requires"]
    for extra, packages in setup["options.extras_require"].items():
        assert "faiss-gpu" not in packages, extra


@pytest.mark.parametrize("name", ["rayjob_precompute.yaml", "rayjob_score.yaml"])
def test_a_ray_job_starts_a_launcher_that_is_there(name):
    job = yaml.safe_load((CLUSTER / name).read_text())
    assert job["kind"] == "RayJob"
    python, launcher, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert python == "python" and (ROOT / Path(launcher).relative_to("/app")).is_file()
    check_arguments(arguments)


def test_the_training_job_starts_the_training_launcher_on_every_machine():
    job = yaml.safe_load((CLUSTER / "kubernetes_train.yaml").read_text())
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["command"] == ["torchrun"] and container["args"][0] == "launchers/train.py"
        check_arguments(container["args"][1:])


def check_arguments(arguments: list[str]) -> None:
    """`--config FILE key=value ...`, with a file that is shipped and keys that exist."""
    from contrec_dist.config import load_config

    option, path, *overrides = arguments
    assert option == "--config"
    load_config([ROOT / path.removeprefix("/app/")], overrides)


def test_deepspeed_reads_the_hostfile_and_the_environment_file():
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(CLUSTER / "hostfile"))) == {"node-0": 8, "node-1": 8}
    for line in (CLUSTER / ".deepspeed_env").read_text().splitlines():
        key, value = line.split("=", maxsplit=1)  # as DeepSpeed's launcher does, with no room for comments
        assert key.isidentifier() and value

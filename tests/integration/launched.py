"""Starting the project's commands as people do, watching their files, and ending what a test started."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import psutil
from omegaconf import OmegaConf

from contrec_dist.config import Config
from contrec_dist.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 300


def write_config(config: Config, path: Path) -> Path:
    """The config as a YAML file."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return path


def environment(**extra: str) -> dict[str, str]:
    """One thread a process that sleeps when it waits; no Ray session of this test process; nothing of the launcher's."""
    own = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RANK", "WORLD_SIZE")}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "POLARS_MAX_THREADS": "1"}
    return {**own, **threads, "PYTHONPATH": str(ROOT), **extra}


@dataclass
class Command:
    """A command in a process group of its own, its output in a file."""

    process: subprocess.Popen
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(timeout=WAIT_SECONDS)

    def below(self) -> list[psutil.Process]:
        """Every process that it started and that lives."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def send_to_group(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Kill what is left of it."""
        processes = [self.process.pid] if self.process.poll() is None else []
        for process in [*(self.below() if processes else []), *map(psutil.Process, processes)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait(timeout=WAIT_SECONDS)


def start(arguments: list[str], log_path: Path, **extra: str) -> Command:
    """Start a command from a folder that is not the source tree."""
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            arguments, stdout=log, stderr=subprocess.STDOUT, cwd=log_path.parent, env=environment(**extra),
            start_new_session=True,
        )  # fmt: skip
    return Command(process, log_path)


def start_contrec(stage: str, config: Config, log_path: Path, *overrides: str, **extra: str) -> Command:
    """`contrec STAGE --config FILE run_dir=... key=value ...`"""
    path = write_config(config, log_path.with_suffix(".yaml"))
    return start([sys.executable, "-m", "contrec_dist", stage, "--config", str(path), *overrides], log_path, **extra)


def run_contrec(stage: str, config: Config, log_path: Path, *overrides: str, **extra: str) -> Command:
    """The same, to its end; killed when it takes for ever."""
    command = start_contrec(stage, config, log_path, *overrides, **extra)
    try:
        command.wait()
    finally:
        command.end()
    return command


def run_several(
    configs: dict[str, Config], folder: Path, *options: str, num_ranks: int = 2, **extra: str
) -> Command:
    """Train the configs in one start of DeepSpeed (train_several.py, its options); observations lie in `folder`."""
    paths = [str(write_config(config, folder / f"{name}.yaml")) for name, config in configs.items()]
    script = Path(__file__).with_name("train_several.py")
    command = start(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks), "--master_port",
         str(free_port()), str(script), "--observe", str(folder), *options, *paths],
        folder / f"several_on_{num_ranks}.log", **extra,
    )  # fmt: skip
    try:
        assert command.wait() == 0, command.log
    finally:
        command.end()
    return command


def free_port() -> int:
    """A TCP port that nobody holds."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(condition: Callable[[], object], command: Command, what: str) -> object:
    """Poll until `condition()` is true and return its value; fail with the log when the command ends or time is up."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        assert command.process.poll() is None, f"the command ended before {what}:\n{command.log}"
        time.sleep(0.005)
    raise AssertionError(f"no {what} in {WAIT_SECONDS} s:\n{command.log}")


def copy_run(source: Config, target: Config, *folders: str) -> Config:
    """Copy finished folders of one run into another one."""
    Path(target.run_dir).mkdir(parents=True, exist_ok=True)
    for folder in folders:
        shutil.copytree(source.folder(folder), target.folder(folder))
    return target


def file_hashes(config: Config, folder: str) -> dict[str, str]:
    """File of a finished folder -> sha256, after checking that the files are what the manifest says."""
    manifest = Manifest.load(config.folder(folder))
    manifest.check_files(config.folder(folder), deep=True)
    return {name: record["sha256"] for name, record in manifest.files.items()}

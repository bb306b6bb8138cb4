"""The train stage: tokens -> checkpoints/ and model/.

`run` starts `deepspeed` on this machine (or over a hostfile); what every rank then executes is in rank.py, also when
somebody started `deepspeed launchers/train.py` or torchrun themselves. This module loads no torch, so the command
that only waits for its ranks is small.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from contrec_dist.config import Config
from contrec_dist.errors import ConfigError, ContRecError, StageStopped
from contrec_dist.manifest import Manifest, find_complete, lock_folder, write_atomically
from contrec_dist.progress import get_logger
from contrec_dist.training.deepspeed_file import counted_settings
from contrec_dist.training.starter import run_launcher

STAGE = {
    "stage": "train",
    "folder": "model",
    "sections": ("prompt", "backbone", "head", "loss", "train", "zero"),
    "inputs": ("catalog", "tokenizer", "tokens"),
}


def run(config: Config) -> Manifest:
    """Train with `deepspeed` unless the model is complete.

    Errors   ArtifactError when another process trains this run
             ContRecError with the exit code of a failed run
             StageStopped when it was asked to stop: before its end, or during the export, which is then complete
    """
    with lock_folder(config, STAGE["folder"]):  # a second trainer is refused here, before any rank starts
        done = find_complete(config, **stage_settings(config))
    if done is not None:
        get_logger("train").info("complete, skipped: %s", config.folder("model"))
        return done
    command, environment = launch_command(config)
    get_logger("train").info("starting: %s", " ".join(command))
    code, asked_to_stop = run_launcher(command, environment)
    stop_code = config.launch.requeue_exit_code
    if code not in (0, stop_code) and not asked_to_stop:
        raise ContRecError(f"training ended with exit code {code}; its log is above, its checkpoints are kept")
    done = find_complete(config, **stage_settings(config))
    if done is None:
        raise StageStopped("training stopped before its end; run the same command again to go on", stop_code)
    if asked_to_stop:
        raise StageStopped("training is complete; stopped after it, as asked", stop_code)
    return done


def stage_settings(config: Config) -> dict:
    """What find_complete and run_stage take: STAGE, and what a DeepSpeed JSON of the user's adds to the identity."""
    return {**STAGE, "extra_identity": counted_settings(config)}


def launch_command(config: Config) -> tuple[list[str], dict[str, str]]:
    """The `deepspeed` command of this run and its environment; the resolved config goes into the run's folder."""
    resolved = Path(config.run_dir) / "train.yaml"
    write_atomically(resolved, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    launcher = find_spec("launchers.train").origin
    where = ["--hostfile", config.launch.hostfile] if config.launch.hostfile else ["--num_gpus", str(config.launch.num_ranks)]
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(_free_port()),
        "--log_level", "warning", launcher, "--config", str(resolved.resolve()),
    ]  # fmt: skip
    source_tree = str(Path(launcher).parents[1])
    paths = [source_tree, *filter(None, [os.environ.get("PYTHONPATH")])]
    return command, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def load_user_latents(config: Config) -> np.ndarray | None:
    """User latents (U, K, Z) when the prompt has user tokens, users that training never saw at zero; else None.

    Errors   ConfigError when user tokens are asked for and the precompute stage wrote none
    """
    if not config.prompt.user_tokens:
        return None
    path = config.folder("tokens") / "user_latents.npy"
    if not path.is_file():
        raise ConfigError("prompt.user_tokens", True, "a collaborative embedding (embed.collaborative), which gives users tokens")
    latents = np.load(path)
    known = np.load(config.folder("embeddings") / "user_known.npy")
    return np.where(known[:, None, None], latents, np.float32(0.0))


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

"""The train stage: tokens -> checkpoints/ and model/.

`run` starts `deepspeed` on this machine (or over a hostfile); `run_rank` is what every rank executes, also when somebody
started `deepspeed launchers/train.py` or torchrun themselves. Rank 0 keeps the stage's books (manifest.py); the other
ranks follow its decision to train or to skip.
"""

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl
import torch
from omegaconf import OmegaConf

from contrec_dist.config import Config
from contrec_dist.data.batches import TrainingRows
from contrec_dist.data.prompts import RESPONSE_TEXTS, PromptTexts
from contrec_dist.errors import ConfigError, ContRecError
from contrec_dist.manifest import IDENTITY_NAME, Manifest, find_complete, run_stage, write_atomically
from contrec_dist.model.backbone import load_text_tokenizer, train_text_tokenizer
from contrec_dist.model.export import build_model, load_export, save_export
from contrec_dist.progress import get_logger
from sharding.token_reader import TokenReader

STAGE = {
    "stage": "train",
    "folder": "model",
    "sections": ("prompt", "backbone", "head", "loss", "train", "zero"),
    "inputs": ("catalog", "tokenizer", "tokens"),
}
PROBE_QUERIES = 1000


def run(config: Config) -> Manifest:
    """Train with `deepspeed` unless the model is complete. Errors   ContRecError with the exit code of a failed run."""
    done = find_complete(config, **STAGE)
    if done is not None:
        get_logger("train").info("complete, skipped: %s", config.folder("model"))
        return done
    command, environment = launch_command(config)
    get_logger("train").info("starting: %s", " ".join(command))
    code = subprocess.run(command, env=environment).returncode
    if code != 0:
        raise ContRecError(f"training ended with exit code {code}; its log is above, its checkpoints are kept")
    done = find_complete(config, **STAGE)
    if done is None:
        raise ContRecError("training stopped before its end; run the same command again to go on")
    return done


def launch_command(config: Config) -> tuple[list[str], dict[str, str]]:
    """The `deepspeed` command of this run and its environment; the resolved config goes into the run's folder."""
    resolved = Path(config.run_dir) / "train.yaml"
    write_atomically(resolved, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    launcher = find_spec("launchers.train").origin
    where = ["--hostfile", config.launch.hostfile] if config.launch.hostfile else ["--num_gpus", str(config.launch.num_ranks)]
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(_free_port()),
        launcher, "--config", str(resolved.resolve()),
    ]  # fmt: skip
    source_tree = str(Path(launcher).parents[1])
    paths = [source_tree, *filter(None, [os.environ.get("PYTHONPATH")])]
    return command, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_rank(config: Config) -> None:
    """One rank of the train stage, from process group to export."""
    import torch.distributed as dist

    _start_process_group(config)
    try:
        if dist.get_rank() == 0:
            _run_first_rank(config)
        else:
            work = _hear_decision()
            if work is not None:
                train_and_export(config, Path(work))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _start_process_group(config: Config) -> None:
    import deepspeed

    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(minutes=config.launch.timeout_minutes),
        verbose=False,
    )
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    torch.set_num_threads(config.launch.threads or max(1, (os.cpu_count() or 1) // local_ranks))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def _run_first_rank(config: Config) -> None:
    """Rank 0: the stage's books around the training; whatever happens, the other ranks hear of it."""
    told = False

    def build(config: Config, work: Path) -> dict:
        nonlocal told
        told = True
        _tell_decision(str(work))
        return train_and_export(config, work)

    try:
        run_stage(config, build=build, **STAGE)
    finally:
        if not told:
            _tell_decision(None)


def _tell_decision(work: str | None) -> None:
    torch.distributed.broadcast_object_list([work], src=0)


def _hear_decision() -> str | None:
    heard = [None]
    torch.distributed.broadcast_object_list(heard, src=0)
    return heard[0]


def train_and_export(config: Config, work: Path) -> dict:
    """Train on all ranks together, export into `work` on rank 0, and return the stage's facts."""
    import deepspeed
    import torch.distributed as dist

    from contrec_dist.training.loop import METRICS_NAME, TrainingLoop
    from contrec_dist.training.zero3 import deepspeed_config, parameter_groups

    world_size = dist.get_world_size()
    settings = deepspeed_config(config, world_size)
    checkpoints = config.folder("checkpoints") / json.loads((work / IDENTITY_NAME).read_text())["identity"][:12]
    checkpoints.mkdir(parents=True, exist_ok=True)
    tokenizer = _shared_tokenizer(config, checkpoints)
    data = TrainingData.open(config, tokenizer)
    born_partitioned = _keep_zero_init(config, settings)
    torch.manual_seed(config.seed)
    model = data.build_model(config)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.train.weight_decay), lr=config.train.learning_rate, betas=(0.9, 0.98)
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    loop = TrainingLoop(config, engine, data.rows, checkpoints)
    engine.train()
    loop.fit()
    state = gather_state(engine.module, partitioned=config.zero.stage == 3)
    if dist.get_rank() == 0:
        save_export(engine.module, state, tokenizer, work, _pairing(config))
        if (checkpoints / METRICS_NAME).is_file():
            shutil.copyfile(checkpoints / METRICS_NAME, work / METRICS_NAME)
        write_retrieval_inputs(config, work)
    del born_partitioned
    dist.barrier()
    return {"num_steps": loop.position.step, "world_size": world_size, "bad_steps": loop.bad_steps}


@dataclasses.dataclass
class TrainingData:
    """What training reads: packed rows of the token shards, and the tensors that the model is built from."""

    rows: TrainingRows
    item_latents: torch.Tensor
    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    num_train: np.ndarray
    vocab_size: int

    @classmethod
    def open(cls, config: Config, tokenizer) -> "TrainingData":
        tokens = config.folder("tokens")
        items = pl.read_parquet(config.folder("catalog") / "items.parquet")
        texts = PromptTexts(items, tokenizer, config.prompt)
        reader = TokenReader(tokens)
        return cls(
            rows=TrainingRows(config, reader, texts, load_user_latents(config)),
            item_latents=torch.from_numpy(np.load(tokens / "item_latents.npy")),
            latent_mean=torch.from_numpy(np.load(tokens / "latent_mean.npy")),
            latent_std=torch.from_numpy(np.load(tokens / "latent_std.npy")),
            num_train=items["num_train"].to_numpy(),
            vocab_size=len(tokenizer),
        )

    def build_model(self, config: Config):
        """A fresh model; item biases start at the log of the training popularity."""
        popularity = torch.log(torch.from_numpy(self.num_train.astype(np.float32)) + 1)
        return build_model(
            config,
            vocab_size=self.vocab_size,
            item_latents=self.item_latents,
            num_items=len(self.item_latents),
            latent_mean=self.latent_mean,
            latent_std=self.latent_std,
            log_popularity=popularity - popularity.max(),
            latent_noise=config.tokenizer.sigma / float(self.latent_std.mean()),
        )


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


def gather_state(model: torch.nn.Module, *, partitioned: bool) -> dict[str, torch.Tensor]:
    """Whole weights and buffers on the CPU of rank 0 (empty elsewhere). A collective: every rank must call it."""
    import deepspeed
    import torch.distributed as dist

    state, first = {}, dist.get_rank() == 0
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
            if first:
                state[name] = parameter.detach().cpu().clone()
    if first:
        saved = model.state_dict().keys()
        state |= {name: value.detach().cpu().clone() for name, value in model.named_buffers() if name in saved}
    return state


def write_retrieval_inputs(config: Config, work: Path) -> None:
    """item_vectors.npy (N, Q + 1), and probe_queries.npy: real queries on which the index measures its recall."""
    from contrec_dist.retrieval.user_views import UserViews

    latents = torch.from_numpy(np.load(config.folder("tokens") / "item_latents.npy"))
    model, tokenizer = load_export(work, item_latents=latents)
    np.save(work / "item_vectors.npy", model.item_vectors().numpy())
    views = UserViews.open(config, model, tokenizer)
    users = np.linspace(0, views.num_users - 1, min(PROBE_QUERIES, views.num_users)).astype(np.int64)
    condition = views.read(users, "validation", reasoning=False).condition
    np.save(work / "probe_queries.npy", views.queries(condition).numpy())
    gc.collect()


def _shared_tokenizer(config: Config, checkpoints: Path):
    """The text tokenizer: the backbone's own, or one that rank 0 learns on the catalogue's texts."""
    import torch.distributed as dist

    if config.backbone.path:
        return load_text_tokenizer(config.backbone.path)
    folder = checkpoints / "text_tokenizer"
    if dist.get_rank() == 0 and not folder.is_dir():
        items = pl.read_parquet(config.folder("catalog") / "items.parquet")
        texts = [config.prompt.instruction, *RESPONSE_TEXTS]
        texts += [text for name in ("title", "category", "brand") for text in items[name].to_list()]
        partial = checkpoints / ".text_tokenizer.partial"
        train_text_tokenizer(texts, config.backbone.shape.vocab_size).save_pretrained(partial)
        os.replace(partial, folder)
    dist.barrier()
    return load_text_tokenizer(folder)


def _keep_zero_init(config: Config, settings: dict):
    """While this object lives, transformers loads a named backbone partitioned (zero.Init)."""
    if config.zero.stage != 3 or not config.backbone.path:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(settings)


def _pairing(config: Config) -> dict:
    """Content hashes of what the model belongs to; scoring refuses others."""
    return {f"{name}_hash": Manifest.load(config.folder(name)).content_hash for name in ("catalog", "tokens")}


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

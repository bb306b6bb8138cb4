"""What every rank of the train stage executes, from process group to export.

Rank 0 keeps the stage's books (manifest.py); the other ranks follow its decision to train or to skip.
"""

import dataclasses
import gc
import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import torch

from contrec_dist.config import Config
from contrec_dist.data.batches import TrainingRows
from contrec_dist.data.latents import item_latents_path, load_new_item_latents
from contrec_dist.data.prompts import RESPONSE_TEXTS, PromptTexts
from contrec_dist.manifest import IDENTITY_NAME, Manifest, run_stage, write_json
from contrec_dist.model.backbone import load_text_tokenizer, train_text_tokenizer
from contrec_dist.model.export import build_model, load_export, save_export
from contrec_dist.training.abandoned_builds import releasing_abandoned_builds
from contrec_dist.training.train import load_user_latents, stage_settings
from contrec_dist.training.watchdog import Watchdog
from sharding.shard_files import open_shards
from sharding.token_reader import TokenReader

PROBE_QUERIES = 1000


def run_rank(config: Config) -> None:
    """One rank of the train stage, from process group to export."""
    start_process_group(config)
    try:
        run_in_group(config)
    finally:
        torch.distributed.destroy_process_group()


def run_in_group(config: Config) -> None:
    """The train stage on all ranks of the process group, which call this together."""
    if torch.distributed.get_rank() == 0:
        _run_first_rank(config)
    else:
        work = _hear_decision()
        if work is not None:
            train_and_export(config, Path(work))
    torch.distributed.barrier()


def start_process_group(config: Config) -> None:
    """Join the ranks that DeepSpeed or torchrun started; CPU threads are shared out among those of this machine."""
    import deepspeed

    with releasing_abandoned_builds():
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=timedelta(minutes=config.launch.timeout_minutes),
            verbose=False,
        )
    _unlink_shared_buffer()
    # torchrun, DeepSpeed and, where neither says it, the whole world
    local_ranks = int(next(filter(None, map(os.environ.get, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"))), 1))
    torch.set_num_threads(config.launch.threads or max(1, (os.cpu_count() or 1) // local_ranks))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def _unlink_shared_buffer() -> None:
    """Take the name off this rank's all-reduce buffer: the memory then goes with the last rank, even a killed one.

    DeepSpeed maps 66 MiB of shared memory a CPU rank and never removes the file, so that every run would leave it behind.
    """
    torch.distributed.barrier()  # until every rank of this machine has mapped it
    address, port, rank = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def _run_first_rank(config: Config) -> None:
    """Rank 0: the stage's books around the training; whatever happens, the other ranks hear of it."""
    told = False

    def build(config: Config, work: Path) -> dict:
        nonlocal told
        told = True
        _tell_decision(str(work))
        return train_and_export(config, work)

    try:
        run_stage(config, build=build, **stage_settings(config))
    except BaseException:
        if not told:
            _tell_decision(None)
            torch.distributed.barrier()  # until all have heard it: the group ends with this rank
        raise
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
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    logs = Path(config.run_dir) / "logs"
    with Watchdog(config.launch.stall_seconds, logs, rank=rank, world_size=world_size) as watchdog:
        return _train_and_export(config, work, watchdog)


def _train_and_export(config: Config, work: Path, watchdog: Watchdog) -> dict:
    import deepspeed
    import torch.distributed as dist

    from contrec_dist.training.loop import TrainingLoop
    from contrec_dist.training.step_lines import METRICS_NAME
    from contrec_dist.training.trackers import check_trackers
    from contrec_dist.training.zero3 import deepspeed_config, parameter_groups

    check_trackers(config.monitor)
    world_size = dist.get_world_size()
    settings = deepspeed_config(config, world_size)
    checkpoints = config.folder("checkpoints") / json.loads((work / IDENTITY_NAME).read_text())["identity"][:12]
    checkpoints.mkdir(parents=True, exist_ok=True)
    tokenizer = _shared_tokenizer(config, checkpoints)
    data = TrainingData.open(config, tokenizer)
    watchdog.beat("data opened")
    born_partitioned = _keep_zero_init(config, settings)
    torch.manual_seed(config.seed)
    model = data.build_model(config)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.train.weight_decay), lr=config.train.learning_rate, betas=(0.9, 0.98)
    )
    with releasing_abandoned_builds():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    del born_partitioned  # from here on models load whole: rank 0 will load its export, alone
    watchdog.beat("engine started")
    loop = TrainingLoop(config, engine, data.rows, checkpoints, watchdog, data.open_probe(config, engine.module))
    engine.train()
    loop.fit()
    state = gather_state(engine.module, partitioned=config.zero.stage == 3)
    watchdog.beat("weights gathered")
    if dist.get_rank() == 0:
        save_export(engine.module, state, tokenizer, work, _pairing(config))
        watchdog.beat("export written")
        if (checkpoints / METRICS_NAME).is_file():
            shutil.copyfile(checkpoints / METRICS_NAME, work / METRICS_NAME)
        write_retrieval_inputs(config, work)
    dist.barrier()
    steps = {"num_steps": loop.position.step, "world_size": world_size, "bad_steps": loop.position.bad_steps}
    return steps | loop.bad_shards.facts(loop.position)


@dataclasses.dataclass
class TrainingData:
    """What training reads: packed rows of the token shards, and the tensors that the model is built from."""

    rows: TrainingRows
    item_latents: torch.Tensor
    new_item_latents: torch.Tensor | None
    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    num_train: np.ndarray
    vocab_size: int

    @classmethod
    def open(cls, config: Config, tokenizer) -> "TrainingData":
        tokens = config.folder("tokens")
        items = pl.read_parquet(config.folder("catalog") / "items.parquet")
        texts = PromptTexts(items, tokenizer, config.prompt)
        reader, new = TokenReader(tokens, shards=open_shards(config)), load_new_item_latents(config)
        return cls(
            rows=TrainingRows(config, reader, texts, load_user_latents(config)),
            item_latents=torch.from_numpy(np.load(tokens / "item_latents.npy")),
            new_item_latents=None if new is None else torch.from_numpy(new),
            latent_mean=torch.from_numpy(np.load(tokens / "latent_mean.npy")),
            latent_std=torch.from_numpy(np.load(tokens / "latent_std.npy")),
            num_train=items["num_train"].to_numpy(),
            vocab_size=len(tokenizer),
        )

    def build_model(self, config: Config):
        """A fresh model; item biases start at the log of the training popularity, which is -inf for items it does not see."""
        counts = torch.from_numpy(self.num_train.astype(np.float32))
        popularity = torch.log(counts + 1).where(counts > 0, -torch.inf)
        return build_model(
            config,
            vocab_size=self.vocab_size,
            item_latents=self.item_latents,
            new_item_latents=self.new_item_latents,
            num_items=len(self.item_latents),
            latent_mean=self.latent_mean,
            latent_std=self.latent_std,
            log_popularity=popularity - popularity.max(),
            latent_noise=config.tokenizer.sigma / float(self.latent_std.mean()),
        )

    def open_probe(self, config: Config, model):
        """The validation probe of the config; None where it asks for none, or there are no validation users."""
        from contrec_dist.training.probe import ValidationProbe

        if config.monitor.probe_every_steps == 0 or not (self.rows.reader.validation_pos >= 0).any():
            return None
        return ValidationProbe(config, model, self.rows.texts, self.rows.user_latents)


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
    """item_vectors.npy (N, Q + 1), and probe_queries.npy: real queries on which the index measures its recall.

    The same queries decide the bias of items that training did not see, which joins the export's config.json.
    """
    from contrec_dist.retrieval.user_views import UserViews

    latents = np.load(item_latents_path(config, work))
    model, tokenizer = load_export(work, item_latents=torch.from_numpy(latents))
    views = dataclasses.replace(UserViews.open(config, model, tokenizer), item_latents=latents)
    users = np.linspace(0, views.num_users - 1, min(PROBE_QUERIES, views.num_users)).astype(np.int64)
    condition = views.read(users, "validation", reasoning=False).condition
    queries = views.queries(condition)
    np.save(work / "probe_queries.npy", queries.numpy())
    if config.head.new_item_bias == "expected" and model.items.trained.any():
        model.items.new_item_bias = model.items.expect_bias(queries[:, :-1])
        described = json.loads((work / "config.json").read_text())
        write_json(work / "config.json", described | {"new_item_bias": model.items.new_item_bias})
    np.save(work / "item_vectors.npy", model.item_vectors().numpy())
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

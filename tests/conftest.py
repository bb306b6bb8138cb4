"""Fixtures that several parts share."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from contrec_dist.config import (
    BackboneConfig,
    Config,
    EmbedConfig,
    EvaluateConfig,
    GeneratedConfig,
    HeadConfig,
    PrecomputeConfig,
    PromptConfig,
    RayConfig,
    ScoreConfig,
    ShapeConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from contrec_dist.data import precompute, prepare
from contrec_dist.data.batches import TrainingRows
from contrec_dist.data.prompts import PromptTexts
from contrec_dist.embeddings import embed
from contrec_dist.model.backbone import train_text_tokenizer
from contrec_dist.model.contrec import ContRec
from contrec_dist.model.export import build_model
from contrec_dist.tokenizer import tokenize
from sharding.ray_jobs import ray_session
from sharding.token_reader import TokenReader
from sharding.token_writer import TokenSample, shard_name, write_shard

WORLD_ITEMS, WORLD_LATENT_DIM, WORLD_USERS_PER_SHARD = 30, 4, 3


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with 2 CPUs, started once, that stages join; gives the config it was started from."""
    config = RayConfig(num_workers=2, object_store_bytes=80_000_000)
    with ray_session(config):
        yield config


@pytest.fixture(scope="session")
def toy_tokens(ray_cluster, tmp_path_factory) -> Config:
    """Config of a run folder whose catalog, embeddings, tokenizer and tokens are complete: a tiny generated catalogue
    through the real stages. Read only: a test that changes something works on a copy (dataclasses.replace, copytree).
    """
    config = make_toy_config(tmp_path_factory.mktemp("toy_run"), ray_cluster)
    for stage in (prepare, embed, tokenize, precompute):
        stage.run(config)
    return config


def make_toy_config(run_dir: Path, ray: RayConfig) -> Config:
    """Everything small: 80 items, 150 users, a backbone of width 32, fp32."""
    generated = GeneratedConfig(num_items=80, num_users=150, num_categories=4, mean_history=9.0, min_history=5)
    return Config(
        name="toy",
        run_dir=str(run_dir),
        source=SourceConfig(kind="generated", generated=generated, min_user_interactions=3, min_item_interactions=2),
        embed=EmbedConfig(collaborative_dim=16, num_epochs=2, text_dim=16, num_hash_features=2048),
        tokenizer=TokenizerConfig(latent_dim=8, hidden_dim=32, num_steps=40, batch_rows=64, probe_rows=80),
        precompute=PrecomputeConfig(users_per_shard=16),
        prompt=PromptConfig(instruction="Next item:", max_history=12, titled_items=2, max_title_tokens=6),
        backbone=BackboneConfig(
            shape=ShapeConfig(hidden_size=32, num_heads=2, intermediate_size=64, vocab_size=400), precision="fp32"
        ),
        head=HeadConfig(width=32, query_dim=16, batch_mul=2),
        train=TrainConfig(
            num_epochs=1, row_tokens=160, global_batch_rows=8, micro_batch_rows=4, shuffle_shards=4,
            checkpoint_every_steps=4, log_every_steps=1,
        ),
        score=ScoreConfig(
            k=10, num_samples=2, num_sampling_steps=3, num_candidates=20, users_per_part=64, batch_users=32
        ),
        evaluate=EvaluateConfig(sampler_users=20, sampler_steps=[1, 2]),
        ray=ray,
    )  # fmt: skip


@dataclass
class ToyWorld:
    """Hand-made histories in real token shards, and what training and scoring build from them; no stage is run."""

    config: Config
    items: pl.DataFrame
    tokenizer: object
    item_latents: np.ndarray
    "(N, K, Z) float32 that float16 holds exactly, neither centred nor of unit variance"
    user_latents: np.ndarray | None

    @property
    def texts(self) -> PromptTexts:
        return PromptTexts(self.items, self.tokenizer, self.config.prompt)

    @property
    def reader(self) -> TokenReader:
        return TokenReader(self.config.folder("tokens"))

    @property
    def rows(self) -> TrainingRows:
        return TrainingRows(self.config, self.reader, self.texts, self.user_latents)

    def build_model(self, seed: int = 0, new_item_latents: torch.Tensor | None = None) -> ContRec:
        """A model in eval mode, every parameter moved off its (often zero) start."""
        torch.manual_seed(seed)
        latents = torch.from_numpy(self.item_latents)
        model = build_model(
            self.config,
            vocab_size=len(self.tokenizer),
            item_latents=latents,
            num_items=WORLD_ITEMS,
            latent_mean=latents.mean(0),
            latent_std=latents.std(0, correction=0),
            log_popularity=torch.linspace(-1, 0, WORLD_ITEMS),
            latent_noise=0.1,
            new_item_latents=new_item_latents,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.05)
        return model.eval()


@pytest.fixture(scope="session")
def world_items() -> pl.DataFrame:
    """30 items of 3 categories and 4 brands; some have neither."""
    numbers = range(WORLD_ITEMS)
    return pl.DataFrame({
        "item_idx": numbers,
        "item_id": [f"item-{n}" for n in numbers],
        "title": [f"{('Red', 'Blue', 'Green')[n % 3]} thing number {n}" * (1 + n % 2) for n in numbers],
        "category": ["" if n % 7 == 6 else f"Goods > {('Nails', 'Lamps', 'Garden tools')[n % 3]}" for n in numbers],
        "brand": ["" if n % 5 == 4 else f"Brand{n % 4}" for n in numbers],
        "text": ["" for _ in numbers],
        "num_train": [n + 1 for n in numbers],
    })  # fmt: skip


@pytest.fixture(scope="session")
def world_tokenizer(world_items):
    """A text tokenizer learned on those items."""
    return train_text_tokenizer(world_items["title"].to_list() + world_items["category"].to_list(), vocab_size=320)


@pytest.fixture
def make_world(tmp_path, world_items, world_tokenizer):
    """make_world(histories, num_item_tokens=2, user_tokens=False, **prompt) -> a ToyWorld; leave-one-out where there are 3 items."""

    def make(histories, *, num_item_tokens: int = 2, user_tokens: bool = False, **prompt) -> ToyWorld:
        config = make_toy_config(tmp_path, RayConfig())
        for name, value in {"titled_items": 0, **prompt, "user_tokens": user_tokens}.items():
            setattr(config.prompt, name, value)
        draw = np.random.default_rng(5)
        shape = (num_item_tokens, WORLD_LATENT_DIM)
        spread = draw.uniform(0.5, 3.0, shape)
        latents = (draw.normal(2.0, spread, (WORLD_ITEMS, *shape))).astype(np.float16).astype(np.float32)
        write_token_folder(config.folder("tokens"), histories, latents)
        config.folder("catalog").mkdir()
        world_items.write_parquet(config.folder("catalog") / "items.parquet")
        write_histories(config.folder("catalog"), histories)
        users = draw.normal(1.0, 2.0, (len(histories), *shape)).astype(np.float32) if user_tokens else None
        return ToyWorld(config, world_items, world_tokenizer, latents, users)

    return make


def write_histories(folder: Path, histories: list[list[int]]) -> None:
    """users.parquet and histories.parquet of a catalog folder; leave-one-out where there are 3 items."""
    numbers, lengths = range(len(histories)), [len(items) for items in histories]
    ends = [length - 2 if length >= 3 else length for length in lengths]
    pl.DataFrame({"user_idx": numbers, "user_id": [f"u{user}" for user in numbers]}).write_parquet(folder / "users.parquet")
    pl.DataFrame(
        {
            "user_idx": numbers,
            "items": histories,
            "timestamps": [[0] * length for length in lengths],
            "num_train": ends,
            "validation_pos": [end if length >= 3 else -1 for end, length in zip(ends, lengths)],
            "test_pos": [end + 1 if length >= 3 else -1 for end, length in zip(ends, lengths)],
        },
        schema_overrides={"items": pl.List(pl.Int64), "timestamps": pl.List(pl.Int64)},
    ).write_parquet(folder / "histories.parquet")


def write_token_folder(folder: Path, histories: list[list[int]], item_latents: np.ndarray) -> None:
    """tokens/ as precompute lays it out, WORLD_USERS_PER_SHARD users a shard."""
    (folder / "shards").mkdir(parents=True)
    index = []
    for shard, first in enumerate(range(0, len(histories), WORLD_USERS_PER_SHARD)):
        pairs = []
        for user in range(first, min(first + WORLD_USERS_PER_SHARD, len(histories))):
            items = np.array(histories[user], dtype=np.int32)
            end = len(items) - 2 if len(items) >= 3 else len(items)
            targets = (end, end + 1) if len(items) >= 3 else (-1, -1)
            pairs.append((f"u{user}", TokenSample(user, items, item_latents[items].astype(np.float16), end, *targets)))
        index.append(write_shard(folder / shard_name(shard), shard, pairs))
    pl.concat(index).write_parquet(folder / "index.parquet")
    np.save(folder / "item_latents.npy", item_latents)
    np.save(folder / "latent_mean.npy", item_latents.mean(0))
    np.save(folder / "latent_std.npy", item_latents.std(0))

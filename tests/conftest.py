"""Fixtures that several parts share."""

from pathlib import Path

import pytest

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
from contrec_dist.embeddings import embed
from contrec_dist.tokenizer import tokenize
from sharding.ray_jobs import ray_session


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
            checkpoint_every_steps=4, log_every_steps=1, probe_users=50,
        ),
        score=ScoreConfig(
            k=10, num_samples=2, num_sampling_steps=3, num_candidates=20, users_per_part=64, batch_users=32
        ),
        evaluate=EvaluateConfig(sampler_users=20, sampler_steps=[1, 2]),
        ray=ray,
    )  # fmt: skip

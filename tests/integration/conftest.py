"""Runs that the integration tests share. The real launchers, two CPU ranks with gloo, one small run of everything."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from contrec_dist.config import Config, EvaluateConfig

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one

from launched import Command, run_contrec  # noqa: E402

INPUTS = ("catalog", "embeddings", "tokenizer", "tokens")


@pytest.fixture(scope="session")
def run_config(toy_tokens) -> Config:
    """The toy config with what real configs use, gradient accumulation, and steps and parts enough to be killed among them."""
    shape = replace(toy_tokens.backbone.shape, hidden_dropout=0.1)
    return replace(
        toy_tokens,
        prompt=replace(toy_tokens.prompt, item_layout="fused"),
        backbone=replace(toy_tokens.backbone, shape=shape),
        train=replace(toy_tokens.train, num_epochs=3, micro_batch_rows=2, checkpoint_every_steps=4),
        score=replace(toy_tokens.score, users_per_part=12, batch_users=6),
        evaluate=EvaluateConfig(ks=[5, 10], sampler_users=20, sampler_steps=[1, 2]),
    )


@pytest.fixture(scope="session")
def reference(run_config, tmp_path_factory) -> tuple[Config, Command]:
    """An undisturbed `contrec pipeline` of everything, from an empty folder. Read only."""
    folder = tmp_path_factory.mktemp("reference")
    config = replace(run_config, run_dir=str(folder / "run"))
    command = run_contrec("pipeline", config, folder / "pipeline.log")
    assert command.process.returncode == 0, command.log
    return config, command


@pytest.fixture
def new_run(run_config, tmp_path: Path) -> Config:
    """The config of a run in an empty folder."""
    return replace(run_config, run_dir=str(tmp_path / "run"))

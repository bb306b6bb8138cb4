"""A small finished run for baselines: made-up folders of every stage, with embeddings that follow the order of the items."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from contrec_dist.config import load_config
from contrec_dist.manifest import run_stage, write_json

_spec = importlib.util.spec_from_file_location("run_artifacts", Path(__file__).parents[1] / "report" / "run_artifacts.py")
artifacts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(artifacts)

COLLABORATIVE, TEXT = 4, 12
FIXED = [
    "name=toy", "score.k=20", "score.users_per_part=40", "evaluate.sampler_users=0", "backbone.precision=fp32",
    "backbone.shape.hidden_size=32", "backbone.shape.num_heads=2", "backbone.shape.intermediate_size=64",
    "tiger.num_codes=8", "tiger.latent_dim=8", "tiger.hidden_dims=[32]", "tiger.rqvae_steps=60",
    "tiger.rqvae_batch_rows=64", "tiger.batch_tokens=512", "tiger.row_tokens=64", "tiger.num_epochs=2",
    "tiger.batch_users=32", "tiger.beam_width=10",
]  # fmt: skip


def make_config(folder, *overrides):
    """Config of a toy run in `folder`."""
    return load_config([], [*FIXED, f"run_dir={folder}/run", *overrides])


def make_run(folder, *overrides, histories=None):
    """Its folders, written."""
    config = make_config(folder, *overrides)
    run_stage(config, stage="embed", folder="embeddings", sections=(), inputs=(), build=_write_embeddings)
    artifacts.write_run(config, histories=histories)
    return config


def _write_embeddings(config, work):
    turn = np.outer(np.arange(artifacts.NUM_ITEMS) / artifacts.NUM_ITEMS, np.arange(1, 9)) * 2 * np.pi
    rows = np.concatenate([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)
    np.save(work / "items.npy", rows)
    write_json(work / "layout.json", {"collaborative": [0, COLLABORATIVE], "text": [COLLABORATIVE, COLLABORATIVE + TEXT]})
    return {}


@pytest.fixture(scope="session")
def toy_runs():
    """make_config and make_run, for tests that need a run of their own."""
    return make_config, make_run

"""retrieval/index.py: what lies in index/ answers as exact search over the arrays it was made from."""

import numpy as np
import polars as pl
import pytest

from contrec_dist.config import load_config
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import run_stage
from contrec_dist.retrieval import index
from contrec_dist.retrieval.top_k import exact_top_k
from sharding.faiss_shards import FaissShards


def write_inputs(config, num_items=80, num_vectors=80):
    """catalog/, tokens/ and model/ of a run, with manifests."""
    draw = np.random.default_rng(0)
    arrays = {
        "tokens": {
            "item_latents": 5 + 3 * draw.normal(size=(num_items, 2, 4)).astype(np.float32),
            "latent_mean": np.full((2, 4), 5, np.float32),
            "latent_std": np.full((2, 4), 3, np.float32),
        },
        "model": {"item_vectors": draw.normal(size=(num_vectors, 7)).astype(np.float32)},
    }

    def build(name):
        def write(_, work):
            if name == "catalog":
                pl.DataFrame({"item_idx": np.arange(num_items)}).write_parquet(work / "items.parquet")
            for key, array in arrays.get(name, {}).items():
                np.save(work / f"{key}.npy", array)
            return {}

        return write

    for name in ("catalog", "tokens", "model"):
        run_stage(config, stage=name, folder=name, sections=(), inputs=(), build=build(name))
    return arrays


@pytest.fixture
def config(tmp_path):
    return load_config([], ["name=toy", f"run_dir={tmp_path}/run", "index.num_shards=3", "index.device=cpu"])


def test_both_spaces_answer_as_exact_search(config):
    arrays = write_inputs(config)
    manifest = index.run(config)
    queries = np.random.default_rng(1).normal(size=(6, 7)).astype(np.float32)
    shards = FaissShards.open(config.folder("index") / "query", "cpu")
    expected = exact_top_k(queries, arrays["model"]["item_vectors"], 5)
    assert all(np.array_equal(got, want) for got, want in zip(shards.search(queries, 5), expected))
    latents = ((arrays["tokens"]["item_latents"] - 5) / 3).reshape(80, 8)
    shards = FaissShards.open(config.folder("index") / "latent", "cpu")
    expected = exact_top_k(latents[:6], latents, 5, "l2")
    assert all(np.array_equal(got, want) for got, want in zip(shards.search(latents[:6], 5), expected))
    for space in ("query", "latent"):
        facts = manifest.facts[space]
        assert facts["recall"] == 1.0 and facts["factory"] == "Flat" and facts["num_shards"] == 3
        assert facts["bytes"] > 80 * 4 * facts["dim"] and facts["seconds"] >= 0


def test_built_again_gives_the_same_bytes(config, tmp_path):
    write_inputs(config)
    first = index.run(config)
    again = load_config([], ["name=toy", f"run_dir={tmp_path}/again", "index.num_shards=3", "index.device=cpu"])
    write_inputs(again)
    assert index.run(again).content_hash == first.content_hash


def test_item_vectors_of_another_catalogue_are_refused(config):
    write_inputs(config, num_vectors=79)
    with pytest.raises(ArtifactError, match="79 vectors.*80, one an item"):
        index.run(config)


def test_unknown_space_is_refused(config):
    config.index.spaces = ["query", "text"]
    with pytest.raises(ConfigError, match="index.spaces.*text"):
        index.run(config)

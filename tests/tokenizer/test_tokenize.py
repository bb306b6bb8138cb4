"""Stage tokenize on toy embeddings: what is written, and that what is read back is what was trained."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from contrec_dist.config import Config, TokenizerConfig
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, run_stage, write_json
from contrec_dist.tokenizer import tokenize
from contrec_dist.tokenizer.fit import fit_tokenizer
from contrec_dist.tokenizer.sigma_vae import SigmaVAE

NUM_ITEMS, NUM_COLD, NUM_USERS = 60, 5, 30


def write_inputs(config: Config, user_dim: int, items: np.ndarray, catalog_rows: int = NUM_ITEMS, split: int = 4) -> None:
    """catalog/ and embeddings/ as the stages before write them; the last NUM_COLD items have no training interactions."""

    def build_catalog(_config, folder):
        num_train = [3] * (catalog_rows - NUM_COLD) + [0] * NUM_COLD
        pl.DataFrame({"item_idx": list(range(catalog_rows)), "num_train": num_train}).write_parquet(folder / "items.parquet")
        return {}

    def build_embeddings(_config, folder):
        rng = np.random.default_rng(1)
        np.save(folder / "items.npy", items)
        np.save(folder / "users.npy", rng.normal(size=(NUM_USERS, user_dim)).astype(np.float32))
        np.save(folder / "user_known.npy", np.arange(NUM_USERS) < NUM_USERS - 2)
        write_json(folder / "layout.json", {"collaborative": [0, split], "text": [split, items.shape[1]]})
        return {}

    run_stage(config, stage="prepare", folder="catalog", sections=(), inputs=(), build=build_catalog)
    run_stage(config, stage="embed", folder="embeddings", sections=(), inputs=("catalog",), build=build_embeddings)


def toy_items() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(NUM_ITEMS, 10)).astype(np.float32)


def run_toy(
    tmp_path, name: str = "toy", user_dim: int = 4, items: np.ndarray | None = None, kind: str = "sigma_vae", drop: float = 0.0, **extra
) -> Config:
    sizes = {"num_item_tokens": 2, "latent_dim": 3, "hidden_dim": 8, "num_steps": 8, "batch_rows": 16, "probe_rows": 20}
    settings = TokenizerConfig(kind=kind, num_codes=4, num_levels=2, collaborative_drop=drop, **sizes)
    config = Config(name=name, run_dir=str(tmp_path / name), tokenizer=settings)
    write_inputs(config, user_dim, toy_items() if items is None else items, **extra)
    tokenize.run(config)
    return config


def test_loaded_tokenizer_equals_the_trained_one(tmp_path):
    config = run_toy(tmp_path)
    loaded = SigmaVAE.load(config.folder("tokenizer"), tokenize.ITEM_TOKENIZER)
    rows = toy_items()
    trained, _ = fit_tokenizer(rows[:-NUM_COLD], config.tokenizer, config.seed, num_steps=8, what="item")
    untrained = SigmaVAE(10, config.tokenizer)
    with torch.no_grad():
        latents = [vae.encode(torch.from_numpy(rows)) for vae in (loaded, trained, untrained)]
    assert torch.equal(latents[0], latents[1]) and not torch.allclose(latents[0], latents[2])


def test_items_without_training_interactions_do_not_reach_the_tokenizer(tmp_path):
    other = toy_items()
    other[-NUM_COLD:] = 100.0
    configs = [run_toy(tmp_path, name, items=rows) for name, rows in (("a", toy_items()), ("b", other))]
    files = [Manifest.load(config.folder("tokenizer")).files for config in configs]
    assert files[0]["item_tokenizer.safetensors"] == files[1]["item_tokenizer.safetensors"]
    assert files[0]["probes.json"] == files[1]["probes.json"]


def test_the_collaborative_columns_are_dropped_where_text_is_left(tmp_path):
    rows = toy_items()
    config = run_toy(tmp_path, "both", drop=0.5)
    trained, _ = fit_tokenizer(
        rows[:-NUM_COLD], config.tokenizer, config.seed, num_steps=8, what="item", collaborative=slice(0, 4)
    )
    loaded = SigmaVAE.load(config.folder("tokenizer"), tokenize.ITEM_TOKENIZER)
    with torch.no_grad():
        assert torch.equal(loaded.encode(torch.from_numpy(rows)), trained.encode(torch.from_numpy(rows)))


@pytest.mark.parametrize("split", [0, 10])
def test_dropping_the_only_part_of_an_item_has_no_effect(tmp_path, split):
    configs = [run_toy(tmp_path, f"{drop}", drop=drop, split=split) for drop in (0.0, 0.5)]
    files = [Manifest.load(config.folder("tokenizer")).files["item_tokenizer.safetensors"] for config in configs]
    assert files[0] == files[1]


def test_user_tokenizer_exists_exactly_when_users_have_embeddings(tmp_path):
    with_users, without = run_toy(tmp_path, "a").folder("tokenizer"), run_toy(tmp_path, "b", user_dim=0).folder("tokenizer")
    assert SigmaVAE.load(with_users, tokenize.USER_TOKENIZER).embedding_dim == 4
    assert not (without / "user_tokenizer.json").exists() and (without / "item_tokenizer.json").exists()
    assert Manifest.load(with_users).facts["training_users"] == NUM_USERS - 2


def test_probes_and_losses_are_written(tmp_path):
    folder = run_toy(tmp_path).folder("tokenizer")
    probes, losses = (json.loads((folder / name).read_text()) for name in ("probes.json", "losses.json"))
    assert [record["method"].split()[0] for record in probes["methods"]] == ["sigma-VAE", "RQ", "RQ", "PQ"]
    assert probes["num_rows"] == NUM_ITEMS - NUM_COLD
    assert len(losses["item_tokenizer"]) == 8 and losses["user_tokenizer"][-1]["step"] == 2


def test_same_config_same_bytes(tmp_path):
    first, second = (Manifest.load(run_toy(tmp_path, name).folder("tokenizer")).files for name in "ab")
    assert first == second


def test_embeddings_of_another_catalogue_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="items.npy"):
        run_toy(tmp_path, catalog_rows=NUM_ITEMS + 1)


def test_many_rows_are_learned_from_by_a_sample_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "MAX_FIT_ROWS", 40)
    items = toy_items()
    items[-NUM_COLD:] = np.nan  # must not be drawn
    first, second = (Manifest.load(run_toy(tmp_path, name, items=items).folder("tokenizer")) for name in "ab")
    assert first.facts["training_items"] == 40 and first.files == second.files


@pytest.mark.parametrize("kind, bits", [("vq", 4), ("rq", 8)])
def test_quantised_tokens_come_from_the_files_and_are_probed_as_codes(tmp_path, kind, bits):
    config = run_toy(tmp_path, kind=kind)
    folder = config.folder("tokenizer")
    with torch.no_grad():
        latents = SigmaVAE.load(folder, tokenize.ITEM_TOKENIZER).encode(torch.from_numpy(toy_items()))
    assert max(len(torch.unique(latents[:, token], dim=0)) for token in range(2)) <= 2 ** (bits // 2)
    record = json.loads((folder / "probes.json").read_text())["methods"][0]
    assert record["method"] == f"{kind.upper()} of the VAE, {bits} bits" and record["bits"] == bits
    assert record["collision_rate"] > (0.5 if kind == "vq" else 0)
    assert SigmaVAE.load(folder, tokenize.USER_TOKENIZER).codebooks is not None
    assert Manifest.load(run_toy(tmp_path, "again", kind=kind).folder("tokenizer")).files == Manifest.load(folder).files

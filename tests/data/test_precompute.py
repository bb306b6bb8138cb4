"""precompute: hand-made inputs, real Ray, real kills; compared with a slow reference."""

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import webdataset

from contrec_dist.config import Config, HeadConfig, PrecomputeConfig, RayConfig, TokenizerConfig
from contrec_dist.data.precompute import LatentEncoder, ShardWriter, run
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, run_stage, write_json
from contrec_dist.tokenizer.sigma_vae import SigmaVAE
from sharding.token_reader import TokenReader

ROOT = Path(__file__).resolve().parents[2]
NUM_ITEMS, NUM_USERS, WIDTH, USER_WIDTH = 53, 45, 8, 5
TOKENIZER = TokenizerConfig(num_item_tokens=2, latent_dim=4, hidden_dim=16)
LAYOUT = PrecomputeConfig(users_per_shard=4, items_per_part=20, batch_rows=8)


def make_config(tmp_path: Path, **changes) -> Config:
    settings = {"name": "toy", "run_dir": str(tmp_path), "precompute": LAYOUT, "ray": RayConfig(num_workers=2)}
    return Config(**{**settings, **changes})


def make_histories() -> pl.DataFrame:
    """Histories of 0..8 items, leave-one-out where there are 3 or more. Items 40.. are in no training part."""
    generator = np.random.default_rng(0)
    lengths = [int(n) for n in generator.integers(1, 9, NUM_USERS)]
    lengths[7] = lengths[NUM_USERS - 1] = 0
    targets = [n >= 3 for n in lengths]
    return pl.DataFrame(
        {
            "user_idx": range(NUM_USERS),
            "items": [generator.integers(0, 40, n).tolist() for n in lengths],
            "timestamps": [[0] * n for n in lengths],
            "num_train": [n - 2 if has else n for n, has in zip(lengths, targets)],
            "validation_pos": [n - 2 if has else -1 for n, has in zip(lengths, targets)],
            "test_pos": [n - 1 if has else -1 for n, has in zip(lengths, targets)],
        },
        schema_overrides={"items": pl.List(pl.Int64), "timestamps": pl.List(pl.Int64)},
    )


def write_inputs(config: Config, *, user_width=0, histories=None, bad_row=-1, num_trained=40) -> None:
    """catalog/, embeddings/ and tokenizer/ with their manifests."""
    histories = make_histories() if histories is None else histories
    generator = np.random.default_rng(1)
    embeddings = generator.standard_normal((NUM_ITEMS, WIDTH)).astype(np.float32)
    if bad_row >= 0:
        embeddings[bad_row] = np.nan
    users = generator.standard_normal((NUM_USERS, user_width)).astype(np.float32)
    counts = (np.arange(NUM_ITEMS) < num_trained).astype(np.int64)

    def build_catalog(_, work):
        pl.DataFrame({"item_idx": np.arange(NUM_ITEMS), "num_train": counts}).write_parquet(work / "items.parquet")
        ids = {"user_idx": np.arange(NUM_USERS), "user_id": [f"user {i}" for i in range(NUM_USERS)]}
        pl.DataFrame(ids).write_parquet(work / "users.parquet")
        histories.write_parquet(work / "histories.parquet")
        return {}

    def build_embeddings(_, work):
        np.save(work / "items.npy", embeddings)
        np.save(work / "users.npy", users)
        write_json(work / "layout.json", {"collaborative": [0, 3], "text": [3, WIDTH]})
        return {}

    def build_tokenizer(_, work):
        torch.manual_seed(0)
        SigmaVAE(WIDTH, TOKENIZER).save(work, "item_tokenizer")
        if user_width:
            SigmaVAE(user_width, TOKENIZER).save(work, "user_tokenizer")
        return {}

    builds = {"catalog": build_catalog, "embeddings": build_embeddings, "tokenizer": build_tokenizer}
    for folder, build in builds.items():
        run_stage(config, stage=folder, folder=folder, sections=(), inputs=(), build=build)


def digests(folder: Path) -> dict[str, str]:
    return {name: record["sha256"] for name, record in Manifest.load(folder).files.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, ray_cluster):
    """A complete run, with user tokens."""
    config = make_config(tmp_path_factory.mktemp("undisturbed"))
    write_inputs(config, user_width=USER_WIDTH)
    run(config)
    return config


@pytest.mark.parametrize("kind", ["item", "user"])
def test_latents_equal_the_tokenizer_on_each_row_alone(undisturbed, kind):
    tokenizer = SigmaVAE.load(undisturbed.folder("tokenizer"), f"{kind}_tokenizer")
    embeddings = torch.from_numpy(np.load(undisturbed.folder("embeddings") / f"{kind}s.npy"))
    with torch.no_grad():
        expected = torch.cat([tokenizer.encode(row[None]) for row in embeddings])
    latents = np.load(undisturbed.folder("tokens") / f"{kind}_latents.npy")
    assert latents.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(latents), expected, atol=1e-6, rtol=1e-5)


def test_statistics_are_those_of_trained_items(undisturbed):
    tokens = undisturbed.folder("tokens")
    trained = np.load(tokens / "item_latents.npy")[:40].astype(np.float64)
    for name, expected in (("latent_mean", trained.mean(0)), ("latent_std", trained.std(0))):
        values = np.load(tokens / f"{name}.npy")
        assert values.dtype == np.float32 and values.shape == (2, 4)
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)


def test_every_user_is_one_sample_with_the_latents_of_its_items(undisturbed):
    reader = TokenReader(undisturbed.folder("tokens"))
    latents = np.load(undisturbed.folder("tokens") / "item_latents.npy").astype(np.float16)
    histories = make_histories()
    assert reader.num_samples == NUM_USERS
    assert reader.shard.tolist() == [user // 4 for user in range(NUM_USERS)]
    for user_idx, row in enumerate(histories.rows(named=True)):
        sample = reader.read(user_idx)
        assert sample.items.tolist() == row["items"]
        np.testing.assert_array_equal(sample.latents, latents[row["items"]].reshape(-1, 2, 4))
        for name in ("user_idx", "num_train", "validation_pos", "test_pos"):
            assert getattr(sample, name) == row[name]


def test_webdataset_reads_every_shard(undisturbed):
    shards = sorted(str(path) for path in (undisturbed.folder("tokens") / "shards").iterdir())
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{user:012d}" for user in range(NUM_USERS)]
    assert [sample["json"]["user_id"] for sample in samples] == [f"user {user}" for user in range(NUM_USERS)]


def test_manifest_holds_the_products_and_nothing_else(undisturbed):
    manifest = Manifest.load(undisturbed.folder("tokens"))
    shards = [f"shards/{shard:06d}.tar" for shard in range(12)]
    arrays = ["item_latents.npy", "latent_mean.npy", "latent_std.npy", "user_latents.npy"]
    assert sorted(manifest.files) == sorted(["index.parquet", *arrays, *shards])
    assert manifest.files["item_latents.npy"]["shape"] == [NUM_ITEMS, 2, 4]
    assert manifest.files["shards/000011.tar"]["rows"] == 1
    assert manifest.facts["num_interactions"] == make_histories()["items"].list.len().sum()
    names = {path.name for path in undisturbed.folder("tokens").iterdir()}
    assert names == {"manifest.json", "identity.json", "index.parquet", "shards", *arrays}


KILLED_RUN = """
import os, signal, sys
import sharding.ray_jobs
from contrec_dist.config import load_config
from contrec_dist.data.precompute import run

real_track, countdown = sharding.ray_jobs.track, [int(sys.argv[1])]

def kill_the_group_after(items, **options):
    for item in real_track(items, **options):
        countdown[0] -= 1
        if countdown[0] == 0:
            os.killpg(0, signal.SIGKILL)
        yield item

sharding.ray_jobs.track = kill_the_group_after
run(load_config(overrides=sys.argv[2:]))
"""


def test_killed_at_several_points_and_run_again_gives_the_same_bytes(undisturbed, tmp_path):
    config = make_config(tmp_path)
    write_inputs(config, user_width=USER_WIDTH)
    settings = [f"precompute.{name}={getattr(LAYOUT, name)}" for name in LAYOUT.__slots__]
    arguments = ["name=toy", f"run_dir={tmp_path}", "ray.object_store_bytes=80000000", *settings]
    for num_parts in (2, 10):  # among the 6 parts of latents; then among the shards
        command = [sys.executable, "-c", KILLED_RUN, str(num_parts), *arguments]
        killed = subprocess.run(command, cwd=ROOT, start_new_session=True, capture_output=True, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert not config.folder("tokens").exists() and (tmp_path / ".tokens.partial").is_dir()
    assert (tmp_path / ".tokens.partial/item_latents.npy").is_file()
    run(make_config(tmp_path, ray=RayConfig(num_workers=1)))  # nor does the number of workers change a byte
    assert digests(config.folder("tokens")) == digests(undisturbed.folder("tokens"))
    Manifest.load(config.folder("tokens")).check_files(config.folder("tokens"), deep=True)


def test_items_as_if_nobody_had_met_them_are_encoded_where_the_model_asks_for_them(undisturbed, tmp_path, ray_cluster):
    config = make_config(tmp_path, head=HeadConfig(residual_drop=0.3))
    write_inputs(config, user_width=USER_WIDTH)
    assert "new_item_latents.npy" in run(config).files
    rows = np.load(config.folder("embeddings") / "items.npy")
    rows[:, :3] = 0.0
    tokenizer = SigmaVAE.load(config.folder("tokenizer"), "item_tokenizer")
    with torch.no_grad():
        expected = tokenizer.encode(torch.from_numpy(rows))
    found = np.load(config.folder("tokens") / "new_item_latents.npy")
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-6, rtol=1e-5)
    others = digests(config.folder("tokens"))
    del others["new_item_latents.npy"]
    assert others == digests(undisturbed.folder("tokens"))


def test_tokens_without_them_are_made_again_when_the_model_asks(tmp_path, ray_cluster):
    config = make_config(tmp_path)
    write_inputs(config)
    run(config)
    assert "new_item_latents.npy" in run(make_config(tmp_path, head=HeadConfig(residual_drop=0.3))).files


def test_without_user_embeddings_or_trained_items_the_rest_is_there(tmp_path, ray_cluster):
    config = make_config(tmp_path, precompute=PrecomputeConfig(), ray=RayConfig(num_workers=1))
    write_inputs(config, num_trained=0)
    manifest = run(config)
    assert "user_latents.npy" not in manifest.files and manifest.facts["user_tokens"] is False
    assert manifest.facts["num_shards"] == 1
    tokens = config.folder("tokens")
    mean_of_all = np.load(tokens / "item_latents.npy").mean(0)
    np.testing.assert_allclose(np.load(tokens / "latent_mean.npy"), mean_of_all, rtol=1e-5, atol=1e-6)


def test_embedding_that_is_not_finite_is_named(tmp_path):
    config = make_config(tmp_path)
    write_inputs(config, bad_row=13)
    encoder = LatentEncoder(config.folder("embeddings"), config.folder("tokenizer"), batch_rows=8, device="cpu")
    with pytest.raises(ArtifactError, match="items.npy: got row 13.*not finite"):
        encoder.process({"kind": "item", "start": 10, "stop": 20}, tmp_path / "part.npy")


@pytest.mark.parametrize(
    "name, value", [("items", [1, NUM_ITEMS]), ("items", [1, -1]), ("test_pos", 8), ("num_train", None)]
)
def test_history_that_cannot_be_is_named(tmp_path, name, value):
    config = make_config(tmp_path)
    changed = pl.when(pl.col("user_idx") == 6).then(pl.lit(value)).otherwise(name).alias(name)
    write_inputs(config, histories=make_histories().with_columns(changed))
    latents_path = tmp_path / "item_latents.npy"
    np.save(latents_path, np.zeros((NUM_ITEMS, 2, 4), np.float32))
    writer = ShardWriter(config.folder("catalog"), latents_path)
    with pytest.raises(ArtifactError, match="histories.parquet.*'user_idx': 6.*items in 0..52"):
        writer.process({"shard": 1, "start": 4, "stop": 8}, tmp_path / "part.tar", tmp_path / "part.parquet")


def test_embeddings_of_another_catalogue_are_refused(tmp_path):
    config = make_config(tmp_path)
    write_inputs(config, histories=make_histories().head(44))
    with pytest.raises(ArtifactError, match="users.npy: got 45 rows.*44 rows of .*histories.parquet"):
        run(config)

"""Stage embed on a toy catalogue: no leak, the contract of what is written, new items."""

import dataclasses
import json

import numpy as np
import polars as pl
import pytest

from contrec_dist.baselines.sasrec import baseline as ids_alone
from contrec_dist.baselines.sasrec import with_text
from contrec_dist.baselines.stage import run_baseline
from contrec_dist.config import Config, EmbedConfig, SasRecConfig
from contrec_dist.embeddings import embed
from contrec_dist.embeddings.embed import Standardisation, embed_new_items
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import Manifest, run_stage

NUM_USERS, NUM_ITEMS, COLD_ITEM = 20, 12, 11
ITEM_FILES = ("items.npy", "users.npy", "user_known.npy", "standardisation.safetensors", "layout.json")


def toy_histories(held_out_seed: int = 0) -> list[list[int]]:
    """Histories of 5; the training part is always the same, the last two depend on the seed."""
    training, held_out = np.random.default_rng(7), np.random.default_rng(held_out_seed)
    rows = []
    for user in range(NUM_USERS):
        row = [*training.choice(6, 3, replace=False) + 5 * (user % 2), *held_out.choice(COLD_ITEM, 2, replace=False)]
        rows.append([int(item) for item in row])
    return [*rows, [1]]  # the last user is short and all of it is training


def write_catalog(config: Config, histories: list[list[int]], titles: list[str] | None = None) -> None:
    """A catalog/ folder as stage prepare writes it."""
    num_train = [max(len(items) - 2, 0) if len(items) >= 3 else len(items) for items in histories]
    counts = np.bincount([i for items, stop in zip(histories, num_train) for i in items[:stop]], minlength=NUM_ITEMS)
    titles = titles or [f"{'nail polish' if item < 6 else 'hair shampoo'} number {item}" for item in range(NUM_ITEMS)]

    def build(_config, folder):
        strings = {"category": ["Beauty"] * NUM_ITEMS, "brand": [""] * NUM_ITEMS, "text": [""] * NUM_ITEMS}
        ids = {"item_idx": list(range(NUM_ITEMS)), "item_id": [f"i{item}" for item in range(NUM_ITEMS)], "title": titles}
        pl.DataFrame({**ids, **strings, "num_train": counts}).write_parquet(folder / "items.parquet")
        users = list(range(len(histories)))
        pl.DataFrame({"user_idx": users, "user_id": [f"u{user}" for user in users]}).write_parquet(folder / "users.parquet")
        positions = [(len(h) - 2, len(h) - 1) if len(h) >= 3 else (-1, -1) for h in histories]
        columns = {"user_idx": users, "items": histories, "timestamps": [[0] * len(h) for h in histories], "num_train": num_train}
        columns |= {"validation_pos": [p[0] for p in positions], "test_pos": [p[1] for p in positions]}
        pl.DataFrame(columns).write_parquet(folder / "histories.parquet")
        return {}

    run_stage(config, stage="prepare", folder="catalog", sections=("source",), inputs=(), build=build)


def toy_config(tmp_path, name: str = "toy", **settings) -> Config:
    embed_config = EmbedConfig(**{"collaborative_dim": 4, "num_epochs": 3, "text_dim": 5, "num_hash_features": 256, **settings})
    return Config(name=name, run_dir=str(tmp_path / name), embed=embed_config)


def run_toy(tmp_path, name: str = "toy", histories=None, **settings) -> Config:
    config = toy_config(tmp_path, name, **settings)
    write_catalog(config, histories or toy_histories())
    embed.run(config)
    return config


@pytest.mark.parametrize("collaborative", ["lightgcn", "sequential"])
def test_validation_and_test_items_do_not_reach_the_embedding(tmp_path, collaborative):
    first, second = toy_histories(held_out_seed=1), toy_histories(held_out_seed=2)
    assert first != second
    runs = [run_toy(tmp_path, name, rows, collaborative=collaborative) for name, rows in (("a", first), ("b", second))]
    folders = [config.folder("embeddings") for config in runs]
    for name in (*ITEM_FILES, "text_encoder/ngrams.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.parametrize("collaborative", ["lightgcn", "sequential"])
def test_a_changed_training_item_does_reach_the_embedding(tmp_path, collaborative):
    histories = toy_histories()
    changed = [[(items[0] + 1) % COLD_ITEM, *items[1:]] for items in histories]
    configs = [run_toy(tmp_path, name, rows, collaborative=collaborative) for name, rows in (("a", histories), ("b", changed))]
    arrays = [np.load(config.folder("embeddings") / "items.npy") for config in configs]
    assert not np.array_equal(*arrays)


def test_lightgcn_is_given_the_training_part_and_nothing_else(tmp_path, monkeypatch):
    seen, original = [], embed.fit_lightgcn
    monkeypatch.setattr(embed, "fit_lightgcn", lambda edges, *rest: seen.append(edges.copy()) or original(edges, *rest))
    histories = toy_histories()
    run_toy(tmp_path, histories=histories)
    expected = {(user, item) for user, items in enumerate(histories) for item in (items[:-2] if len(items) >= 3 else items)}
    assert {(int(user), int(item)) for user, item in seen[0]} == expected
    assert len(seen[0]) == 3 * NUM_USERS + 1


def test_what_is_written_is_the_contract(tmp_path):
    config = run_toy(tmp_path)
    folder = config.folder("embeddings")
    items, users, known = (np.load(folder / name) for name in ("items.npy", "users.npy", "user_known.npy"))
    assert items.shape == (NUM_ITEMS, 9) and items.dtype == np.float32
    assert users.shape == (NUM_USERS + 1, 4) and users.dtype == np.float32
    assert known.all() and known.dtype == bool
    assert json.loads((folder / "layout.json").read_text()) == {"collaborative": [0, 4], "text": [4, 9]}
    assert Manifest.load(folder).files["items.npy"]["shape"] == [NUM_ITEMS, 9]


@pytest.mark.parametrize("collaborative", ["lightgcn", "sequential"])
def test_both_parts_are_standardised_over_items_with_training_interactions(tmp_path, collaborative):
    config = run_toy(tmp_path, collaborative=collaborative)
    items = np.load(config.folder("embeddings") / "items.npy")
    trained = pl.read_parquet(config.folder("catalog") / "items.parquet")["num_train"].to_numpy() > 0
    assert trained[:COLD_ITEM].all() and not trained[COLD_ITEM]
    for part in (items[trained, :4], items[trained, 4:]):
        np.testing.assert_allclose(part.mean(0), 0, atol=1e-5)
        assert part.var(0).mean() == pytest.approx(1, abs=1e-4)


def test_items_and_users_without_training_edges_have_a_zero_collaborative_part(tmp_path):
    config = run_toy(tmp_path, histories=[*toy_histories(), []])
    folder = config.folder("embeddings")
    items, users, known = (np.load(folder / name) for name in ("items.npy", "users.npy", "user_known.npy"))
    assert not items[COLD_ITEM, :4].any() and items[COLD_ITEM, 4:].any()
    assert not known[-1] and known[:-1].all() and not users[-1].any()


def test_new_item_with_the_words_of_an_old_one_gets_its_text_part(tmp_path):
    config = run_toy(tmp_path)
    row = embed_new_items(config.folder("embeddings"), ["nail polish number 3"], ["Beauty"], [""], [""])
    items = np.load(config.folder("embeddings") / "items.npy")
    assert row.shape == (1, 9) and row.dtype == np.float32 and not row[0, :4].any()
    np.testing.assert_allclose(row[0, 4:], items[3, 4:], atol=1e-5)


def test_without_collaborative_part_the_columns_are_text_alone(tmp_path):
    folder = run_toy(tmp_path, collaborative="none").folder("embeddings")
    assert np.load(folder / "items.npy").shape == (NUM_ITEMS, 5)
    assert np.load(folder / "users.npy").shape == (NUM_USERS + 1, 0) and np.load(folder / "user_known.npy").all()
    assert json.loads((folder / "layout.json").read_text()) == {"collaborative": [0, 0], "text": [0, 5]}


@pytest.mark.parametrize("text_model", ["", "a/model/that/nobody/loads"])
def test_without_text_the_columns_are_collaborative_alone(tmp_path, text_model):
    folder = run_toy(tmp_path, text_dim=0, text_model=text_model).folder("embeddings")
    with_text = run_toy(tmp_path, "with_text").folder("embeddings")
    arrays = [np.load(one / "items.npy") for one in (folder, with_text)]
    assert np.array_equal(arrays[0], arrays[1][:, :4])
    assert json.loads((folder / "layout.json").read_text()) == {"collaborative": [0, 4], "text": [4, 4]}


def test_new_items_of_a_run_without_text_are_refused(tmp_path):
    """All of them would get the same row: nothing but their text is known."""
    folder = run_toy(tmp_path, text_dim=0).folder("embeddings")
    with pytest.raises(ArtifactError, match="embed.text_dim 0"):
        embed_new_items(folder, ["nail polish number 3"], ["Beauty"], [""], [""])


def test_a_text_of_negative_width_is_refused():
    with pytest.raises(ConfigError, match="embed.text_dim"):
        EmbedConfig(text_dim=-1)


def test_neither_part_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="embed"):
        run_toy(tmp_path, collaborative="none", text_dim=0)


def test_same_config_same_bytes_and_a_second_run_is_skipped(tmp_path):
    first, second = (run_toy(tmp_path, name) for name in "ab")
    files = [{k: v["sha256"] for k, v in Manifest.load(c.folder("embeddings")).files.items()} for c in (first, second)]
    assert files[0] == files[1]
    before = (first.folder("embeddings") / "items.npy").stat().st_mtime_ns
    embed.run(dataclasses.replace(first))
    assert (first.folder("embeddings") / "items.npy").stat().st_mtime_ns == before


def test_new_weights_under_an_old_model_path_count(tmp_path):
    (tmp_path / "weights").write_text("old")
    old = embed.hash_model(str(tmp_path))
    (tmp_path / "weights").write_text("new")
    assert embed.hash_model(str(tmp_path)) != old
    assert embed.hash_model("") == "" and embed.hash_model("hub/name") == "hub/name"


def test_new_items_need_a_complete_folder(tmp_path):
    with pytest.raises(ArtifactError, match="manifest"):
        embed_new_items(tmp_path, ["a"], [""], [""], [""])


def test_standardisation_of_constant_rows_is_finite():
    part = Standardisation.fit(np.full((3, 2), 5, np.float32))
    np.testing.assert_array_equal(part.apply(np.full((1, 2), 5, np.float32)), 0)


def test_a_table_in_chunks_is_the_table_in_one(tmp_path, monkeypatch):
    whole = run_toy(tmp_path, "whole").folder("embeddings")
    monkeypatch.setattr(embed, "CHUNK_ITEMS", 5)
    chunked = run_toy(tmp_path, "chunked").folder("embeddings")
    arrays = [np.load(folder / "items.npy") for folder in (whole, chunked)]
    np.testing.assert_allclose(*arrays, rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in chunked.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize(("baseline", "module"), [("sasrec_text", with_text), ("sasrec", ids_alone)])
def test_sasrec_vectors_are_those_of_the_baseline(tmp_path, baseline, module):
    """embed.collaborative: sasrec trains what `contrec baseline sasrec_text` (or sasrec) trains, and takes its item vectors."""
    settings = SasRecConfig(
        hidden_size=4, num_heads=1, num_epochs=2, batch_targets=16, validate_every_epochs=1, temperature=0.5
    )  # fmt: skip
    config = toy_config(tmp_path, collaborative="sasrec", sasrec_text=baseline == "sasrec_text")
    config = dataclasses.replace(config, sasrec=settings)
    write_catalog(config, toy_histories())
    embed.run(config)
    items, users = (np.load(config.folder("embeddings") / name) for name in ("items.npy", "users.npy"))
    run_baseline(config, baseline)
    vectors = module.load_recommender(config, config.folder(f"baselines/{baseline}")).vectors
    trained = pl.read_parquet(config.folder("catalog") / "items.parquet")["num_train"].to_numpy() > 0
    expected = Standardisation.fit(vectors, trained).apply(vectors)
    np.testing.assert_allclose(items[trained, :4], expected[trained], atol=1e-5)
    assert not items[~trained, :4].any() and items.shape[1] == 9 and users.shape == (NUM_USERS + 1, 4)
    assert len(Manifest.load(config.folder("embeddings")).facts["losses"]) == 2


def test_the_sasrec_that_the_embedding_takes_is_part_of_its_identity(tmp_path):
    configs = [
        dataclasses.replace(toy_config(tmp_path, collaborative=kind), sasrec=SasRecConfig(hidden_size=4, num_heads=1, num_epochs=epochs))
        for kind in ("sasrec", "sequential")
        for epochs in (1, 2)
    ]
    configs.append(dataclasses.replace(configs[0], embed=dataclasses.replace(configs[0].embed, sasrec_text=False)))
    write_catalog(configs[0], toy_histories())
    hashes = [embed.run(config).identity for config in configs]
    assert hashes[0] != hashes[1] and hashes[2] == hashes[3] and hashes[4] not in hashes[:4]

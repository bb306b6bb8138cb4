"""retrieval/live_index.py, current_index.py, new_items.py, replay.py: a catalogue that changes while it is searched."""

import copy
import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError, ConfigError, DataError
from contrec_dist.manifest import Manifest, lock_folder, run_stage
from contrec_dist.model.backbone import train_text_tokenizer
from contrec_dist.model.export import build_model, load_export, save_export
from contrec_dist.retrieval import index
from contrec_dist.retrieval.current_index import LIVE_FOLDER, CurrentIndex, current_version, open_current, open_store
from contrec_dist.retrieval.index import normalise_latents
from contrec_dist.retrieval.live_index import LiveIndex
from contrec_dist.retrieval.new_items import encode_items, read_new_items
from contrec_dist.retrieval.replay import MAKING, replay_changes
from contrec_dist.retrieval.top_k import exact_top_k
from sharding import faiss_versions
from sharding.faiss_versions import CURRENT_NAME, VersionStore


NEW_ITEM_BIAS = -0.375


def write_model(config: Config, seed: int) -> None:
    """model/ as stage train leaves it, of a model that has not been trained."""

    def build(_, work: Path) -> dict:
        torch.manual_seed(seed)
        latents, mean, std = (
            torch.from_numpy(np.load(config.folder("tokens") / f"{name}.npy"))
            for name in ("item_latents", "latent_mean", "latent_std")
        )
        items = pl.read_parquet(config.folder("catalog") / "items.parquet")
        tokenizer = train_text_tokenizer(items["title"].to_list(), vocab_size=300)
        model = build_model(
            config, vocab_size=len(tokenizer), item_latents=latents, num_items=len(latents), latent_mean=mean,
            latent_std=std, log_popularity=torch.linspace(-1, 0, len(latents)), latent_noise=0.1,
        )  # fmt: skip
        state = {name: value.clone() for name, value in model.state_dict().items()}
        save_export(model, state, tokenizer, work, {"new_item_bias": NEW_ITEM_BIAS})
        np.save(work / "item_vectors.npy", model.item_vectors().numpy())
        return {"seed": seed}

    run_stage(
        config,
        stage="train",
        folder="model",
        sections=(),
        inputs=("catalog", "tokens"),
        build=build,
        extra_identity={"seed": seed},
    )


@pytest.fixture(scope="module")
def built_run(toy_tokens, tmp_path_factory) -> Config:
    """A run up to its index, in 3 shards. Read only."""
    config = copy.deepcopy(toy_tokens)
    config.run_dir = str(tmp_path_factory.mktemp("live") / "run")
    for folder in ("catalog", "embeddings", "tokenizer", "tokens"):
        shutil.copytree(toy_tokens.folder(folder), config.folder(folder))
    config.index.num_shards, config.index.device = 3, "cpu"
    write_model(config, seed=0)
    index.run(config)
    return config


@pytest.fixture
def config(built_run, tmp_path) -> Config:
    """A copy of that run which a test may change."""
    changed = copy.deepcopy(built_run)
    changed.run_dir = str(tmp_path / "run")
    shutil.copytree(built_run.run_dir, changed.run_dir)
    return changed


def make_items(*ids: str, title: str = "Blue lamp") -> pl.DataFrame:
    rows = [
        {"item_id": one, "title": f"{title} {one}", "category": "Lamps", "brand": "", "text": "light"} for one in ids
    ]
    return pl.DataFrame(rows)


def vectors_by_idx(config: Config, current: CurrentIndex, space: str) -> np.ndarray:
    """The vectors of every item_idx, from what the index was made from and not from the index."""
    latents = current.latents[np.arange(len(current.items))]
    if space == "latent":
        return normalise_latents(config, latents)
    stage = np.load(config.folder("model") / "item_vectors.npy")
    encoded = (
        encode_items(config, current.items[len(stage) :]).vectors if len(current.items) > len(stage) else stage[:0]
    )
    return np.concatenate([stage, encoded])


def check_answers(config: Config, current: CurrentIndex, k: int = 7) -> None:
    """Every space answers as exact search over the living items does."""
    live = np.flatnonzero(current.items["live"].to_numpy())
    for space in ("query", "latent"):
        vectors = vectors_by_idx(config, current, space)
        metric = index.SPACES[space][1]
        queries = vectors[::9] + np.float32(0.1)
        scores, rows = exact_top_k(queries, vectors[live], k, metric)
        found = current.spaces[space].search(queries, k)
        assert np.array_equal(found[1], live[rows])
        np.testing.assert_allclose(found[0], scores, rtol=1e-5, atol=1e-6)


def check_living(current: CurrentIndex) -> None:
    """Every living item is searched once in every space, and no other."""
    living = np.flatnonzero(current.items["live"].to_numpy())
    for shards in current.spaces.values():
        found = shards.search(np.ones((1, shards.dim), np.float32), len(current.items) + 5)[1][0]
        assert np.array_equal(np.sort(found[found >= 0]), living)


# -- joining ------------------------------------------------------------------------------------------------------


def test_without_changes_the_current_index_is_the_stage_s(config):
    current = open_current(config)
    assert current.number == 0 and current.version == Manifest.load(config.folder("index")).content_hash[:12]
    assert current.items["live"].all() and len(current.items) == current.spaces["query"].num_items
    check_answers(config, current)


def test_items_that_join_are_searched_in_every_space_and_continue_the_numbers(config):
    stage_files = {path: path.read_bytes() for path in config.folder("index").rglob("*") if path.is_file()}
    num_items, before = len(open_current(config).items), current_version(config)
    LiveIndex.open(config).add(make_items("n1", "n2"))
    LiveIndex.open(config).add(make_items("n3", title="Green hose"))
    current = open_current(config)
    assert current.items["item_id"].to_list()[num_items:] == ["n1", "n2", "n3"]
    assert current.items["item_idx"].to_list() == list(range(num_items + 3))
    assert current.spaces["query"].num_items == current.spaces["latent"].num_items == num_items + 3
    check_answers(config, current)
    assert (current.number, current.version) == current_version(config) and current_version(config)[1] != before[1]
    assert stage_files == {path: path.read_bytes() for path in config.folder("index").rglob("*") if path.is_file()}


def test_a_new_item_gets_the_vector_that_the_model_gives_an_unseen_item(config):
    encoded = encode_items(config, make_items("n1", "n2"))
    model, _ = load_export(config.folder("model"))
    with torch.no_grad():
        latents = model.normalise(torch.from_numpy(encoded.latents)).flatten(1)
        vectors, bias = model.items(latents, torch.tensor([model.num_items, model.num_items + 1]))
    np.testing.assert_allclose(encoded.vectors, torch.cat([vectors, bias[:, None]], 1).numpy(), rtol=1e-6)
    assert bias.tolist() == [NEW_ITEM_BIAS, NEW_ITEM_BIAS]
    assert np.array_equal(encoded.embeddings[:, :16], np.zeros((2, 16)))  # the collaborative part: the mean


def test_ids_that_are_there_are_all_named_and_nothing_changes(config):
    known = pl.read_parquet(config.folder("catalog") / "items.parquet")["item_id"].to_list()[3:5]
    with pytest.raises(DataError, match=f"2 ids that are in the index: {known[0]}, {known[1]}"):
        LiveIndex.open(config).add(make_items("n1", *known))
    assert current_version(config) == (0, Manifest.load(config.folder("index")).content_hash[:12])


def test_wrong_rows_are_named_by_file_and_line(config, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("item_id,title\na,One\n,Two\nb,Three,too many\na,Four\n")
    with pytest.raises(DataError) as error:
        read_new_items(config, path)
    assert "3 wrong rows of 4" in str(error.value)
    for line, fault in ((3, "missing item id"), (4, "more than 2 fields"), (5, "the id of a row before")):
        assert f"{path}:{line}: {fault}" in str(error.value)
    with pytest.raises(ConfigError, match="--items.*none.csv"):
        read_new_items(config, tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["new.csv", "new.parquet", "new.jsonl"])
def test_items_are_read_by_the_source_s_column_names(config, tmp_path, name):
    config.source.item_column, config.source.title_column = "sku", "name"
    frame = pl.DataFrame({"sku": ["001", "002"], "name": ["A &amp; B", ""], "category": ["Lamps>Desk", ""]})
    writers = {".csv": frame.write_csv, ".parquet": frame.write_parquet, ".jsonl": frame.write_ndjson}
    writers[Path(name).suffix](tmp_path / name)
    items = read_new_items(config, tmp_path / name)
    assert items.rows() == [("001", "A & B", "Lamps > Desk", "", ""), ("002", "002", "", "", "")]


# -- leaving ------------------------------------------------------------------------------------------------------


def test_removed_items_never_come_back_and_every_list_stays_full(config):
    current = open_current(config)
    queries = vectors_by_idx(config, current, "query")[:5]
    best = np.unique(current.spaces["query"].search(queries, 10)[1])
    live = LiveIndex.open(config)
    live.add(make_items("n1"))
    live.remove([*current.items["item_id"].gather(best), "n1"])
    changed = open_current(config)
    assert changed.spaces["query"].num_items == len(current.items) - len(best)
    check_answers(config, changed, k=len(current.items) - len(best))
    assert (changed.spaces["query"].search(queries, 10)[1] >= 0).all()
    assert changed.items.filter(~pl.col("live"))["item_idx"].to_list() == [*best, len(current.items)]


def test_unknown_ids_are_named_unless_they_may_be_missing(config):
    live, items = LiveIndex.open(config), open_current(config).items
    with pytest.raises(DataError, match="2 unknown ids: x, y"):
        live.remove(["x", items["item_id"][0], "y"])
    assert open_current(config).number == 0
    assert live.remove(["x", items["item_id"][0]], missing_ok=True).num_items == len(items) - 1
    with pytest.raises(DataError, match=f"1 unknown ids: {items['item_id'][0]}"):
        live.remove([items["item_id"][0]])


def test_an_item_that_comes_back_gets_its_old_number(config):
    live = LiveIndex.open(config)
    live.add(make_items("n1", "n2"))
    number = open_current(config).items["item_id"].to_list().index("n1")
    live.remove(["n1"])
    live.add(make_items("n3", "n1", title="Red lamp"))
    current = open_current(config)
    assert current.items["item_id"].to_list()[number:] == ["n1", "n2", "n3"] and current.items["live"].all()
    assert current.items["title"][number] == "Red lamp n1"
    check_answers(config, current)


def test_a_replaced_item_is_found_by_what_it_is_now_alone(config):
    items = open_current(config).items
    live = LiveIndex.open(config)
    with pytest.raises(DataError, match="1 unknown ids: n9"):
        live.replace(make_items("n9"))
    live.replace(make_items(items["item_id"][4], title="Quite another thing"))
    current = open_current(config)
    assert current.items["title"][4].startswith("Quite another thing") and len(current.items) == len(items)
    encoded = encode_items(config, current.items[4:5])
    for space, vectors in (("query", encoded.vectors), ("latent", normalise_latents(config, encoded.latents))):
        scores, found = current.spaces[space].search(vectors, len(items))
        assert sorted(found[0]) == list(range(len(items)))  # once, not twice
        metric = index.SPACES[space][1]
        expected = exact_top_k(vectors, vectors, 1, metric)[0]
        assert scores[0, found[0].tolist().index(4)] == expected[0, 0]
    assert np.array_equal(current.latents[np.array([4])], encoded.latents)


# -- compaction ---------------------------------------------------------------------------------------------------


def test_compaction_changes_no_answer_and_leaves_no_removed_row(config):
    live, items = LiveIndex.open(config), open_current(config).items
    live.add(make_items("n1", "n2", "n3"))
    live.add(make_items("n4", title="Grey rug"))
    live.remove([*items["item_id"][5:40], "n2"])
    before = open_current(config)
    live.compact()
    after = open_current(config)
    segments = open_store(config).current().segments
    assert [segment.num_removed for segment in segments] == [0, 0]
    assert before.items.equals(after.items) and after.version != before.version
    check_answers(config, after)
    assert np.array_equal(before.latents[np.arange(len(items) + 4)], after.latents[np.arange(len(items) + 4)])
    live.compact(everything=True)
    assert [segment.num_rows for segment in open_store(config).current().segments] in (
        [len(items) - 35, 3],
        [len(items) - 32],
    )
    check_answers(config, open_current(config))


def test_a_few_removed_rows_are_not_worth_a_compaction(config):
    live, items = LiveIndex.open(config), open_current(config).items
    live.remove(items["item_id"][:3].to_list())
    assert live.compact().number == 1
    config.index.max_tombstone_ratio = 0.01
    assert live.compact().number == 2


# -- versions -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it: no code that cleans up runs, as after SIGKILL."""


@pytest.mark.parametrize("step", ["encoded", "segment", "000002.json", CURRENT_NAME])
def test_a_change_that_is_killed_leaves_the_old_version_and_can_be_made_again(config, monkeypatch, step):
    def die(*_, **__):
        raise Killed

    LiveIndex.open(config).add(make_items("n1"))
    before = open_current(config)
    with monkeypatch.context() as patched:
        if step == "encoded":
            patched.setattr("contrec_dist.retrieval.live_index.extend_shards", die)
        elif step == "segment":
            patched.setattr(VersionStore, "publish", die)
        else:  # just before this file is written
            write = faiss_versions.write_json
            patched.setattr(
                faiss_versions, "write_json", lambda path, value: die() if path.name == step else write(path, value)
            )
        with pytest.raises(Killed):
            LiveIndex.open(config).replace(make_items("n1", title="Other"))
    after = open_current(config)
    assert after.version == before.version and after.items.equals(before.items)
    check_answers(config, after)
    LiveIndex.open(config).add(make_items("n2"))
    assert open_current(config).items["item_id"].to_list()[-2:] == ["n1", "n2"]
    check_answers(config, open_current(config))


def test_readers_meet_whole_versions_while_the_catalogue_changes(config):
    items = open_current(config).items
    stop, failures, seen = threading.Event(), [], set()

    def read_on():
        try:
            while not stop.is_set():
                current = open_current(config)
                check_living(current)
                seen.add(current.number)
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read_on) for _ in range(2)]
    for reader in readers:
        reader.start()
    held = open_current(config)
    config.index.kept_versions = 2
    live = LiveIndex.open(config)
    for turn in range(4):
        live.add(make_items(f"a{turn}", f"b{turn}"))
        live.remove([f"a{turn}", items["item_id"][turn]])
        live.compact(everything=True)
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures and len(seen) > 1
    assert (
        held.spaces["query"].search(np.ones((1, held.spaces["query"].dim), np.float32), 500)[1].max() == len(items) - 1
    )
    assert open_store(config).current().number == 12
    assert len(list((config.folder(LIVE_FOLDER) / "segments").iterdir())) <= 4  # what no kept version names is gone


def test_ray_is_no_other_answer_for_a_changed_index(config, ray_cluster):
    live, items = LiveIndex.open(config), open_current(config).items
    live.add(make_items("n1", "n2"))
    live.remove(items["item_id"][3:9].to_list())
    threads = open_current(config)
    config.index.search, config.index.ray_actors = "ray", 2
    by_ray = open_current(config, ["query"])
    queries = vectors_by_idx(config, threads, "query")[:11]
    for got, expected in zip(by_ray.spaces["query"].search(queries, 12), threads.spaces["query"].search(queries, 12)):
        assert got.tobytes() == expected.tobytes()
    assert by_ray.spaces["query"].num_items == threads.spaces["query"].num_items
    by_ray.spaces["query"].close()


def test_changes_to_an_index_that_was_built_again_are_not_mixed_in_but_can_be_replayed(config, caplog, monkeypatch):
    live, items = LiveIndex.open(config), open_current(config).items
    old = Manifest.load(config.folder("index")).content_hash[:16]
    live.add(make_items("n1", "n2", "n3"))
    live.remove(["n2", items["item_id"][7]])
    live.replace(make_items("n3", items["item_id"][0], title="Other"))
    write_model(config, seed=1)
    index.run(config)
    new = Manifest.load(config.folder("index")).content_hash[:16]
    monkeypatch.setattr(logging.getLogger("contrec"), "propagate", True)
    current = open_current(config)
    assert current.number == 0 and old in caplog.text and new in caplog.text
    with pytest.raises(ArtifactError, match=f"{old}.*{new}.*index replay"):
        LiveIndex.open(config)
    replay_changes(config)
    replayed = open_current(config)
    assert replayed.items["item_id"].to_list()[len(items) :] == ["n1", "n3"]
    assert replayed.items["title"][0].startswith("Other") and not replayed.items["live"][7]
    check_living(replayed)
    assert not config.folder(MAKING).exists()
    assert (config.folder(f"{LIVE_FOLDER}-{old[:12]}") / CURRENT_NAME).is_file()
    replay_changes(config)  # nothing to do
    assert open_current(config).version == replayed.version


def test_a_job_goes_on_with_the_version_that_it_began_with_while_that_is_kept(config):
    config.index.kept_versions = 2
    live = LiveIndex.open(config)
    live.add(make_items("n1"))
    number, _ = current_version(config)
    began = open_current(config, ["query"], number=number)
    live.add(make_items("n2"))
    again = open_current(config, ["query"], number=number)
    assert again.version == began.version and again.items.equals(began.items)
    assert again.spaces["query"].num_items == began.spaces["query"].num_items and list(again.spaces) == ["query"]
    assert open_current(config, [], number=0).number == 0
    live.add(make_items("n3"))
    with pytest.raises(ArtifactError, match="000001.json.*index.kept_versions"):
        open_current(config, ["query"], number=number)


def test_two_writers_are_one_too_many(config):
    with lock_folder(config, LIVE_FOLDER):
        with pytest.raises(ArtifactError, match="another process that writes it"):
            with lock_folder(config, LIVE_FOLDER):
                pass

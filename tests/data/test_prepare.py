"""The stage: what it writes, that it leaks nothing, repeats itself, and notices changed files."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from contrec_dist.config import Config
from contrec_dist.data import prepare
from contrec_dist.data.catalog import Histories, load_histories, load_items, load_users
from contrec_dist.errors import ArtifactError

REAL_DATA = Path(__file__).resolve().parents[2] / "../shared/data"
ROWS = ["u0,a,1", "u0,b,2", "u0,c,3", "u0,a,4", "u1,c,1", "u1,b,1", "u2,b,1", "u2,d,2", "u2,e,9"]


def make_generated(folder, **settings):
    config = Config(name="toy", run_dir=str(folder))
    config.source.kind = "generated"
    for name, value in {"num_items": 120, "num_users": 150, "num_categories": 4, **settings}.items():
        setattr(config.source.generated, name, value)
    return config


def test_catalogue_by_hand(make_csv_config):
    config = make_csv_config(ROWS, items=["e", "d", "c", "b", "a,A &amp; A,x|y,brand,text", "z"])
    manifest = prepare.run(config)
    folder = config.folder("catalog")
    assert load_users(folder)["user_id"].to_list() == ["u0", "u1", "u2"]
    items = load_items(folder)
    assert items["item_id"].to_list() == ["a", "b", "c", "d", "e"]
    assert items.row(0) == (0, "a", "A & A", "x | y", "brand", "text", 1)
    assert items["num_train"].to_list() == [1, 3, 1, 0, 0]
    frame = load_histories(folder)
    assert frame["items"].to_list() == [[0, 1, 2, 0], [2, 1], [1, 3, 4]]
    assert frame["timestamps"].to_list() == [[1, 2, 3, 4], [1, 1], [1, 2, 9]]
    assert frame["num_train"].to_list() == [2, 2, 1]
    assert frame["validation_pos"].to_list() == [2, -1, 1]
    assert frame["test_pos"].to_list() == [3, -1, 2]
    dtypes = {"user_idx": pl.Int64, "items": pl.List(pl.Int64), "timestamps": pl.List(pl.Int64)}
    positions = {"num_train": pl.Int64, "validation_pos": pl.Int64, "test_pos": pl.Int64}
    assert dict(frame.schema) == {**dtypes, **positions}
    assert manifest.facts["num_interactions"] == 9 and manifest.facts["density"] == 9 / 15
    assert manifest.files["items.parquet"]["rows"] == 5


def test_cold_items_are_nowhere_in_training_and_targets_stay(tmp_path):
    usual, cold = make_generated(tmp_path / "usual"), make_generated(tmp_path / "cold")
    cold.split.cold_items = 0.2
    facts = [prepare.run(config).facts for config in (usual, cold)]
    items = [load_items(config.folder("catalog")) for config in (usual, cold)]
    assert items[1]["item_id"].to_list() == items[0]["item_id"].to_list()
    held_out = set(items[1].filter(pl.col("num_train") == 0)["item_idx"]) - set(items[0].filter(pl.col("num_train") == 0)["item_idx"])
    assert 0 < len(held_out) <= 24 and facts[1]["num_items_untrained"] == facts[0]["num_items_untrained"] + len(held_out)
    before, after = (Histories.load(config.folder("catalog")) for config in (usual, cold))
    targets = [histories.targets(histories.users_with("test"), "test") for histories in (before, after)]
    assert targets[0].tolist() == targets[1].tolist() and set(targets[1]) & held_out
    assert not set(after.training_edges()[1]) & held_out
    kept = [item for item in before.training_edges()[1] if item not in held_out]
    assert after.training_edges()[1].tolist() == kept


def test_users_of_cold_items_alone_leave_the_catalogue_and_are_counted(make_csv_config):
    rows = [f"u{number},{item},{time}" for number, item in enumerate("abcdefghij") for time in (1, 2)]
    config = make_csv_config(rows)
    config.split.cold_items = 0.3
    manifest = prepare.run(config)
    assert manifest.facts["drops"]["users of held out items alone"] == 3
    users, frame = load_users(config.folder("catalog")), load_histories(config.folder("catalog"))
    assert len(users) == len(frame) == 7 and manifest.facts["num_interactions"] == 14
    items = load_items(config.folder("catalog"))
    for user, history in zip(users["user_id"], frame["items"]):
        assert set(items["item_id"].gather(history)) == {"abcdefghij"[int(user[1:])]}


def test_item_without_title_is_titled_by_its_id(make_csv_config):
    config = make_csv_config(["u,a,1", "u,b,2"], items=["a,,,,", "b"])
    prepare.run(config)
    assert load_items(config.folder("catalog"))["title"].to_list() == ["a", "title of b"]
    bare = make_csv_config(["u,a,1", "u,b,2"])
    prepare.run(bare)
    assert load_items(bare.folder("catalog"))["title"].to_list() == ["a", "b"]


def test_unseen_items_come_last_when_kept(make_csv_config):
    config = make_csv_config(["u,b,1", "u,a,2"], items=["z", "a", "y", "b"], keep_unseen_items=True)
    facts = prepare.run(config).facts
    items = load_items(config.folder("catalog"))
    assert items["item_id"].to_list() == ["b", "a", "z", "y"]
    assert items["title"][2] == "title of z" and items["num_train"].to_list()[2:] == [0, 0]
    assert (facts["num_items"], facts["num_items_seen"]) == (4, 2)


@pytest.mark.parametrize("kind", ["leave_one_out", "time"])
def test_training_edges_hold_no_target_and_nothing_after_one(tmp_path, kind):
    config = make_generated(tmp_path)
    config.split.kind = kind
    prepare.run(config)
    histories = Histories.load(config.folder("catalog"))
    edge_users, edge_items = histories.training_edges()
    edges = set(zip(edge_users.tolist(), edge_items.tolist()))
    assert len(edges) == histories.num_train.sum()  # no user repeats an item here, so pairs tell
    for user in range(histories.num_users):
        later = histories.history(user)[histories.num_train[user] :].tolist()
        assert not edges & {(user, item) for item in later}
    for part in ("validation", "test"):
        users = histories.users_with(part)
        assert len(users) > 10
        targets = histories.targets(users, part)
        assert not edges & set(zip(users.tolist(), targets.tolist()))
        for user, target in zip(users, targets):
            assert histories.history(user)[histories.positions(part)[user]] == target


def test_time_split_trains_on_nothing_from_after_the_cut(tmp_path):
    config = make_generated(tmp_path)
    config.split.kind = "time"
    prepare.run(config)
    histories = Histories.load(config.folder("catalog"))
    place = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], histories.lengths)
    train = place < np.repeat(histories.num_train, histories.lengths)
    assert histories.timestamps[train].max() < histories.timestamps[~train].min()


def test_same_config_gives_the_same_bytes(tmp_path):
    first = prepare.run(make_generated(tmp_path / "a"))
    second = prepare.run(make_generated(tmp_path / "b"))
    assert {name: file["sha256"] for name, file in first.files.items()} == {
        name: file["sha256"] for name, file in second.files.items()
    }
    assert first.content_hash == second.content_hash and first.facts == second.facts


def test_another_seed_gives_another_catalogue(tmp_path):
    first, config = prepare.run(make_generated(tmp_path / "a")), make_generated(tmp_path / "b")
    config.seed = 1
    assert prepare.run(config).files["histories.parquet"]["sha256"] != first.files["histories.parquet"]["sha256"]


def test_changed_source_file_is_noticed_and_an_unchanged_one_skipped(make_csv_config):
    config = make_csv_config(ROWS)
    first = prepare.run(config)
    stamp = (config.folder("catalog") / "manifest.json").stat().st_mtime_ns
    assert prepare.run(config).identity == first.identity
    assert (config.folder("catalog") / "manifest.json").stat().st_mtime_ns == stamp
    make_csv_config([*ROWS[:-1], "u2,f,9"])
    second = prepare.run(config)
    assert second.identity != first.identity
    assert "f" in load_items(config.folder("catalog"))["item_id"].to_list()


def test_drops_and_examples_are_in_the_manifest(make_csv_config):
    config = make_csv_config([*ROWS, "u0,a,1", ",a,1"], max_bad_ratio=0.1)
    facts = prepare.run(config).facts
    assert facts["drops"] == {"interactions: missing user id": 1, "duplicate (exact)": 1}
    assert facts["bad_rows"]["interactions"]["wrong"] == 1
    assert facts["bad_rows"]["interactions"]["examples"][0].endswith("interactions.csv:12: missing user id")


def test_every_row_is_kept_or_counted(make_csv_config):
    rng = np.random.default_rng(0)
    rows = [f"u{u},i{i},{t}" for u, i, t in rng.integers(30, size=(600, 3))]
    rows[7], rows[99], rows[300] = ",i1,3", "u1,i1,x", ""
    config = make_csv_config(rows, max_bad_ratio=0.1, min_user_interactions=11, min_item_interactions=11)
    config.source.deduplicate = "first"
    facts = prepare.run(config).facts
    assert facts["drops"]["k-core"] > 0 and facts["drops"]["duplicate (first)"] > 0
    assert facts["num_interactions"] + sum(facts["drops"].values()) == len(rows)


def test_folder_without_catalogue_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="items.parquet.*prepare"):
        load_items(tmp_path)


def test_row_order_of_a_catalogue_is_checked(make_csv_config):
    config = make_csv_config(ROWS)
    prepare.run(config)
    path = config.folder("catalog") / "users.parquet"
    pl.read_parquet(path).reverse().write_parquet(path)
    with pytest.raises(ArtifactError, match="user_idx"):
        load_users(config.folder("catalog"))


FIGURES = {
    "beauty": (22363, 12101, 198502),
    "ml1m": (6040, 3706, 1000209),
    "lastfm": (1091, 3685, 52670),
    "game_contrec": (25372, 16414, 205301),
    "industrial": (9791, 5317, 68186),
}


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_real_data_gives_its_published_figures(tmp_path, name):
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}")
    config = Config(name=name, run_dir=str(tmp_path))
    config.source.path, config.source.order_column = str(folder), "position"
    config.source.min_user_interactions = config.source.min_item_interactions = 1
    facts = prepare.run(config).facts
    assert (facts["num_users"], facts["num_items"], facts["num_interactions"]) == FIGURES[name]
    assert facts["drops"] == {}
    assert facts["num_test"] == facts["num_users"]
    titles = load_items(config.folder("catalog"))["title"]
    assert not titles.str.contains("&amp;|&quot;|\n").any()

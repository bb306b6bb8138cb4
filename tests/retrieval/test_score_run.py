"""The score stage as people run it: all users, some users, new users; through Ray, FAISS and the manifests."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from contrec_dist.benchmarks.score_world import write_world
from contrec_dist.config import Config, IndexConfig
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import MANIFEST_NAME, Manifest, write_json
from contrec_dist.model.export import load_export
from contrec_dist.retrieval import score
from contrec_dist.retrieval.current_index import current_version
from contrec_dist.retrieval.live_index import LiveIndex
from contrec_dist.retrieval.recommendations import SCHEMA
from contrec_dist.retrieval.retriever import Retriever
from contrec_dist.retrieval.top_k import exact_top_k
from contrec_dist.retrieval.transitions import TransitionScores, fit_transitions
from contrec_dist.retrieval.user_views import UserViews

NUM_ITEMS, NUM_USERS = 1500, 90


@pytest.fixture(scope="module")
def world(ray_cluster, tmp_path_factory) -> Config:
    """A run of 1,500 items with an exact index; everyone scored for split 'next'."""
    config = Config(name="toy", run_dir=str(tmp_path_factory.mktemp("score") / "run"), ray=ray_cluster)
    shape = replace(config.backbone.shape, hidden_size=32, num_heads=2, intermediate_size=64, vocab_size=400)
    config.backbone = replace(config.backbone, shape=shape, precision="fp32")
    config.head = replace(config.head, width=32, query_dim=16)
    config.tokenizer = replace(config.tokenizer, latent_dim=4)
    config.index = IndexConfig(factory="Flat", device="cpu", spaces=["query"], recall_queries=10)
    config.prompt = replace(config.prompt, max_history=20)
    config.score = replace(config.score, splits=["next"], reasoning="none", k=10, users_per_part=40, batch_users=16)
    write_world(config, num_items=NUM_ITEMS, num_users=NUM_USERS, mean_history=9)
    _make_one_history_long(config)
    score.run(config)
    return config


def _make_one_history_long(config) -> None:
    """User 7 has met 600 items, the most popular ones among them. Only scoring reads this, so no manifest minds."""
    path = config.folder("catalog") / "histories.parquet"
    frame = pl.read_parquet(path)
    items = frame["items"].to_list()
    items[7] = np.random.default_rng(0).permutation(600).tolist()
    length = [len(one) for one in items]
    times = pl.Series([[0] * one for one in length])
    frame.with_columns(items=pl.Series(items), timestamps=times, num_train=pl.Series(length), validation_pos=-1, test_pos=-1).write_parquet(path)
    manifest = Manifest.load(path.parent)
    manifest.files[path.name]["bytes"] = path.stat().st_size
    write_json(path.parent / MANIFEST_NAME, asdict(manifest))


def scored(config, **changes) -> tuple[pl.DataFrame, Manifest]:
    """Run the stage with other settings of `score`; its rows and manifest."""
    config = replace(config, score=replace(config.score, **changes))
    manifest = score.run(config)
    folder = config.folder(score.output_folder(config))
    files = sorted(folder.glob("split=next/seen=*/*.parquet"))
    return pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in files]), manifest


def everyone(config) -> pl.DataFrame:
    return scored(config)[0]


def lists_of(frame) -> dict[str, list[str]]:
    return {user[0]: rows["item_id"].to_list() for user, rows in frame.group_by("user_id", maintain_order=True)}


def histories_of(config) -> dict[str, list[int]]:
    users = pl.read_parquet(config.folder("catalog") / "users.parquet")["user_id"]
    return dict(zip(users, pl.read_parquet(config.folder("catalog") / "histories.parquet")["items"].to_list()))


# -- everyone -----------------------------------------------------------------------------------------------------


def test_rows_are_sorted_by_rank_and_carry_the_versions_they_were_made_with(world):
    frame, manifest = scored(world)
    assert frame.schema == pl.Schema(SCHEMA) and frame["user_id"].n_unique() == NUM_USERS
    assert frame["user_id"].to_list() == [f"u{user}" for user in range(NUM_USERS) for _ in range(10)]
    assert frame["rank"].to_list() == list(range(1, 11)) * NUM_USERS
    assert (frame.group_by("user_id").agg(pl.col("score").diff().max())["score"] <= 0).all()
    versions = {"model": Manifest.load(world.folder("model")).content_hash[:12], "index": current_version(world)[1]}
    for name, version in versions.items():
        assert frame[f"{name}_version"].unique().to_list() == [version] == [manifest.facts[f"{name}_version"]]


def test_one_switch_says_whether_seen_items_come_back(world):
    seen = histories_of(world)
    masked, kept = everyone(world), scored(world, filter_seen=False, output=str(Path(world.run_dir) / "kept"))[0]
    assert not any({f"i{item}" for item in seen[user]} & set(items) for user, items in lists_of(masked).items())
    assert sum(bool({f"i{item}" for item in seen[user]} & set(items)) for user, items in lists_of(kept).items()) > 40
    assert not list(world.folder("recommendations").glob("split=next/seen=kept"))


@pytest.mark.parametrize("filter_seen", [True, False])
def test_a_thousand_items_a_user_equal_brute_force(world, filter_seen, tmp_path):
    """For user 7 too, who has met 600 of the 1,500: 900 are left, no more."""
    frame, _ = scored(world, k=1000, filter_seen=filter_seen, output=str(tmp_path / "out"))
    _, order = exact_top_k(_queries(world), np.load(world.folder("model") / "item_vectors.npy"), NUM_ITEMS)
    for row, (user, items) in enumerate(lists_of(frame).items()):
        banned = set(histories_of(world)[user]) if filter_seen else set()
        expected = [f"i{item}" for item in order[row] if item not in banned][:1000]
        assert items == expected
    assert len(lists_of(frame)["u7"]) == (900 if filter_seen else 1000)


def test_a_bonus_lifts_the_items_that_training_did_not_see_and_no_others(world, tmp_path):
    """Those without training interactions; brute force over queries and vectors, all items candidates."""
    new = (pl.read_parquet(world.folder("catalog") / "items.parquet")["num_train"] == 0).to_numpy()
    assert 100 < new.sum() < NUM_ITEMS - 100
    products = _queries(world) @ np.load(world.folder("model") / "item_vectors.npy").T + 0.75 * new
    for user, banned in enumerate(histories_of(world).values()):
        products[user, banned] = -np.inf
    lists = lists_of(scored(world, new_item_bonuses=[0.75], num_candidates=NUM_ITEMS, output=str(tmp_path / "out"))[0])
    best = np.sort(products, axis=1)[:, ::-1][:, :10]
    for row, items in enumerate(lists.values()):
        np.testing.assert_allclose(products[row, [int(item[1:]) for item in items]], best[row], rtol=1e-4)
    assert sum(items != lists[user] for user, items in lists_of(everyone(world)).items()) > NUM_USERS / 4


def test_transitions_join_the_score_of_every_candidate(world, tmp_path):
    """Weight 3, all items candidates: brute force over queries, vectors and the fitted similarities."""
    frame, manifest = scored(world, transition_weights=[3.0], num_candidates=NUM_ITEMS, output=str(tmp_path / "out"))
    assert manifest.facts["transition_weight"] == 3.0 and not (tmp_path / "out" / ".transitions").exists()
    fit_transitions(world, tmp_path / "fitted")
    users = UserViews.open(world, *load_export(world.folder("model"))).users.load("next", 0, NUM_USERS)
    everything = np.tile(np.arange(NUM_ITEMS), (NUM_USERS, 1))
    followed = TransitionScores.open(tmp_path / "fitted", world.item_knn).scores(users, everything)
    products = _queries(world) @ np.load(world.folder("model") / "item_vectors.npy").T
    for row, (user, items) in enumerate(lists_of(frame).items()):
        total = products[row] + 3 * followed[row]
        total[histories_of(world)[user]] = -np.inf
        best = np.sort(total)[::-1][:10]
        np.testing.assert_allclose(total[[int(item[1:]) for item in items]], best, rtol=1e-4)
    plain = lists_of(everyone(world))
    assert sum(items != plain[user] for user, items in lists_of(frame).items()) > NUM_USERS / 2


def _queries(world) -> np.ndarray:
    """What the stage asks the index, user after user."""
    views = UserViews.open(world, *load_export(world.folder("model")))
    parts = []
    for start in range(0, NUM_USERS, world.score.users_per_part):  # as the parts are cut: the same batches, the same bits
        users = views.users.load("next", start, min(start + world.score.users_per_part, NUM_USERS))
        parts.append(views.queries(views.read_users(users, reasoning=False).condition).numpy())
    return np.concatenate(parts)


def test_bytes_do_not_depend_on_the_number_of_workers(world, tmp_path):
    alone = replace(world, ray=replace(world.ray, num_workers=1))
    scored(alone, output=str(tmp_path / "out"))
    ours, theirs = (Manifest.load(folder).files for folder in (world.folder("recommendations"), tmp_path / "out"))
    assert len(ours) == 3 and {name: file["sha256"] for name, file in ours.items()} == {
        name: file["sha256"] for name, file in theirs.items()
    }


# -- some users ---------------------------------------------------------------------------------------------------


def test_users_of_a_file_get_the_lists_that_they_get_among_all(world, tmp_path):
    """In the order of user_id, whatever the file's, in a folder of their own; the stage's output stays."""
    path = tmp_path / "some.csv"
    path.write_text("user_id,note\nu33,x\nu7,\nu9,\nu33,again\nu81,\n")
    before = Manifest.load(world.folder("recommendations")).content_hash
    some, manifest = scored(world, users_file=str(path))
    assert some["user_id"].unique(maintain_order=True).to_list() == ["u33", "u7", "u81", "u9"]
    expected = lists_of(everyone(world))
    assert lists_of(some) == {user: expected[user] for user in ("u33", "u7", "u81", "u9")}
    assert manifest.facts["users"] == 4 and manifest.facts["repeated_rows"] == 1
    assert manifest.folder == "recommendations-some" and not world.folder("recommendations-some/.users.parquet").exists()
    assert Manifest.load(world.folder("recommendations")).content_hash == before


# -- new users ----------------------------------------------------------------------------------------------------


def test_new_users_get_the_lists_of_known_users_with_their_histories(world, tmp_path):
    """Whose lists are known; one more has no history at all and is scored as such."""
    known = histories_of(world)
    names = {"new 4": "u4", "new 12": "u12", "new 50": "u50", "new 7": "u7"}
    ids = {new: [f"i{item}" for item in known[old]] for new, old in names.items()} | {"nobody": []}
    path = tmp_path / "new.parquet"
    pl.DataFrame({"user_id": list(ids), "item_ids": list(ids.values())}).write_parquet(path)
    frame, manifest = scored(world, histories_file=str(path), splits=["validation"])
    expected = lists_of(everyone(world))
    got = lists_of(frame)
    assert list(got) == sorted(ids) and len(got.pop("nobody")) == 10
    assert got == {new: expected[old] for new, old in names.items()}
    assert manifest.facts["users"] == 5 and manifest.facts["wrong_entries"] == 0
    assert [path.name for path in world.folder(manifest.folder).glob("split=*")] == ["split=next"]


def test_another_content_under_the_same_name_is_scored_again(world, tmp_path):
    path = tmp_path / "changing.csv"
    path.write_text("user_id,item_ids\na,i1\n")
    first, _ = scored(world, histories_file=str(path))
    path.write_text("user_id,item_ids\na,i900 i20\nb,i3\n")
    second, _ = scored(world, histories_file=str(path))
    assert lists_of(first).keys() == {"a"} and lists_of(second).keys() == {"a", "b"}


def test_a_space_that_the_index_lacks_is_named_with_the_setting_that_needs_it(world):
    with pytest.raises(ArtifactError, match="index.spaces with 'latent', which score.rank_by=samples needs"):
        Retriever.open(replace(world, score=replace(world.score, rank_by="samples")))


def test_what_left_the_index_is_recommended_no_more_and_the_version_says_so(world, tmp_path):
    """The living index is another version of the same run: scored again, though no setting changed."""
    copy = replace(world, run_dir=str(tmp_path / "run"))
    shutil.copytree(world.run_dir, copy.run_dir)
    before, _ = scored(copy)
    gone = before["item_id"].head(3).to_list()
    LiveIndex.open(copy).remove(gone)
    after, manifest = scored(copy)
    assert not set(gone) & set(after["item_id"]) and after.group_by("user_id").len()["len"].unique().to_list() == [10]
    assert after["index_version"][0] == current_version(copy)[1] == manifest.facts["index_version"] != before["index_version"][0]


def test_search_by_ray_actors_gives_the_lists_of_one_process(world, tmp_path):
    by_ray = replace(world, index=replace(world.index, search="ray"))
    assert scored(by_ray, output=str(tmp_path / "by_ray"))[0].equals(everyone(world))


def test_two_kinds_of_users_at_once_and_files_that_are_not_there_are_named(world, tmp_path):
    with pytest.raises(ConfigError, match="a file that exists"):
        scored(world, histories_file=str(tmp_path / "absent.csv"))
    with pytest.raises(ConfigError, match="score.histories_file"):
        scored(world, histories_file="one.csv", users_file="other.csv")

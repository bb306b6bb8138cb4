"""retrieval/score.py and text_similarity.py, the parts that need no Ray: candidates, the text's say, and its weight."""

import math

import numpy as np
import polars as pl
import pytest
import torch

from contrec_dist.config import Config, IndexConfig, ScoreConfig
from contrec_dist.embeddings.textual import TextEncoder, join_item_text
from contrec_dist.errors import ArtifactError
from contrec_dist.model.history_reader import HistoryReader
from contrec_dist.retrieval.likelihood import LikelihoodRanker
from contrec_dist.retrieval.ranking import fuse_samples
from contrec_dist.retrieval.recommendations import HybridWeights, rerank
from contrec_dist.retrieval.retriever import SPACES, Retriever
from contrec_dist.retrieval.score import CANDIDATES, candidate_name, choose_weights, known_weights
from contrec_dist.retrieval.score_workers import CandidateFinder
from contrec_dist.retrieval.scored_users import ScoredUsers
from contrec_dist.retrieval.text_similarity import TextSimilarity
from contrec_dist.retrieval.top_k import exact_top_k
from contrec_dist.retrieval.user_views import UserViews
from sharding.faiss_shards import FaissShards

HISTORIES = [[1, 4, 7, 10, 13, 2, 5], [3, 6, 9, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29], [11, 8, 14, 17, 15]]
FLAT = IndexConfig(factory="Flat", device="cpu", recall_queries=20)


def candidate_frame(users, items, scores, texts, seen="masked") -> pl.DataFrame:
    return pl.DataFrame({
        "user_idx": users,
        f"{seen}_items": np.array(items, np.int64),
        f"{seen}_scores": np.array(scores, np.float32),
        f"{seen}_texts": np.array(texts, np.float32),
    })  # fmt: skip


# -- the hybrid order ---------------------------------------------------------------------------------------------


def test_rerank_adds_the_weighted_text_score_and_keeps_the_best():
    frame = candidate_frame([0], [[5, 2, 9]], [[1.0, 0.9, 0.8]], [[0.0, 0.5, 0.3]])
    for weight, order in ((0.0, [5, 2]), (0.25, [2, 5]), (10.0, [2, 9])):
        scores, item_idx = rerank(frame, "masked", HybridWeights(texts=weight), k=2)
        assert item_idx.tolist() == [order]
        table = {5: 1.0, 2: 0.9 + weight * 0.5, 9: 0.8 + weight * 0.3}
        assert scores[0] == pytest.approx([table[item] for item in order], rel=1e-6)


def test_rerank_leaves_places_past_the_end_empty():
    frame = candidate_frame([0], [[5, -1, -1]], [[1.0, -np.inf, -np.inf]], [[0.1, 0.0, 0.0]])
    _, item_idx = rerank(frame, "masked", HybridWeights(texts=1.0), k=3)
    assert item_idx.tolist() == [[5, -1, -1]]


# -- the text score -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def similarity(toy_tokens) -> TextSimilarity:
    return TextSimilarity.open(toy_tokens.folder("embeddings"))


@pytest.fixture(scope="module")
def toy_items(toy_tokens) -> pl.DataFrame:
    return pl.read_parquet(toy_tokens.folder("catalog") / "items.parquet")


def reasons_of(toy_items) -> list[str]:
    return [f"The user leans to {name}." for name in sorted(set(toy_items["category"]))]


def test_different_reasons_give_different_text_scores_and_one_reason_different_items_different_ones(similarity, toy_items):
    reasons = reasons_of(toy_items)
    everything = np.tile(np.arange(len(toy_items)), (len(reasons), 1))
    scores = similarity.scores(reasons, everything)
    assert len(reasons) > 2 and all(np.abs(a - b).max() > 0.1 for a, b in zip(scores, scores[1:]))
    assert (scores.std(axis=1) > 0.05).all()


def test_a_reason_is_closest_to_the_items_of_the_category_that_it_names(similarity, toy_items):
    categories = toy_items["category"].to_numpy()
    for reason in reasons_of(toy_items):
        scores = similarity.scores([reason], np.arange(len(toy_items))[None])[0]
        own = np.array([name in reason for name in categories])
        assert scores[own].mean() > scores[~own].mean() + 0.1


def test_text_scores_are_cosines_of_the_encoders_own_embeddings(similarity, toy_items, toy_tokens):
    """What is read back from items.npy equals embedding the items' texts again."""
    encoder = TextEncoder.load(toy_tokens.folder("embeddings") / "text_encoder")
    texts = [join_item_text(*row) for row in toy_items.select("title", "category", "brand", "text").rows()]
    reasons = reasons_of(toy_items)
    expected = encoder.encode(reasons) @ encoder.encode(texts).T
    item_idx = np.random.default_rng(0).integers(0, len(texts), (len(reasons), 300))  # repeats
    got = similarity.scores(reasons, item_idx)
    np.testing.assert_allclose(got, np.take_along_axis(expected, item_idx, axis=1), atol=1e-5)


def test_no_reason_and_no_item_score_zero(similarity, toy_items):
    reason = reasons_of(toy_items)[0]
    scores = similarity.scores([reason, "", reason], np.array([[0, -1, 3]] * 3))
    assert (scores[1] == 0).all() and (scores[:, 1] == 0).all() and (scores[0, [0, 2]] != 0).any()
    assert (similarity.scores(["", ""], np.array([[0, 1], [2, 3]])) == 0).all()


def test_many_users_score_as_one_by_one(similarity, toy_items):
    draw, reasons = np.random.default_rng(0), reasons_of(toy_items)
    spoken = [reasons[n] for n in draw.integers(0, len(reasons), 600)]  # more than a chunk
    item_idx = draw.integers(-1, len(toy_items), (600, 4))
    together = similarity.scores(spoken, item_idx)
    for user in (0, 255, 256, 599):
        np.testing.assert_allclose(together[user], similarity.scores([spoken[user]], item_idx[[user]])[0], atol=1e-6)


# -- its weight ---------------------------------------------------------------------------------------------------


@pytest.fixture
def choice_config(tmp_path) -> Config:
    """Four users; user 3 has no validation target."""
    config = Config(name="toy", run_dir=str(tmp_path), score=ScoreConfig(text_weights=[0.0, 0.5, 2.0]))
    config.folder("catalog").mkdir(parents=True)
    pl.DataFrame({"user_idx": range(4), "user_id": list("abcd")}).write_parquet(config.folder("catalog") / "users.parquet")
    pl.DataFrame({
        "user_idx": range(4), "items": [[7, 1, 4], [8, 2, 4], [9, 3, 4], [5]], "num_train": [1, 1, 1, 1],
        "validation_pos": [1, 1, 1, -1], "test_pos": [2, 2, 2, -1],
    }).write_parquet(config.folder("catalog") / "histories.parquet")  # fmt: skip
    (tmp_path / CANDIDATES).mkdir()
    return config


def choose(config, folder, ranges) -> dict:
    weights, choice = choose_weights(config, folder, ScoredUsers.of_catalog(config.folder("catalog")), ranges)
    chosen = (choice["text_weight"], choice["transition_weight"], choice["new_item_bonus"])
    assert (weights.texts, weights.transitions, weights.new_items) == chosen
    return choice


def write_candidates(folder, *frames):
    for part, frame in enumerate(frames):
        frame.write_parquet(folder / CANDIDATES / candidate_name("validation", part))


def test_the_text_weight_is_that_of_the_highest_ndcg_on_validation_users(choice_config, tmp_path):
    """Targets 1, 2, 3. At 0: ranks 2, 2, 1. At 0.5: 1, 2, 1. At 2: 1, 1, 3. NDCG by hand; parts are joined."""
    first = candidate_frame(
        [0, 1], [[9, 1, 8], [9, 2, 8]], [[1.0, 0.9, 0.1], [2.0, 1.0, 0.1]], [[0.0, 0.5, 0.0], [0.0, 0.8, 0.0]]
    )
    second = candidate_frame([2], [[3, 9, 8]], [[1.0, 0.9, 0.8]], [[0.0, 0.15, 0.2]])
    write_candidates(tmp_path, first, second)
    choice = choose(choice_config, tmp_path, [(0, 2), (2, 4)])
    second_place, third_place = 1 / math.log2(3), 1 / math.log2(4)
    expected = {"0.0": (2 * second_place + 1) / 3, "0.5": (1 + second_place + 1) / 3, "2.0": (1 + 1 + third_place) / 3}
    assert choice["text_weight_ndcg"] == pytest.approx(expected)
    assert choice["text_weight"] == 0.5


def test_a_tie_goes_to_the_smaller_text_weight(choice_config, tmp_path):
    write_candidates(tmp_path, candidate_frame([0], [[1, 9]], [[1.0, 0.9]], [[0.0, 0.0]]))
    choice_config.score.text_weights = [2.0, 0.5]
    assert choose(choice_config, tmp_path, [(0, 1)])["text_weight"] == 0.5


def test_without_reasons_or_validation_users_the_text_has_no_say(choice_config):
    assert known_weights(choice_config) is None  # it is to be chosen
    choice_config.score.reasoning = "none"
    assert known_weights(choice_config) == HybridWeights()
    choice_config.score.transition_weights = [1.5]
    assert known_weights(choice_config) == HybridWeights(transitions=1.5)
    choice_config.score.transition_weights = [0.0, 1.5]
    assert known_weights(choice_config) is None
    choice_config.score.reasoning, choice_config.score.splits = "generate", ["test"]
    assert known_weights(choice_config) == HybridWeights()


def test_both_weights_are_chosen_together(choice_config, tmp_path):
    """Target 1 of user 0: alone neither score lifts it over both others, together they do."""
    frame = candidate_frame([0], [[9, 8, 1]], [[1.0, 0.9, 0.0]], [[0.0, -0.6, 0.4]])
    frame = frame.with_columns(masked_transitions=pl.Series([[-0.4, 0.0, 0.4]], dtype=pl.List(pl.Float32)).list.to_array(3))
    write_candidates(tmp_path, frame)
    choice_config.score.text_weights, choice_config.score.transition_weights = [0.0, 1.0], [0.0, 1.0]
    choice = choose(choice_config, tmp_path, [(0, 1)])
    assert (choice["text_weight"], choice["transition_weight"]) == (1.0, 1.0)
    assert choice["text_weight_ndcg"] == pytest.approx({"0.0": 0.5, "1.0": 1.0})
    assert choice["transition_weight_ndcg"] == pytest.approx({"0.0": 1 / math.log2(3), "1.0": 1.0})


def choose_bonus(config, folder, bonuses, cost) -> dict:
    """Targets 1, 2 of users 0, 1. Item 9 is new and above the target of user 0 from a bonus of 0.5 on; item 1 is above it at 0."""
    frame = candidate_frame([0, 1], [[1, 9], [2, 8]], [[1.0, 0.6], [1.0, 0.9]], [[0.0, 0.0], [0.0, 0.3]])
    new = pl.Series([[0.0, 1.0], [0.0, 0.0]], dtype=pl.List(pl.Float32)).list.to_array(2)
    write_candidates(folder, frame.with_columns(masked_new_items=new))
    config.score.text_weights, config.score.new_item_bonuses, config.score.new_item_cost = [0.0, 1.0], bonuses, cost
    return choose(config, folder, [(0, 2)])


def test_the_bonus_of_new_items_is_the_largest_that_costs_no_more_than_allowed(choice_config, tmp_path):
    half = (1 + 1 / math.log2(3)) / 2  # 0.815: one of two targets falls to the second place
    choice = choose_bonus(choice_config, tmp_path, [0.5, 0.0, 0.3, 2.0], cost=0.005)
    assert (choice["new_item_bonus"], choice["text_weight"]) == (0.3, 0.0)
    assert choice["new_item_bonus_ndcg"] == pytest.approx({"0.0": 1.0, "0.3": 1.0, "0.5": half, "2.0": half})
    assert choice["text_weight_ndcg"] == pytest.approx({"0.0": 1.0, "1.0": half}), "at the smallest bonus"
    assert choose_bonus(choice_config, tmp_path, [0.5, 0.0, 0.3, 2.0], cost=0.2)["new_item_bonus"] == 2.0
    assert choose_bonus(choice_config, tmp_path, [0.5, 1.0], cost=0.0)["new_item_bonus"] == 1.0


def test_a_bonus_that_helps_is_taken_though_nothing_may_be_paid(choice_config, tmp_path):
    frame = candidate_frame([0], [[9, 1]], [[1.0, 0.6]], [[0.0, 0.0]])
    new = pl.Series([[0.0, 1.0]], dtype=pl.List(pl.Float32)).list.to_array(2)
    write_candidates(tmp_path, frame.with_columns(masked_new_items=new))
    choice_config.score.new_item_bonuses, choice_config.score.new_item_cost = [0.0, 1.0], 0.0
    assert choose(choice_config, tmp_path, [(0, 1)])["new_item_bonus"] == 1.0


def test_a_single_bonus_is_not_chosen_but_taken(choice_config):
    choice_config.score.text_weights, choice_config.score.new_item_bonuses = [0.25], [1.5]
    assert known_weights(choice_config) == HybridWeights(texts=0.25, new_items=1.5)
    choice_config.score.new_item_bonuses = [0.0, 1.5]
    assert known_weights(choice_config) is None
    choice_config.score.splits = ["next"]
    assert known_weights(choice_config) == HybridWeights()


def test_a_single_text_weight_is_not_chosen_but_taken(choice_config):
    choice_config.score.text_weights = [0.25]
    for splits in (["next"], ["validation", "test"]):
        choice_config.score.splits = splits
        assert known_weights(choice_config) == HybridWeights(texts=0.25)


# -- candidates ---------------------------------------------------------------------------------------------------


@pytest.fixture
def views(make_world) -> UserViews:
    world = make_world(HISTORIES)
    world.config.score = ScoreConfig(num_candidates=9, num_samples=3, num_sampling_steps=2, k=5)
    model = world.build_model()
    vectors = model.item_vectors().numpy()
    latents = model.catalogue(torch.device("cpu")).flatten(1).numpy()
    for space, rows, metric in (("query", vectors, "inner_product"), ("latent", latents, "l2")):
        FaissShards.build(rows, np.arange(30), world.config.folder("index") / space, FLAT, metric, rows[:20])
    reader = HistoryReader(model, world.texts, world.tokenizer)
    return UserViews(world.config, model, reader, world.item_latents, None, ScoredUsers.of_catalog(world.config.folder("catalog")))


def test_a_text_written_aside_changes_no_condition(views):
    users = views.users.pick("test", np.arange(4))
    readings = {}
    for reasoning in ("generate", "aside", "none"):
        views.config.score.reasoning = reasoning
        texts = None if reasoning == "none" else object()  # asked for whether there is one, and no more
        readings[reasoning] = CandidateFinder(views.config, views, None, texts, None, None, None)._read(users)
    assert readings["aside"].reasons == readings["generate"].reasons and any(readings["aside"].reasons)
    assert torch.equal(readings["aside"].condition, readings["none"].condition)
    assert not torch.allclose(readings["aside"].condition, readings["generate"].condition)


def open_retriever(views) -> Retriever:
    folder = views.config.folder("index") / SPACES[views.config.score.rank_by]
    return Retriever(views.config.score, views.config.seed, FaissShards.open(folder, "cpu"), views.item_latents, np.zeros(30))


def find(views, rank_by, users=None, seed=0):
    """Condition of the test users, what they have seen, and what the retriever finds."""
    views.config.score.rank_by = rank_by
    picked = views.users.pick("test", np.arange(4) if users is None else users)
    condition = views.read_users(picked, reasoning=False).condition
    seen = [picked.items[start:stop] for start, stop in zip(picked.offsets, picked.offsets[1:])]
    return condition, seen, open_retriever(views).find(views, condition, picked, seed=seed)


def test_candidates_by_query_are_the_highest_products_with_the_item_vectors(views):
    condition, seen, found = find(views, "query")
    queries, vectors = views.queries(condition).numpy(), views.model.item_vectors().numpy()
    scores, item_idx = exact_top_k(queries, vectors, 9)
    assert np.array_equal(found["kept"][1], item_idx)
    np.testing.assert_allclose(found["kept"][0], scores, rtol=1e-6)
    everything = exact_top_k(queries, vectors, 30)[1]
    for row, items in enumerate(seen):
        expected = [item for item in everything[row] if item not in set(items)][:9]
        assert found["masked"][1][row].tolist() == expected


@pytest.mark.parametrize("rank_by", ["query", "samples", "likelihood"])
def test_seen_items_never_come_back_where_they_are_masked(views, rank_by):
    _, seen, found = find(views, rank_by)
    for items, (masked, kept) in zip(seen, zip(found["masked"][1], found["kept"][1])):
        assert not set(items.tolist()) & set(masked.tolist())
    assert any(set(items.tolist()) & set(kept.tolist()) for items, kept in zip(seen, found["kept"][1]))


def test_candidates_by_samples_are_the_fused_neighbours_of_what_the_head_draws(views):
    condition, _, found = find(views, "samples", seed=7)
    score = views.config.score
    samples = views.model.head.sample(
        condition, num_samples=3, num_steps=2, solver=score.solver, guidance=score.guidance,
        generator=torch.Generator().manual_seed(views.config.seed * 1_000_003 + 7),
    )  # fmt: skip
    latents = views.model.catalogue(torch.device("cpu")).flatten(1).numpy()
    scores, item_idx = exact_top_k(samples.flatten(0, 1).numpy(), latents, 9, "l2")
    expected = fuse_samples(scores.reshape(3, -1, 9), item_idx.reshape(3, -1, 9), 9)
    assert np.array_equal(found["kept"][1], expected[1])


def test_candidates_by_likelihood_are_those_of_the_query_in_the_order_of_one_score_for_both_views(views):
    condition, _, found = find(views, "likelihood", seed=7)
    by_query = find(views, "query")[2]
    ranker = LikelihoodRanker(
        views.model, views.item_latents, np.zeros(30), num_levels=views.config.score.likelihood_levels, num_draws=1
    )
    everything = ranker.score(condition, np.tile(np.arange(30), (4, 1)), seed=views.config.seed * 1_000_003 + 7)
    for view, (scores, item_idx) in found.items():
        assert np.array_equal(np.sort(item_idx, axis=1), np.sort(by_query[view][1], axis=1))
        assert not np.array_equal(item_idx, by_query[view][1])
        np.testing.assert_allclose(scores, np.take_along_axis(everything, item_idx, axis=1), rtol=1e-4, atol=1e-4)
        assert (np.diff(scores, axis=1) <= 0).all()


def test_retrieval_is_a_function_of_the_seed(views):
    first, again, other = (find(views, "samples", seed=seed)[2]["kept"] for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(("rank_by", "calls_expected"), [("query", 1), ("samples", 4)])
def test_the_denoiser_runs_once_a_step_for_all_users_and_samples_together(views, rank_by, calls_expected):
    """No loop over users, and no users x items matrix: what is found has num_candidates columns.

    Samples take two steps, each with and without the condition.
    """
    counts = []
    for users in (np.array([0]), np.arange(4)):
        views.config.score.rank_by = rank_by
        picked = views.users.pick("test", users)
        condition = views.read_users(picked, reasoning=False).condition
        calls = []
        hook = views.model.head.denoiser.register_forward_hook(lambda *arguments: calls.append(1))
        found = open_retriever(views).find(views, condition, picked, seed=0)
        hook.remove()
        counts.append(len(calls))
        assert all(array.shape == (len(users), 9) for pair in found.values() for array in pair)
    assert counts == [calls_expected] * 2

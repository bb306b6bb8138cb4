"""retrieval/user_views.py: which items stand before a split's target, and what the model is shown of them."""

from dataclasses import replace

import numpy as np
import pytest

from contrec_dist.model.history_reader import HistoryBatch, HistoryReader
from contrec_dist.retrieval.scored_users import ScoredUsers
from contrec_dist.retrieval.user_views import UserViews

HISTORIES = [
    [1, 4, 7, 10, 13, 2, 5],
    [3, 6],
    [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 3, 4],
    [11, 8, 14],
    [9],
]
ALL = np.arange(5)


def make_views(world) -> UserViews:
    model = world.build_model()
    reader = HistoryReader(model, world.texts, world.tokenizer)
    users = ScoredUsers.of_catalog(world.config.folder("catalog"))
    return UserViews(world.config, model, reader, world.item_latents, world.user_latents, users)


@pytest.fixture(params=[False, True], ids=["plain", "user_tokens"])
def views(make_world, request) -> UserViews:
    world = make_world(HISTORIES, user_tokens=request.param, max_history=6, titled_items=1, max_response_tokens=4)
    world.config.score.batch_users = 2
    return make_views(world)


def shown(views, users, split) -> list[list[int]]:
    """The items that the model is shown of each user."""
    seen = set()
    read = views.history_reader.read
    try:
        def note(histories, *, reasoning):
            seen.update(tuple(histories.items[a:b].tolist()) for a, b in zip(histories.offsets, histories.offsets[1:]))
            return read(histories, reasoning=reasoning)

        views.history_reader.read = note
        views.read(users, split, reasoning=False)
    finally:
        views.history_reader.read = read
    return sorted(list(items) for items in seen)


def before_target(users) -> list[list[int]]:
    return [users.items[a:b].tolist() for a, b in zip(users.offsets, users.offsets[1:])]


def test_splits_ask_about_the_users_who_have_their_target(views):
    assert views.users.with_target("validation").tolist() == [0, 2, 3]
    assert views.users.with_target("test").tolist() == [0, 2, 3]
    assert views.users.with_target("next").tolist() == [0, 1, 2, 3, 4]


def test_the_test_history_includes_the_newest_item_and_the_validation_history_does_not(views):
    """Test: everything before the last item, so the validation item too. Validation: everything before that one."""
    expected = {
        "validation": [one[:-2] for one in HISTORIES],
        "test": [one[:-1] for one in HISTORIES],
        "next": HISTORIES,
    }
    for split, histories in expected.items():
        users = views.users.with_target(split)
        wanted = [histories[user] for user in users]
        assert before_target(views.users.pick(split, users)) == wanted
        assert shown(views, users, split) == sorted(one[-6:] for one in wanted)  # the newest max_history


def test_the_target_is_not_among_what_is_shown(views):
    for split, place in (("validation", -2), ("test", -1)):
        users = views.users.load(split, 0, 5)
        assert users.user_idx.tolist() == [0, 2, 3] and users.user_ids.to_list() == ["u0", "u2", "u3"]
        assert users.targets.tolist() == [HISTORIES[user][place] for user in users.user_idx]
        assert not any(target in items for target, items in zip(users.targets, before_target(users)))


def test_test_conditions_come_from_test_positions_not_from_validation_ones(views):
    users = views.users.with_target("test")
    test, validation = (views.read(users, split, reasoning=False).condition for split in ("test", "validation"))
    assert ((test - validation).abs().amax(dim=1) > 1e-4).all()
    for row, user in enumerate(users):
        items = np.array(HISTORIES[user][:-1][-6:])
        own = None if views.user_latents is None else views.user_latents[[user]]
        history = HistoryBatch(items, np.array([0, len(items)]), views.item_latents[items], own)
        assert (test[row] - views.history_reader.read(history, reasoning=False).condition[0]).abs().max() < 1e-5


@pytest.mark.parametrize("reasoning", [False, True])
def test_users_are_read_in_their_order_whatever_the_batches(views, reasoning):
    users = np.array([3, 0, 4, 2, 1])
    together = views.read(users, "next", reasoning=reasoning)
    for row, user in enumerate(users):
        alone = views.read(np.array([user]), "next", reasoning=reasoning)
        assert (together.condition[row] - alone.condition[0]).abs().max() < 1e-5
        assert together.reasons[row] == alone.reasons[0]


def test_users_without_a_target_are_read_up_to_what_training_saw(views):
    assert [len(one) for one in before_target(views.users.pick("validation", ALL))] == [5, 2, 10, 1, 1]


def test_queries_end_with_the_one_that_meets_the_items_bias(views):
    reading = views.read(ALL, "next", reasoning=False)
    queries = views.queries(reading.condition)
    assert queries.shape == (5, views.config.head.query_dim + 1) and (queries[:, -1] == 1).all()
    vectors = views.model.item_vectors()
    scores = queries @ vectors.T
    expected = queries[:, :-1] @ vectors[:, :-1].T + vectors[:, -1]
    assert (scores - expected).abs().max() < 1e-4


def test_views_open_from_the_folders_of_a_run(make_world):
    world = make_world(HISTORIES)
    views, model = make_views(world), world.build_model()
    opened = UserViews.open(world.config, model, world.tokenizer)
    users = views.users.with_target("test")
    first, second = (one.read(users, "test", reasoning=True) for one in (views, opened))
    assert first.reasons == second.reasons and (first.condition - second.condition).abs().max() == 0


@pytest.mark.parametrize("split", ["validation", "test", "next"])
def test_ranges_joined_are_everyone(views, split):
    """Whatever the ranges: no user twice, none left out, the same histories."""
    everyone = views.users.load(split, 0, 5)
    assert everyone.user_idx.tolist() == views.users.with_target(split).tolist()
    for cuts in ([0, 1, 2, 3, 4, 5], [0, 2, 5], [0, 3, 3, 5]):
        pieces = [views.users.load(split, start, stop) for start, stop in zip(cuts, cuts[1:])]
        assert sum((before_target(one) for one in pieces), []) == before_target(everyone)
        assert np.concatenate([one.user_idx for one in pieces]).tolist() == everyone.user_idx.tolist()
        assert np.concatenate([one.targets for one in pieces]).tolist() == everyone.targets.tolist()


def test_users_whom_training_never_saw_have_no_tokens_of_their_own(make_world):
    """Their user latents are zero, as those of the catalogue's users without training edges."""
    world = make_world(HISTORIES, user_tokens=True)
    views = make_views(world)
    known = views.users.load("next", 0, 5)
    histories = views._histories(replace(known, user_idx=np.array([-1, 1, 2, 3, 4])), np.arange(5))
    assert (histories.user_latents[0] == 0).all() and (histories.user_latents[1:] == world.user_latents[1:]).all()

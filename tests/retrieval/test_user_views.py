"""retrieval/user_views.py: which items stand before a split's target, and what the model is shown of them."""

import numpy as np
import pytest

from contrec_dist.model.history_reader import HistoryReader
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
    return UserViews(world.config, model, world.reader, reader, world.user_latents)


@pytest.fixture(params=[False, True], ids=["plain", "user_tokens"])
def views(make_world, request) -> UserViews:
    world = make_world(HISTORIES, user_tokens=request.param, max_history=6, titled_items=1, max_response_tokens=4)
    world.config.score.batch_users = 2
    return make_views(world)


def shown(views, users, split) -> list[list[int]]:
    """The items that the model is shown of each user."""
    seen = {}
    read = views.history_reader.read
    try:
        def note(histories, *, reasoning):
            seen.update({tuple(one.items.tolist()): one for one in histories})
            return read(histories, reasoning=reasoning)

        views.history_reader.read = note
        views.read(users, split, reasoning=False)
    finally:
        views.history_reader.read = read
    return sorted(list(items) for items in seen)


def test_splits_ask_about_the_users_who_have_their_target(views):
    assert views.users_with_target("validation").tolist() == [0, 2, 3]
    assert views.users_with_target("test").tolist() == [0, 2, 3]
    assert views.users_with_target("next").tolist() == [0, 1, 2, 3, 4]


def test_the_test_history_includes_the_newest_item_and_the_validation_history_does_not(views):
    """Test: everything before the last item, so the validation item too. Validation: everything before that one."""
    expected = {
        "validation": [one[:-2] for one in HISTORIES],
        "test": [one[:-1] for one in HISTORIES],
        "next": HISTORIES,
    }
    for split, histories in expected.items():
        users = views.users_with_target(split)
        wanted = [histories[user] for user in users]
        assert [one.tolist() for one in views.seen_items(users, split)] == wanted
        assert shown(views, users, split) == sorted(one[-6:] for one in wanted)  # the newest max_history


def test_the_target_is_not_among_what_is_shown(views):
    for split, place in (("validation", -2), ("test", -1)):
        for user in views.users_with_target(split):
            target = HISTORIES[user][place]
            assert target not in views.seen_items(np.array([user]), split)[0]
            position = views.target_positions(split)[user]
            assert HISTORIES[user][position] == target


def test_test_conditions_come_from_test_positions_not_from_validation_ones(views):
    users = views.users_with_target("test")
    test, validation = (views.read(users, split, reasoning=False).condition for split in ("test", "validation"))
    assert ((test - validation).abs().amax(dim=1) > 1e-4).all()
    histories = [views._history(user, len(HISTORIES[user]) - 1) for user in users]
    expected = views.history_reader.read(histories, reasoning=False).condition
    assert (test - expected).abs().max() < 1e-5


@pytest.mark.parametrize("reasoning", [False, True])
def test_users_are_read_in_their_order_whatever_the_batches(views, reasoning):
    users = np.array([3, 0, 4, 2, 1])
    together = views.read(users, "next", reasoning=reasoning)
    for row, user in enumerate(users):
        alone = views.read(np.array([user]), "next", reasoning=reasoning)
        assert (together.condition[row] - alone.condition[0]).abs().max() < 1e-5
        assert together.reasons[row] == alone.reasons[0]


def test_users_without_a_target_are_read_up_to_what_training_saw(views):
    assert [len(one) for one in views.seen_items(ALL, "validation")] == [5, 2, 10, 1, 1]


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
    users = views.users_with_target("test")
    first, second = (one.read(users, "test", reasoning=True) for one in (views, opened))
    assert first.reasons == second.reasons and (first.condition - second.condition).abs().max() == 0

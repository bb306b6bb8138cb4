"""data/batches.py: every target once an epoch, plans that are functions of (seed, epoch), tensors that fit the model."""

from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from contrec_dist.data import batches
from contrec_dist.data.batches import TrainingRows
from contrec_dist.data.prompts import PromptTexts, lay_out
from contrec_dist.errors import ConfigError
from contrec_dist.model.backbone import train_text_tokenizer
from sharding.token_reader import TokenReader

DRAW = np.random.default_rng(3)
HISTORIES = [DRAW.integers(0, 30, length).tolist() for length in (9, 1, 40, 2, 3, 25, 4, 0, 13, 6, 17)]


def train_part(history):
    return history[:-2] if len(history) >= 3 else history


def whole_epoch(rows, epoch=0):
    plan = rows.plan(epoch)
    return plan, rows.build(plan, np.arange(len(plan.rows)), len(plan.rows))


def test_every_item_after_the_first_is_a_target_exactly_once_an_epoch(make_world):
    """Counted over all users as (user, place, item): long histories are cut into windows, held-out items never appear."""
    world = make_world(HISTORIES, max_history=8)
    rows = world.rows
    for epoch in range(2):
        plan = rows.plan(epoch)
        samples = np.concatenate(plan.rows)
        seen = Counter()
        for sample in samples:
            user, start, stop = plan.user[sample], plan.start[sample], plan.stop[sample]
            assert stop - start <= 9  # at most max_history inputs
            seen.update((int(user), place) for place in range(start + 1, stop))
        expected = {(user, place) for user, one in enumerate(HISTORIES) for place in range(1, len(train_part(one)))}
        assert set(seen) == expected and set(seen.values()) == {1}
        _, batch = whole_epoch(rows, epoch)
        wanted = Counter(item for one in HISTORIES for item in train_part(one)[1:])
        assert Counter(batch.target_idx.tolist()) == wanted


def test_the_last_item_alone_is_a_target_where_the_config_says_so(make_world):
    """The rows stay as they are: what changes is which positions are asked about."""
    world = make_world(HISTORIES, max_history=8)
    _, everything = whole_epoch(world.rows)
    world.config.train.targets = "last"
    plan, batch = whole_epoch(world.rows)
    last = [HISTORIES[plan.user[sample]][plan.stop[sample] - 1] for sample in np.concatenate(plan.rows)]
    assert batch.target_idx.tolist() == last and 0 < len(last) < len(everything.target_idx)
    assert np.array_equal(batch.target_latents.numpy(), world.item_latents[last])
    segments = batch.segments.numpy()
    ends = (segments > 0) & (segments != np.append(segments[:, 1:], np.zeros((len(segments), 1), np.int64), axis=1))
    assert batch.targets.tolist() == np.flatnonzero(ends).tolist()  # the last position of every sample
    for name in ("tokens", "segments", "item_idx", "markers", "slots"):
        assert np.array_equal(getattr(batch, name), getattr(everything, name)), name


def test_targets_of_the_toy_catalogue_are_covered_too(toy_tokens):
    """The same count on the output of the real stages, from the catalogue's histories."""
    items = pl.read_parquet(toy_tokens.folder("catalog") / "items.parquet")
    texts = PromptTexts(items, train_text_tokenizer(items["title"].to_list(), 400), toy_tokens.prompt)
    rows = TrainingRows(toy_tokens, TokenReader(toy_tokens.folder("tokens")), texts, None)
    _, batch = whole_epoch(rows)
    histories = pl.read_parquet(toy_tokens.folder("catalog") / "histories.parquet").select("items", "num_train").rows()
    assert max(num_train for _, num_train in histories) > toy_tokens.prompt.max_history  # windows are needed
    assert Counter(batch.target_idx.tolist()) == Counter(item for one, end in histories for item in one[1:end])


def test_a_target_follows_the_item_that_came_before_it(make_world):
    """Targets, their latents, and the slots of the inputs before them, against the histories."""
    world = make_world(HISTORIES, max_history=8)
    plan, batch = whole_epoch(world.rows)
    assert np.array_equal(batch.latents.numpy(), world.item_latents[batch.item_idx])
    assert np.array_equal(batch.target_latents.numpy(), world.item_latents[batch.target_idx])
    item_at_marker = {int(slots[0]) - 1: int(item) for slots, item in zip(batch.slots, batch.item_idx)}
    for position, item in zip(batch.targets.tolist(), batch.target_idx.tolist()):
        assert item_at_marker.get(position, item) == item  # a marker that also has slots announces its own item
    samples = np.concatenate(plan.rows)
    expected = []
    for sample in samples:
        expected += HISTORIES[plan.user[sample]][plan.start[sample] + 1 : plan.stop[sample]]
    assert batch.target_idx.tolist() == expected


def test_the_plan_is_a_function_of_seed_and_epoch(make_world):
    world = make_world(HISTORIES, max_history=8, response_drop=0.5)

    def describe(rows, epoch):
        plan = rows.plan(epoch)
        return [row.tolist() for row in plan.rows], plan.term.tolist(), plan.brand.tolist()

    rows = world.rows
    first = describe(rows, 3)
    assert describe(rows, 3) == first == describe(world.rows, 3)
    assert describe(rows, 4)[0] != first[0] and describe(rows, 4)[1] != first[1]
    world.config.seed = 1
    assert describe(world.rows, 3)[0] != first[0]


def test_samples_mix_inside_a_shuffle_window_only(make_world):
    world = make_world(HISTORIES, max_history=8)
    world.config.train.shuffle_shards = 1
    rows = world.rows
    plan = rows.plan(0)
    for row in plan.rows:
        assert len(set(rows.reader.shard[plan.user[row]])) == 1
    world.config.train.shuffle_shards = 99
    plan = world.rows.plan(0)
    assert any(len(set(rows.reader.shard[plan.user[row]])) > 1 for row in plan.rows)


@pytest.mark.parametrize("user_tokens", [False, True])
@pytest.mark.parametrize("titled", [-1, 0, 2])
@pytest.mark.parametrize("num_tokens", [1, 2, 4])
def test_the_length_that_is_planned_is_the_length_that_is_laid_out(make_world, num_tokens, titled, user_tokens):
    prompt = {"max_history": 8, "titled_items": titled, "response_drop": 0.3, "max_title_tokens": 4}
    world = make_world(HISTORIES, num_item_tokens=num_tokens, user_tokens=user_tokens, **prompt)
    rows = world.rows
    plan = rows.plan(0)
    lengths = rows._sample_lengths(plan.term, plan.brand)
    for sample, (user, start, stop) in enumerate(zip(plan.user, plan.start, plan.stop)):
        term, brand = int(plan.term[sample]), int(plan.brand[sample])
        response = rows.texts.response_tokens(term, brand) if term >= 0 else np.zeros(0, np.int64)
        layout = lay_out(
            rows.texts, np.array(HISTORIES[user][start : stop - 1]), num_item_tokens=num_tokens,
            num_user_tokens=num_tokens * user_tokens, response=response, with_final_marker=True,
        )  # fmt: skip
        assert lengths[sample] == layout.length
    batch = rows.build(plan, np.arange(len(plan.rows)), len(plan.rows))
    assert int((batch.segments > 0).sum()) == lengths.sum() == plan.num_positions


def test_rows_hold_whole_samples_side_by_side_with_places_from_zero(make_world):
    world = make_world(HISTORIES, max_history=8, titled_items=1)
    rows = world.rows
    plan, batch = whole_epoch(rows)
    lengths = rows._sample_lengths(plan.term, plan.brand)
    for number, samples in enumerate(plan.rows):
        segments, places = [], []
        for place, sample in enumerate(samples):
            segments += [place + 1] * lengths[sample]
            places += range(lengths[sample])
        padding = [0] * (world.config.train.row_tokens - len(places))
        assert batch.segments[number].tolist() == segments + padding
        assert batch.places[number].tolist() == places + padding


@pytest.mark.parametrize("prompt", [{"titled_items": -1, "max_title_tokens": 4}, {"titled_items": 0}, {"titled_items": 2}])
@pytest.mark.parametrize("item_layout", ["marked", "fused"])
@pytest.mark.parametrize("user_tokens", [False, True])
def test_batches_equal_the_layouts_of_their_samples_one_by_one(make_world, prompt, item_layout, user_tokens):
    """The slow reference: prompts.lay_out for every sample, its positions shifted to where the sample stands."""
    world = make_world(HISTORIES, user_tokens=user_tokens, max_history=8, response_drop=0.4, item_layout=item_layout, **prompt)
    rows, row_tokens = world.rows, world.config.train.row_tokens
    plan = rows.plan(0)
    chosen = np.arange(len(plan.rows))[::-1]
    batch = rows.build(plan, chosen, len(chosen) + 1)
    expected = {name: [] for name in ("slots", "markers", "targets", "text_positions", "text_labels", "user_slots", "tokens")}
    for place, number in enumerate(chosen):
        base = place * row_tokens
        for sample in plan.rows[number]:
            term, user = int(plan.term[sample]), int(plan.user[sample])
            response = rows.texts.response_tokens(term, int(plan.brand[sample])) if term >= 0 else np.zeros(0, np.int64)
            inputs = np.array(HISTORIES[user][plan.start[sample] : plan.stop[sample] - 1], dtype=np.int64)
            one = lay_out(
                rows.texts, inputs, num_item_tokens=2, num_user_tokens=2 * user_tokens, response=response,
                with_final_marker=True,
            )  # fmt: skip
            expected["slots"] += (base + one.slots).tolist()
            expected["markers"] += (base + one.markers).tolist()
            expected["targets"] += (base + one.conditions[1:]).tolist()
            expected["text_positions"] += (base + one.response_start - 1 + np.arange(len(response))).tolist()
            expected["text_labels"] += response.tolist()
            expected["user_slots"] += [(base + one.user_slots).tolist()] if user_tokens else []
            expected["tokens"] += zip(range(base, base + one.length), one.tokens.tolist())
            base += one.length
    tokens = np.zeros((len(chosen) + 1) * row_tokens, dtype=np.int64)
    for position, token in expected.pop("tokens"):
        tokens[position] = token
    assert np.array_equal(batch.tokens.flatten(), tokens)
    expected["markers"].sort()
    found = {name: getattr(batch, name).tolist() for name in expected}
    assert found | {"markers": sorted(found["markers"])} == expected


def test_text_labels_follow_their_positions_inside_the_response(make_world):
    world = make_world(HISTORIES, max_history=8, response_drop=0.0, titled_items=1)
    plan, batch = whole_epoch(world.rows)
    flat = batch.tokens.flatten()
    assert len(batch.text_labels) and np.array_equal(flat[batch.text_positions + 1], batch.text_labels)
    segments = batch.segments.flatten()
    assert np.array_equal(segments[batch.text_positions], segments[batch.text_positions + 1])
    assert int((batch.text_labels == world.texts.end_token).sum()) == len(plan.user)


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_responses_are_dropped_at_the_rate_asked_for(make_world, drop):
    world = make_world(HISTORIES * 20, response_drop=drop, max_history=4)
    term = world.rows.plan(0).term
    assert float((term < 0).mean()) == pytest.approx(drop, abs=0.06)


def test_a_response_leans_on_the_inputs_of_its_sample_and_never_on_the_target(make_world):
    """Nails, then a lamp as the target (and the other way round): a tie would go to the newer, were the target seen."""
    world = make_world([[0, 1, 5, 5], [1, 0, 5, 5]], response_drop=0.0)
    rows = world.rows
    plan = rows.plan(0)
    assert rows.texts.term_names[plan.term].tolist() == ["Nails", "Lamps"]


def test_leanings_do_not_depend_on_how_many_samples_are_taken_at_a_time(make_world, monkeypatch):
    world = make_world(HISTORIES * 3, max_history=3, titled_items=2)
    whole = world.rows
    monkeypatch.setattr(batches, "LEANING_CHUNK", 2)
    pieces = world.rows
    assert [one.tolist() for one in pieces._leanings] == [one.tolist() for one in whole._leanings]
    assert pieces.plan(0).num_positions == whole.plan(0).num_positions


def test_padding_is_small_on_lengths_as_they_come(make_world):
    """400 users whose history lengths fall off like real ones."""
    draw = np.random.default_rng(0)
    histories = [draw.integers(0, 30, 5 + int(length)).tolist() for length in draw.exponential(8.0, 400)]
    world = make_world(histories, max_history=30)
    world.config.train.row_tokens = 256
    world.config.train.shuffle_shards = 99
    plan = world.rows.plan(0)
    assert plan.padding_ratio(256) < 0.05
    _, batch = whole_epoch(world.rows)
    assert plan.padding_ratio(256) == pytest.approx(float((batch.segments == 0).float().mean()))


def test_a_sample_longer_than_a_row_is_a_named_error(make_world):
    world = make_world(HISTORIES, max_history=30)
    world.config.train.row_tokens = 40
    with pytest.raises(ConfigError, match="train.row_tokens.*40.*the longest sample"):
        world.rows.plan(0)


def test_missing_rows_are_empty_and_shapes_stay(make_world):
    world = make_world(HISTORIES, user_tokens=True)
    rows = world.rows
    plan = rows.plan(0)
    batch = rows.build(plan, np.arange(0), 4)
    assert batch.tokens.shape == (4, world.config.train.row_tokens) and int(batch.segments.sum()) == 0
    full = rows.build(plan, np.arange(1), 4)
    for name, value in vars(batch).items():
        other = getattr(full, name)
        assert value.dtype == other.dtype and value.shape[1:] == other.shape[1:], name


def test_user_latents_are_those_of_the_user_of_each_sample(make_world):
    world = make_world(HISTORIES, user_tokens=True, max_history=8)
    plan, batch = whole_epoch(world.rows)
    users = plan.user[np.concatenate(plan.rows)]
    assert np.array_equal(batch.user_latents.numpy(), world.user_latents[users])
    assert batch.user_slots.shape == (len(users), 2)
    assert (batch.places.flatten()[batch.user_slots[:, 0]] == len(world.texts.instruction)).all()


def test_building_rows_again_gives_the_same_and_leaves_the_plan(make_world):
    world = make_world(HISTORIES, max_history=8)
    rows = world.rows
    plan = rows.plan(0)
    copies = replace(plan, rows=[row.copy() for row in plan.rows])
    first, again = (rows.build(plan, np.array([2, 0]), 2) for _ in range(2))
    assert all((getattr(first, name) == getattr(again, name)).all() for name in vars(first))
    assert all(np.array_equal(one, other) for one, other in zip(plan.rows, copies.rows))

"""model/history_reader.py: the same condition as training, whatever the batch, the cache and the padding."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch

from contrec_dist.data.prompts import lay_out
from contrec_dist.model.history_reader import BatchLayout, HistoryBatch, HistoryReader, lay_out_batch

HISTORIES = [
    [1, 4, 7, 10, 13, 2, 5],
    [3, 6, 9, 12],
    [20, 21, 22, 23, 24, 25, 26, 27, 28, 29],
    [11, 8, 14, 17, 15],
]


@pytest.fixture(params=[{}, {"user_tokens": True}, {"item_layout": "fused"}], ids=["plain", "user_tokens", "fused"])
def world(make_world, request):
    return make_world(HISTORIES, titled_items=2, max_response_tokens=7, **request.param)


@dataclass
class History:
    """One user's history, as a test names it."""

    items: np.ndarray
    latents: np.ndarray
    user_latents: np.ndarray | None = None


def join_histories(histories: list[History]) -> HistoryBatch:
    """Laid end to end."""
    own = None if histories[0].user_latents is None else np.stack([one.user_latents for one in histories])
    items = np.concatenate([one.items for one in histories])
    offsets = np.concatenate([[0], np.cumsum([len(one.items) for one in histories])])
    return HistoryBatch(items, offsets, np.concatenate([one.latents for one in histories]), own)


def make_reader(world, seed=0) -> HistoryReader:
    return HistoryReader(world.build_model(seed), world.texts, world.tokenizer)


def histories_of(world, end=None) -> list[History]:
    """Histories of all users, by default without their two held-out items."""
    found = []
    for user, items in enumerate(HISTORIES):
        items = np.array(items[: len(items) - 2 if end is None else end], dtype=np.int64)
        own = world.user_latents[user] if world.user_latents is not None else None
        found.append(History(items, world.item_latents[items], own))
    return found


def embed_whole(reader, history, response, with_final_marker):
    """Embeddings of one sample as prompts.lay_out lays it out, and where its response starts."""
    layout = lay_out(
        reader.texts, history.items, num_item_tokens=2, num_user_tokens=2 if history.user_latents is not None else 0,
        response=response, with_final_marker=with_final_marker,
    )  # fmt: skip
    whole = BatchLayout(
        layout.length, layout.tokens, np.ones((1, layout.length), bool), layout.markers, layout.slots, layout.user_slots,
        np.array([layout.length - 1]),
    )  # fmt: skip
    return reader._embed(join_histories([history]), whole), layout.response_start


def read_whole(reader, history, response):
    """Condition after a history and a response, in one pass without padding or cache."""
    with torch.no_grad():
        embeddings, _ = embed_whole(reader, history, response, with_final_marker=True)
        return reader.model.backbone.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1]


def test_a_batch_padded_on_the_right_equals_one_by_one(world):
    reader, histories = make_reader(world), histories_of(world)
    together = reader.read(join_histories(histories), reasoning=False)
    alone = torch.cat([reader.read(join_histories([one]), reasoning=False).condition for one in histories])
    torch.testing.assert_close(together.condition, alone, atol=1e-5, rtol=1e-5)
    assert together.reasons == [""] * 4 and together.condition.dtype == torch.float32


def test_a_batch_that_writes_its_reasons_equals_one_by_one(world):
    reader, histories = make_reader(world), histories_of(world)
    together, alone = reader.read(join_histories(histories), reasoning=True), [reader.read(join_histories([one]), reasoning=True) for one in histories]
    assert together.reasons == [one.reasons[0] for one in alone]
    torch.testing.assert_close(together.condition, torch.cat([one.condition for one in alone]), atol=1e-5, rtol=1e-5)


def test_training_and_scoring_give_the_same_condition_for_the_same_history(world):
    """Packed rows of training against the reader, without a response; targets of the newest training item of each user."""
    world.config.prompt.response_drop = 1.0
    model, rows = world.build_model(), world.rows
    plan = rows.plan(0)
    batch = rows.build(plan, np.arange(len(plan.rows)), len(plan.rows))
    with torch.no_grad():
        latents = model.normalise(batch.latents)
        hidden = model._encode_rows(batch, latents, model.items(latents.flatten(1), batch.item_idx)[0])
    order = [int(plan.user[sample]) for row in plan.rows for sample in row]
    counts = np.cumsum([len(HISTORIES[user]) - 3 for user in order])
    packed = hidden[batch.targets][counts - 1]  # the last target of each sample
    histories = [History(one.items[:-1], one.latents[:-1], one.user_latents) for one in histories_of(world)]
    reader = HistoryReader(model, world.texts, world.tokenizer)
    read = reader.read(join_histories([histories[user] for user in order]), reasoning=False).condition
    torch.testing.assert_close(packed, read, atol=1e-5, rtol=1e-5)


def test_training_with_a_response_and_scoring_that_writes_the_same_one_agree(make_world):
    """The sequence around a generated reason is laid out as training lays out its response."""
    world = make_world(HISTORIES, max_response_tokens=7)
    reader = make_reader(world)
    for history in histories_of(world):
        reading, response = read_response(reader, history)
        torch.testing.assert_close(reading.condition, read_whole(reader, history, response), atol=1e-4, rtol=1e-4)


def read_response(reader, history):
    """The reading of one history with its text, and the token numbers that were written."""
    written = []
    decode = reader.tokenizer.batch_decode
    try:
        reader.tokenizer.batch_decode = lambda tokens, **settings: written.append(tokens) or decode(tokens, **settings)
        reading = reader.read(join_histories([history]), reasoning=True)
    finally:
        reader.tokenizer.batch_decode = decode
    return reading, written[0][0].numpy()


def test_the_cache_gives_what_reading_the_whole_sequence_gives(world):
    reader = make_reader(world)
    for history in histories_of(world):
        reading, response = read_response(reader, history)
        torch.testing.assert_close(reading.condition, read_whole(reader, history, response), atol=1e-4, rtol=1e-4)


def test_the_text_is_the_greedy_choice_of_the_llm_at_every_place(world):
    reader = make_reader(world)
    for history in histories_of(world):
        _, response = read_response(reader, history)
        with torch.no_grad():
            embeddings, response_start = embed_whole(reader, history, response, with_final_marker=False)
            hidden = reader.model.backbone.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0]
            choice = reader.model.backbone.lm_head(hidden).argmax(-1).numpy()
        place = response_start - 1 + np.arange(len(response) - 1)
        np.testing.assert_array_equal(response[:-1], choice[place])


def test_a_text_ends_with_the_end_token_and_within_its_limit(world):
    reader = make_reader(world)
    for history in histories_of(world):
        _, response = read_response(reader, history)
        assert response[-1] == reader.texts.end_token and len(response) <= 7



def test_a_row_that_ended_is_no_more_disturbed_by_rows_that_go_on(world):
    """The language head is bent so that rows end at different places; batch and single reading still agree."""
    reader, histories = make_reader(world), histories_of(world)
    end_row = reader.model.backbone.lm_head.weight[reader.texts.end_token].data
    for scale in np.linspace(0.0, 1.0, 21):
        end_row.mul_(1 + scale)
        lengths = {len(read_response(reader, history)[1]) for history in histories}
        if len(lengths) > 1:
            break
    assert len(lengths) > 1, "the toy no longer ends its rows at different places; bend it otherwise"
    together, alone = reader.read(join_histories(histories), reasoning=True), [reader.read(join_histories([one]), reasoning=True) for one in histories]
    assert together.reasons == [one.reasons[0] for one in alone]
    torch.testing.assert_close(together.condition, torch.cat([one.condition for one in alone]), atol=1e-5, rtol=1e-5)


def test_the_newest_item_is_seen(world):
    reader = make_reader(world)
    for history in histories_of(world):
        items = history.items.copy()
        items[-1] = 0
        other = History(items, world.item_latents[items], history.user_latents)
        first, second = (reader.read(join_histories([one]), reasoning=False).condition for one in (history, other))
        assert (first - second).abs().max() > 1e-4


def test_a_history_of_one_item_and_an_empty_one_are_read(world):
    reader = make_reader(world)
    one, none = histories_of(world, end=1)[0], histories_of(world, end=0)[0]
    for reasoning in (False, True):
        together = reader.read(join_histories([one, none]), reasoning=reasoning).condition
        assert torch.isfinite(together).all()
        torch.testing.assert_close(together[1:], reader.read(join_histories([none]), reasoning=reasoning).condition, atol=1e-5, rtol=1e-5)


def test_an_item_that_joined_after_training_is_read_by_its_latents(make_world):
    """The catalogue's texts have grown by an item, number 30; the model has not."""
    world = make_world(HISTORIES, titled_items=1)
    latents = np.concatenate([world.item_latents[[1, 4]], world.item_latents[[7]] + 0.5])
    model = world.build_model()
    world.items = pl.concat([world.items, world.items[7].with_columns(item_idx=pl.lit(30, pl.Int64), title=pl.lit("A new thing"))])
    reader = HistoryReader(model, world.texts, world.tokenizer)
    new, old = (reader.read(join_histories([History(np.array([1, 4, n]), latents)]), reasoning=False).condition for n in (30, 7))
    assert torch.isfinite(new).all() and (new - old).abs().max() > 1e-4


@pytest.mark.parametrize("titled_items", [0, 2, -1])
@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize("with_final_marker", [False, True])
@pytest.mark.parametrize("num_user_tokens", [0, 2])
@pytest.mark.parametrize("item_layout", ["marked", "fused"])
def test_a_batch_is_laid_out_as_one_by_one(
    make_world, titled_items, pad_left, with_final_marker, num_user_tokens, item_layout
):
    """Every position of prompts.lay_out, moved to the row's place; empty histories too."""
    texts = make_world(HISTORIES, titled_items=titled_items, item_layout=item_layout).texts
    histories = [np.array(items, dtype=np.int64) for items in [*HISTORIES, [], [7]]]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in histories])])
    settings = {"num_item_tokens": 3, "num_user_tokens": num_user_tokens, "with_final_marker": with_final_marker}
    got = lay_out_batch(texts, np.concatenate(histories), offsets, **settings, pad_left=pad_left)
    alone = [lay_out(texts, one, response=np.zeros(0, np.int64), **settings) for one in histories]
    assert got.width == max(one.length for one in alone) and got.tokens.shape == (len(histories) * got.width,)
    for row, one in enumerate(alone):
        first = row * got.width + (got.width - one.length if pad_left else 0)
        real = np.flatnonzero(got.real[row]) + row * got.width
        assert real.tolist() == list(range(first, first + one.length)) and got.last[row] == real[-1]
        assert got.tokens[real].tolist() == one.tokens.tolist() and got.tokens[~got.real.ravel()].sum() == 0
        mine = got.markers // got.width == row
        assert sorted(got.markers[mine] - first) == one.markers.tolist()
        assert (got.slots[offsets[row] : offsets[row + 1]] - first).tolist() == one.slots.tolist()
        assert (got.user_slots[row] - first).tolist() == one.user_slots.tolist()

"""retrieval/steady_reader.py: what HistoryReader reads, from matrices of few sizes."""

import numpy as np
import pytest
import torch

from contrec_dist.model.history_reader import HistoryBatch, HistoryReader
from contrec_dist.retrieval.steady_reader import SteadyReader, fill_rows, round_up

LENGTHS = np.random.default_rng(0).integers(1, 40, 37)
HISTORIES = [[int(item) for item in np.random.default_rng(row).integers(0, 30, length)] for row, length in enumerate(LENGTHS)]


PROMPTS = {"titles": {"titled_items": 2}, "user_tokens": {"user_tokens": True}, "fused": {"item_layout": "fused"}}


@pytest.fixture(params=PROMPTS.values(), ids=PROMPTS)
def world(make_world, request):
    return make_world(HISTORIES, **request.param)


def read_both(world, users: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditions of the users by HistoryReader and by SteadyReader, of one model."""
    histories = [np.array(HISTORIES[user]) for user in users]
    items, offsets = np.concatenate(histories), np.concatenate([[0], np.cumsum([len(one) for one in histories])])
    own = None if world.user_latents is None else world.user_latents[list(users)]
    batch, model = HistoryBatch(items, offsets, world.item_latents[items], own), world.build_model()
    readers = [kind(model, world.texts, world.tokenizer) for kind in (HistoryReader, SteadyReader)]
    return tuple(reader.read(batch, reasoning=False).condition for reader in readers)


def test_sizes_are_few_and_at_most_a_sixteenth_too_large():
    sizes = [round_up(size) for size in range(1, 4097)]
    assert all(size <= filled <= size * (1 + 1 / 16) for size, filled in enumerate(sizes, start=1))
    assert len(set(sizes)) == 32 + 16 * 7 and sizes[:32] == list(range(1, 33)) and round_up(0) == 0


def test_rows_are_filled_with_zeros():
    filled = fill_rows(torch.ones(33, 2, 3))
    assert filled.shape == (34, 2, 3) and (filled[:33] == 1).all() and (filled[33:] == 0).all()


@pytest.mark.parametrize("users", [range(1), range(37)], ids=["one", "many"])
def test_conditions_are_those_of_the_plain_reader(world, users):
    plain, steady = read_both(world, users)
    assert steady.shape == plain.shape and (steady - plain).abs().max() < 1e-5


def test_matrix_products_of_many_batches_have_few_sizes(world, monkeypatch):
    """Every batch of 33 to 37 users with other histories; the plain reader meets nearly as many sizes as batches."""
    met = {"plain": set(), "steady": set()}
    linear, now = torch.nn.functional.linear, []

    def note(rows, *arguments):
        met[now[0]].add(tuple(rows.shape[:-1]))
        return linear(rows, *arguments)

    model = world.build_model()
    monkeypatch.setattr(torch.nn.functional, "linear", note)
    for name, kind in (("plain", HistoryReader), ("steady", SteadyReader)):
        reader = kind(model, world.texts, world.tokenizer)
        now[:] = [name]
        for last in range(33, 38):
            items = np.concatenate(HISTORIES[:last])
            offsets = np.concatenate([[0], np.cumsum([len(one) for one in HISTORIES[:last]])])
            own = None if world.user_latents is None else world.user_latents[:last]
            reader.read(HistoryBatch(items, offsets, world.item_latents[items], own), reasoning=False)
    assert len(met["steady"]) < len(met["plain"])

"""baselines/tiger/batches.py and what packing does to the model: nothing."""

import numpy as np
import pytest
import torch

from contrec_dist.baselines.tiger.batches import TokenRows
from contrec_dist.baselines.tiger.semantic_ids import SemanticIds
from contrec_dist.baselines.tiger.sequence_model import SequenceModel
from contrec_dist.config import BackboneConfig, ShapeConfig
from contrec_dist.data.catalog import Histories

LENGTHS = [1, 7, 2, 0, 12, 4, 5]
MAX_HISTORY = 4


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    nobody = np.full(len(LENGTHS), -1, dtype=np.int64)
    histories = Histories(
        offsets=offsets, items=draw.integers(0, 20, offsets[-1]), timestamps=np.zeros(offsets[-1], np.int64),
        num_train=np.array(LENGTHS), validation_pos=nobody, test_pos=nobody,
    )  # fmt: skip
    ids = SemanticIds.from_learned(draw.integers(0, 3, (20, 2)), 3)
    return TokenRows(histories, ids, max_history=MAX_HISTORY, row_tokens=32, user_buckets=0, seed=0)


def make_model(rows, attention):
    torch.manual_seed(0)
    shape = ShapeConfig(hidden_size=32, num_heads=2, intermediate_size=64)
    return SequenceModel(BackboneConfig(shape=shape, precision="fp32", attention=attention), rows.ids).eval()


def test_every_item_after_the_first_is_a_target_once_with_all_its_tokens(rows):
    wanted = sorted(tuple(rows.ids.codes[item]) for user in range(7) for item in rows.histories.training_items(user)[1:])
    found = [tuple(row) for numbers in rows.plan(0, 2) for row in rows.build(numbers).codes.tolist()]
    assert sorted(found) == wanted and len(wanted) == rows.num_targets == sum(max(0, n - 1) for n in LENGTHS)


def test_a_target_is_predicted_from_the_token_before_it(rows):
    for numbers in rows.plan(0, 3):
        batch = rows.build(numbers)
        tokens, levels = batch.tokens.flatten(), rows.ids.num_levels
        following = batch.codes + torch.from_numpy(rows.ids.offsets)
        assert torch.equal(tokens[batch.positions[:, 1:]], following[:, :-1])  # its earlier tokens are read
        assert torch.equal(batch.places.flatten()[batch.positions] % levels, torch.arange(levels).expand(following.shape))
        assert (batch.segments.flatten()[batch.positions] > 0).all()
        assert torch.equal(batch.tokens[batch.segments == 0], torch.zeros_like(batch.tokens[batch.segments == 0]))
        assert torch.equal(batch.tokens == 0, (batch.places == 0) | (batch.segments == 0))


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_packing_changes_no_logit(rows, attention):
    model = make_model(rows, attention)
    [packed] = [rows.build(numbers) for numbers in rows.plan(0, 99)]
    samples = [sample for row in rows.plan(0, 99)[0] for sample in row]
    assert len(packed.tokens) < len(samples)  # rows are shared
    alone = rows.build([np.array([sample]) for sample in samples])
    with torch.no_grad():
        together, apart = (read_targets(model, batch) for batch in (packed, alone))
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.loss(packed), model.loss(alone), atol=1e-5, rtol=1e-4)


def read_targets(model, batch):
    hidden = model.read(batch.tokens, places=batch.places, **model._packed_attention(batch.segments))
    return hidden.flatten(0, 1)[batch.positions]


def test_both_kernels_give_the_same_loss(rows):
    batch = rows.build(rows.plan(0, 8)[0])
    with torch.no_grad():
        losses = [make_model(rows, attention).loss(batch) for attention in ("packed", "sdpa")]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)


def test_the_order_is_a_function_of_seed_and_epoch(rows):
    flat = lambda plan: [sample for batch in plan for row in batch for sample in row.tolist()]  # noqa: E731
    assert flat(rows.plan(3, 2)) == flat(rows.plan(3, 2)) != flat(rows.plan(4, 2))
    assert sorted(flat(rows.plan(3, 2))) == list(range(len(rows.user)))


def test_rows_are_raised_to_the_longest_sample(rows):
    narrow = TokenRows(rows.histories, rows.ids, max_history=MAX_HISTORY, row_tokens=1, user_buckets=0, seed=0)
    assert narrow.row_tokens == (MAX_HISTORY + 1) * 3

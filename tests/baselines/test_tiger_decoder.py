"""baselines/tiger/decoder.py: beam search against log p of every item by whole forward passes."""

import numpy as np
import pytest
import torch

from contrec_dist.baselines.tiger.decoder import TigerDecoder
from contrec_dist.baselines.tiger.semantic_ids import SemanticIds
from contrec_dist.baselines.tiger.sequence_model import SequenceModel, first_tokens
from contrec_dist.config import BackboneConfig, ShapeConfig

NUM_ITEMS, MAX_HISTORY = 40, 5
SHAPE = ShapeConfig(hidden_size=32, num_heads=2, intermediate_size=64)
HISTORIES = [np.array(one, dtype=np.int64) for one in ([3], [39, 0, 7, 7], [], [1, 2, 3, 4, 5, 6, 8], [11, 12])]


def make_model(ids, user_buckets=0):
    torch.manual_seed(0)
    model = SequenceModel(BackboneConfig(shape=SHAPE, precision="fp32"), ids, user_buckets=user_buckets).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)  # far from uniform, so that the order means something
    return model


@pytest.fixture(scope="module")
def world():
    ids = SemanticIds.from_learned(np.random.default_rng(0).integers(0, 4, (NUM_ITEMS, 2)), 4)
    model = make_model(ids)
    return ids, model, np.stack([score_all(model, ids, history) for history in HISTORIES])


def score_all(model, ids, history, user=0, user_buckets=0):
    """log p of every item: one whole pass an item, no cache. -> (N,)"""
    start = first_tokens(ids, np.array([user]), user_buckets)
    tokens = np.concatenate([start, ids.tokens[history[-MAX_HISTORY:]].ravel()])
    rows = torch.tensor(np.stack([np.concatenate([tokens, own]) for own in ids.tokens]))
    length = rows.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(rows), 1, -1, -1)
    with torch.no_grad():
        hidden = model.read(rows, mask=causal, places=torch.arange(length).expand(rows.shape))
        total = 0
        for level in range(ids.num_levels):
            log_p = model.logits(hidden[:, len(tokens) - 1 + level], level).log_softmax(-1)
            total = total + log_p[torch.arange(NUM_ITEMS), torch.from_numpy(ids.codes[:, level])]
    return total.numpy()


def make_decoder(model, ids, beam_width, **settings):
    return TigerDecoder(model, ids, max_history=MAX_HISTORY, beam_width=beam_width, **settings)


@pytest.mark.parametrize("batch_users", [1, 2, 5])
def test_a_beam_as_wide_as_the_catalogue_gives_the_exact_order(world, batch_users):
    ids, model, log_p = world
    items, scores = make_decoder(model, ids, NUM_ITEMS, batch_users=batch_users).recommend(HISTORIES, NUM_ITEMS)
    expected = np.argsort(-log_p, axis=1, kind="stable")
    np.testing.assert_allclose(scores, np.take_along_axis(log_p, expected, axis=1), atol=2e-4)
    np.testing.assert_allclose(np.take_along_axis(log_p, items, axis=1), scores, atol=2e-4)
    assert all(sorted(row) == list(range(NUM_ITEMS)) for row in items)


def test_narrow_beams_give_items_of_the_catalogue_with_their_own_log_p(world):
    ids, model, log_p = world
    for width in (1, 3, 10):
        items, scores = make_decoder(model, ids, width).recommend(HISTORIES, width)
        assert (items >= 0).all() and all(len(set(row)) == width for row in items)
        np.testing.assert_allclose(np.take_along_axis(log_p, items, axis=1), scores, atol=2e-4)
        assert (np.diff(scores, axis=1) <= 0).all()


def test_log_p_of_all_ids_and_of_none_other_sums_to_at_most_one(world):
    _, _, log_p = world
    mass = np.exp(log_p.astype(np.float64)).sum(axis=1)
    assert (mass <= 1 + 1e-5).all() and log_p.std(axis=1).min() > 0.5


def test_past_the_end_is_minus_one(world):
    ids, model, _ = world
    items, scores = make_decoder(model, ids, 4).recommend(HISTORIES, NUM_ITEMS + 3)
    assert (items[:, -3:] == -1).all() and np.isneginf(scores[:, -3:]).all() and (items[:, :-3] >= 0).all()


def test_only_the_newest_items_count(world):
    ids, model, _ = world
    decoder = make_decoder(model, ids, 10)
    whole, cut = decoder.recommend([HISTORIES[3], HISTORIES[3][-MAX_HISTORY:]], 10)[0]
    assert whole.tolist() == cut.tolist()


def test_the_same_users_get_the_same_again_and_histories_are_not_modified(world):
    ids, model, _ = world
    kept = [history.copy() for history in HISTORIES]
    first, second = (make_decoder(model, ids, 6).recommend(HISTORIES, 6) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert all(np.array_equal(one, other) for one, other in zip(kept, HISTORIES))


def test_user_tokens_are_read():
    ids = SemanticIds.from_learned(np.random.default_rng(0).integers(0, 4, (NUM_ITEMS, 2)), 4)
    model = make_model(ids, user_buckets=16)
    decoder = make_decoder(model, ids, NUM_ITEMS, user_buckets=16)
    users = np.array([0, 5])
    items, scores = decoder.recommend([HISTORIES[0]] * 2, NUM_ITEMS, users)
    for row, user in enumerate(users):
        log_p = score_all(model, ids, HISTORIES[0], user, 16)
        np.testing.assert_allclose(log_p[items[row]], scores[row], atol=2e-4)
    assert not np.allclose(scores[0], scores[1], atol=1e-3)

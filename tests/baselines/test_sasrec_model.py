"""baselines/sasrec: the model, its windows and its losses."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from contrec_dist.baselines.sasrec import recommender
from contrec_dist.baselines.sasrec.batches import Windows, pad_newest
from contrec_dist.baselines.sasrec.fit import Negatives, sum_full_losses, sum_sampled_losses
from contrec_dist.baselines.sasrec.model import SasRec
from contrec_dist.baselines.sasrec.recommender import SasRecRecommender, Validation, rank_unseen, read_queries
from contrec_dist.config import SasRecConfig
from contrec_dist.data.catalog import Histories
from contrec_dist.errors import ConfigError

NUM_ITEMS, MAX_HISTORY, TEXT_DIM = 25, 6, 5
LENGTHS = [1, 7, 2, 0, 20, 4, 5, 3, 3]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def make_model(*, text=False, known=None, temperature=0.0):
    torch.manual_seed(0)
    features = torch.randn(NUM_ITEMS, TEXT_DIM) if text else None
    known = torch.ones(NUM_ITEMS, dtype=torch.bool) if known is None else known
    own = {"text_temperature" if text else "temperature": temperature}
    config = SasRecConfig(hidden_size=16, intermediate_size=32, text_hidden_size=12, **own)
    model = SasRec(config, known, MAX_HISTORY, features).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # far from uniform
    return model


@pytest.fixture(scope="module")
def windows():
    draw, nobody = np.random.default_rng(0), np.full(len(LENGTHS), -1)
    histories = Histories(
        offsets=np.concatenate([[0], np.cumsum(LENGTHS)]), items=draw.integers(0, NUM_ITEMS - 1, sum(LENGTHS)),
        timestamps=np.zeros(sum(LENGTHS), np.int64), num_train=np.array(LENGTHS), validation_pos=nobody, test_pos=nobody,
    )  # fmt: skip
    return histories, Windows(histories, max_history=MAX_HISTORY, batch_targets=12, seed=0)


def read(model, rows, width=None):
    """Queries of rows of items, padded to `width`. -> (B, W, D)"""
    inputs, lengths = pad_newest([np.array(row) for row in rows], MAX_HISTORY)
    inputs = F.pad(inputs, (0, (width or inputs.shape[1]) - inputs.shape[1]), value=NUM_ITEMS - 1)
    ages = (lengths[:, None] - 1 - torch.arange(inputs.shape[1])).clamp(min=0)
    with torch.no_grad():
        return model.read(model.item_vectors()[inputs], ages)


def test_a_later_item_changes_no_earlier_query():
    model = make_model(text=True)
    first, second = read(model, [[1, 2, 3, 4, 5]])[0], read(model, [[1, 2, 3, 9, 8]])[0]
    torch.testing.assert_close(first[:3], second[:3], rtol=0, atol=0)
    assert (first[3:] - second[3:]).abs().min(dim=1).values.max() > 1e-4
    assert (first[3:] != second[3:]).any(dim=1).all()


def test_every_earlier_item_and_its_place_reach_the_query():
    model = make_model()
    newest = read(model, [[1, 2, 3, 4], [9, 2, 3, 4], [2, 1, 3, 4]])[:, 3]
    assert (newest[0] - newest[1]).abs().max() > 1e-3 and (newest[0] - newest[2]).abs().max() > 1e-3


def test_padding_and_neighbours_in_a_batch_change_nothing():
    model, rows = make_model(), [[3], [4, 5, 6], [7, 8, 9, 10, 11, 12], [1, 2]]
    together = read(model, rows)
    for row, items in enumerate(rows):
        for width in (len(items), MAX_HISTORY):
            alone = read(model, [items], width)[0, : len(items)]
            torch.testing.assert_close(together[row, : len(items)], alone, **CLOSE)


def test_queries_of_histories_are_those_of_their_newest_items_whatever_the_batch():
    model = make_model(text=True)
    histories = [np.arange(length) % NUM_ITEMS for length in (9, 1, 6, 3, 12)]
    vectors = model.catalogue().numpy()
    for batch_users in (1, 2, 5):
        queries = read_queries(model, vectors, histories, batch_users)
        for query, history in zip(queries, histories):
            np.testing.assert_allclose(query, read(model, [history[-MAX_HISTORY:]])[0, -1], atol=1e-5)


def test_every_item_after_the_first_is_a_target_once_and_follows_its_input(windows):
    histories, plan = windows
    pairs = []
    for step in plan.plan(0):
        batch = plan.build(step)
        pairs += zip(batch.inputs[batch.real].tolist(), batch.targets.tolist())
    training = [histories.training_items(user).tolist() for user in range(len(LENGTHS))]
    assert sorted(pairs) == sorted(pair for items in training for pair in zip(items, items[1:]))
    assert len(pairs) == plan.num_targets


def test_rows_hold_whole_windows_whose_newest_item_has_age_zero(windows):
    plan = windows[1]
    batch = plan.build(np.arange(len(plan.lengths)))
    assert len(batch.inputs) == 1 and batch.inputs.shape[1] == plan.row_items >= 2 * MAX_HISTORY
    found = []
    for number in range(1, int(batch.segments.max()) + 1):
        places = torch.nonzero(batch.segments[0] == number)[:, 0]
        assert torch.equal(batch.ages[0, places], len(places) - 1 - torch.arange(len(places)))
        found.append(batch.inputs[0, places].tolist())
    wanted = [plan.items[first : first + length].tolist() for first, length in zip(plan.first, plan.lengths)]
    assert sorted(found) == sorted(wanted) and max(map(len, found)) == MAX_HISTORY


def test_steps_are_a_function_of_seed_and_epoch_and_hold_about_as_many_targets_as_asked(windows):
    plan = windows[1]
    flat = lambda epoch: np.concatenate(plan.plan(epoch)).tolist()  # noqa: E731
    assert flat(3) == flat(3) != flat(4) and sorted(flat(3)) == list(range(len(plan.lengths)))
    sizes = [plan.lengths[step].sum() for step in plan.plan(0)]
    assert max(sizes) <= 12 + MAX_HISTORY and len(sizes) == -(-plan.num_targets // 12)


def whole_batch(windows):
    return windows[1].build(np.arange(len(windows[1].lengths)))


def losses_by_torch(model, plan):
    """Sum over targets, window by window, from all logits."""
    vectors, total = model.item_vectors(), 0.0
    for first, length in zip(plan.first, plan.lengths):
        items = torch.from_numpy(plan.items[first : first + length + 1])
        ages = torch.arange(length - 1, -1, -1)[None]
        queries = model.read(vectors[items[None, :-1]], ages)[0]
        total = total + F.cross_entropy(queries @ vectors.T, items[1:], reduction="sum")
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters()}


@pytest.mark.parametrize("temperature", [0.0, 0.2])
@pytest.mark.parametrize("text", [False, True])
def test_packed_windows_give_torchs_loss_on_all_logits_of_each_alone_and_its_gradients(windows, text, temperature):
    model = make_model(text=text, temperature=temperature)
    ours, theirs = sum_full_losses(model, whole_batch(windows)), losses_by_torch(model, windows[1])
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(gradients(model, ours), gradients(model, theirs), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 0.2])
@pytest.mark.parametrize("text", [False, True])
def test_all_items_as_negatives_give_the_full_loss(windows, text, temperature):
    model, batch = make_model(text=text, temperature=temperature), whole_batch(windows)
    config = SasRecConfig(num_negatives=NUM_ITEMS + 7, negative_power=1.0)
    negatives = Negatives(np.arange(NUM_ITEMS), np.ones(NUM_ITEMS, bool), config, seed=0)
    sampled, full = sum_sampled_losses(model, batch, *negatives.draw((0, 0))), sum_full_losses(model, batch)
    torch.testing.assert_close(sampled, full, **CLOSE)
    torch.testing.assert_close(gradients(model, sampled), gradients(model, full), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_drawn_negatives_estimate_the_full_loss_however_they_are_drawn(windows, power):
    model, batch, num_train = make_model(), whole_batch(windows), np.arange(NUM_ITEMS) * 3
    config = SasRecConfig(num_negatives=NUM_ITEMS - 1, negative_power=power)
    negatives = Negatives(num_train, np.ones(NUM_ITEMS, bool), config, seed=0)
    draws = [negatives.draw((0, step)) for step in range(200)]
    with torch.no_grad():
        full = sum_full_losses(model, batch).item()
        drawn = np.mean([sum_sampled_losses(model, batch, items, share).item() for items, share in draws])
        uncorrected = np.mean([sum_sampled_losses(model, batch, items, share * 0).item() for items, share in draws])
    assert abs(drawn / full - 1) < 0.04  # the logarithm of an estimate is a little below the logarithm
    assert (uncorrected == drawn) == (power == 0) and abs(uncorrected / full - 1) >= abs(drawn / full - 1)


def test_negatives_follow_the_power_of_popularity():
    num_train = np.array([0, 99, 9, 0, 399])
    for power in (0.0, 0.5):
        config = SasRecConfig(num_negatives=9999, negative_power=power)
        negatives = Negatives(np.tile(num_train, 2000), np.ones(10_000, bool), config, seed=0)
        items, log_share = negatives.draw((0, 1))
        expected = (num_train + 1.0) ** power / ((num_train + 1.0) ** power).mean()
        np.testing.assert_allclose(log_share, np.log(expected)[items % 5], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.bincount(items % 5, minlength=5) / 9999, expected / 5, atol=0.02)
        assert torch.equal(items, negatives.draw((0, 1))[0]) and not torch.equal(items, negatives.draw((1, 1))[0])


def test_with_text_items_that_training_never_met_are_their_text_alone_and_nobodys_negatives(windows):
    known = torch.bincount(torch.from_numpy(windows[1].items), minlength=NUM_ITEMS) > 0
    known[24] = False
    batch, config = whole_batch(windows), SasRecConfig(num_negatives=NUM_ITEMS, negative_power=1.0)
    assert not (batch.targets == 24).any() and not (batch.inputs == 24).any()
    fresh = SasRec(SasRecConfig(), known, MAX_HISTORY, torch.randn(NUM_ITEMS, TEXT_DIM)).eval()
    torch.testing.assert_close(fresh.item_vectors()[24], fresh.read_text(fresh.text[24]), rtol=1e-5, atol=1e-7)
    assert (fresh.items.weight[known] != 0).all()

    model, plain = make_model(text=True, known=known), make_model(known=known)
    negatives = Negatives(np.ones(NUM_ITEMS), known.numpy(), config, seed=0)
    full, sampled = sum_full_losses(model, batch), sum_sampled_losses(model, batch, *negatives.draw((0, 0)))
    torch.testing.assert_close(sampled, full, **CLOSE)
    for loss in (full, sampled):
        assert (gradients(model, loss)["items.weight"][24] == 0).all()
    assert (gradients(plain, sum_full_losses(plain, batch))["items.weight"][24] != 0).any()


def test_text_reaches_the_logits_as_input_and_as_output():
    model = make_model(text=True)
    before = model.catalogue().clone()
    reading = read(model, [[3, 4]])[0, -1]
    model.text[4] += 1.0
    after = model.catalogue()
    assert (after[4] - before[4]).abs().max() > 1e-3
    torch.testing.assert_close(torch.cat([after[:4], after[5:]]), torch.cat([before[:4], before[5:]]), rtol=0, atol=0)
    assert (read(model, [[3, 4]])[0, -1] - reading).abs().max() > 1e-3
    torch.testing.assert_close(model.item_vectors(torch.tensor([4, 0])), after[[4, 0]], **CLOSE)


@pytest.mark.parametrize("text", [False, True])
def test_with_a_temperature_logits_are_cosines_over_it_whatever_the_lengths(text):
    model, plain = make_model(text=text, temperature=0.25), make_model(text=text)
    torch.testing.assert_close(model.catalogue(), F.normalize(plain.catalogue(), dim=-1), **CLOSE)
    inputs, ages = torch.tensor([[3, 4]]), torch.tensor([[1, 0]])
    with torch.no_grad():
        unit = plain.read(model.catalogue()[inputs], ages)[0, -1]  # the same transformer, not normalised at its end
    expected = F.cosine_similarity(unit[None], plain.catalogue(), dim=-1) / 0.25
    torch.testing.assert_close(model.catalogue() @ read(model, [[3, 4]])[0, -1], expected, **CLOSE)
    if not text:
        model.items.weight.data[7] *= 5
        torch.testing.assert_close(model.catalogue() @ read(model, [[3, 4]])[0, -1], expected, **CLOSE)


def test_lists_are_sorted_by_logit_and_users_without_history_get_the_popular_ones():
    model, num_train = make_model(), np.arange(NUM_ITEMS)[::-1]
    histories = [np.array([1, 2, 3]), np.zeros(0, dtype=np.int64), np.array([4])]
    items, scores = SasRecRecommender(model, num_train, batch_users=2).recommend(histories, NUM_ITEMS + 1, np.arange(3))
    for row in (0, 2):
        logits = (read(model, [histories[row]])[0, -1] @ model.catalogue().T).numpy()
        assert np.array_equal(items[row, :-1], np.argsort(-logits, kind="stable")) and items[row, -1] == -1
        np.testing.assert_allclose(scores[row, :-1], np.sort(logits)[::-1], atol=1e-5)
    assert items[1].tolist() == [*range(NUM_ITEMS), -1]


def test_ranks_are_among_unseen_items_with_ties_by_lower_index():
    scores = torch.tensor([[5.0, 4.0, 4.0, 1.0], [5.0, 4.0, 4.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    histories = [np.array([0]), np.array([3, 3]), np.array([2])]
    assert rank_unseen(scores, torch.tensor([2, 1, 2]), histories).tolist() == [2, 2, 0]  # the last target was seen


def test_the_figure_is_the_same_in_chunks_of_any_size(windows, monkeypatch):
    histories, _ = windows
    last = histories.lengths - 1
    asked = Histories(**{name: getattr(histories, name) for name in histories.__slots__} | {"validation_pos": last})
    monkeypatch.setattr(recommender, "CHUNK_USERS", 1)
    figures = []
    for scores in (1, 3 * NUM_ITEMS, 2**20):
        monkeypatch.setattr(recommender, "CHUNK_SCORES", scores)
        figures.append(Validation(asked, 0, 4).measure(make_model()))
    assert figures[0] == pytest.approx(figures[1], abs=1e-9) == pytest.approx(figures[2], abs=1e-9) and 0 < figures[0] < 1


def test_settings_that_mean_nothing_are_refused_by_name():
    for settings, key in (
        ({"num_heads": 3}, "hidden_size"), ({"patience": 0}, "patience"), ({"max_history": 0}, "max_history"),
        ({"temperature": -0.1}, "temperature"), ({"text_temperature": -1}, "text_temperature"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"sasrec.{key}"):
            SasRecConfig(**settings)

"""model/losses.py: signs, bounds, hand-computed values, and equality with plain torch, gradients included."""

import math

import pytest
import torch
from torch.nn import functional

from contrec_dist.model.losses import (
    catalogue_cross_entropy,
    dispersive_loss,
    sampled_cross_entropy,
    token_cross_entropy,
)


def random_catalogue(num_rows=7, num_items=40, width=5, seed=0):
    """query, vectors, bias (with gradients) and targets."""
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=draw) for shape in ((num_rows, width), (num_items, width), (num_items,))]
    target = torch.randint(num_items, (num_rows,), generator=draw)
    return *[one.requires_grad_() for one in tensors], target


def test_dispersive_loss_is_smaller_for_a_batch_that_is_more_spread():
    draw = torch.Generator().manual_seed(0)
    base, noise = torch.randn(1, 16, generator=draw), torch.randn(32, 16, generator=draw)
    losses = [float(dispersive_loss(base + spread * noise, tau=0.5)) for spread in (0.0, 0.1, 0.5, 2.0)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5


def test_collapse_is_the_maximum_of_the_dispersive_loss_and_descent_leads_away_from_it():
    collapsed = torch.ones(8, 6) * torch.arange(6.0)
    assert float(dispersive_loss(collapsed, tau=0.5)) == pytest.approx(0.0, abs=1e-6)
    h = (collapsed + 0.01 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    before = dispersive_loss(h, tau=0.5)
    before.backward()
    after = h.detach() - 0.1 * h.grad / h.grad.norm()
    assert torch.pdist(after).mean() > torch.pdist(h.detach()).mean()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("tau", [0.01, 0.5, 10.0])
def test_dispersive_loss_is_bounded_by_log_of_one_over_batch_and_zero(scale, tau):
    h = scale * torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    assert math.log(1 / 16) - 1e-5 <= float(dispersive_loss(h, tau)) <= 1e-6


def test_dispersive_loss_equals_its_formula_over_all_pairs():
    h = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    normal = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    pairs = [math.exp(-float((a - b).square().sum()) / (4 * 0.7)) for a in normal for b in normal]
    assert float(dispersive_loss(h, tau=0.7)) == pytest.approx(math.log(sum(pairs) / 25), abs=1e-5)


def test_dispersive_loss_is_computed_in_fp32_inside_autocast():
    h = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dispersive_loss(h, tau=0.05)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, dispersive_loss(h, tau=0.05), atol=0, rtol=0)


def test_losses_of_an_empty_batch_are_zero_and_still_reach_their_inputs():
    h = torch.zeros(0, 4, requires_grad=True)
    vectors, bias = torch.randn(6, 4), torch.zeros(6)
    total = dispersive_loss(h, 0.5) + catalogue_cross_entropy(h, vectors, bias, torch.zeros(0, dtype=torch.int64))
    total.backward()
    assert float(total.detach()) == 0.0 and h.grad is not None


@pytest.mark.parametrize("max_logits", [1, 40, 3 * 40, 1 << 25])
def test_catalogue_cross_entropy_in_chunks_equals_plain_torch_with_gradients(max_logits):
    query, vectors, bias, target = random_catalogue()
    expected = functional.cross_entropy(query @ vectors.T + bias, target, reduction="sum")
    wanted = torch.autograd.grad(expected, (query, vectors, bias))
    loss = catalogue_cross_entropy(query, vectors, bias, target, max_logits=max_logits)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    for got, reference in zip(torch.autograd.grad(loss, (query, vectors, bias)), wanted):
        torch.testing.assert_close(got, reference, atol=1e-5, rtol=1e-5)


def test_catalogue_cross_entropy_in_chunks_keeps_no_logits_for_the_backward_pass():
    def largest_saved(max_logits):
        query, vectors, bias, target = random_catalogue(num_rows=50)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.numel()) or one, lambda one: one):
            catalogue_cross_entropy(query, vectors, bias, target, max_logits=max_logits)
        return max(sizes)

    gradients = 50 * 5, 40 * 5, 40
    assert largest_saved(1 << 25) == max(gradients)
    assert largest_saved(5 * 40) == max(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_cross_entropy_equals_torch_and_leaves_the_logits(dtype):
    draw = torch.Generator().manual_seed(4)
    logits = (3 * torch.randn(33, 50, generator=draw)).to(dtype).requires_grad_()
    target = torch.randint(50, (33,), generator=draw)
    before = logits.detach().clone()
    ours = token_cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(2.0 * ours, logits)
    wide = before.float().requires_grad_()
    expected = functional.cross_entropy(wide, target, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(2.0 * expected, wide)
    torch.testing.assert_close(ours, expected)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient.float(), expected_gradient, atol=tolerance, rtol=tolerance)
    assert torch.equal(logits.detach(), before)


def test_cross_entropies_work_row_block_by_row_block_in_fp32(monkeypatch):
    query, vectors, bias, target = random_catalogue(num_rows=13)
    whole = catalogue_cross_entropy(query, vectors, bias, target)
    monkeypatch.setattr("contrec_dist.model.losses.CACHED_LOGITS", 3 * 40)
    torch.testing.assert_close(catalogue_cross_entropy(query, vectors, bias, target), whole)


def test_sampled_cross_entropy_equals_a_hand_computed_value():
    """2 negatives stand for 8 items: log 4 is added to each; the negative that is the target is left out."""
    query, positive = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.5, 9.0], [9.0, 1.0]])
    negatives, negative_bias = torch.tensor([[1.0, 1.0], [-1.0, 0.5]]), torch.tensor([0.1, 0.2])
    loss = sampled_cross_entropy(
        query, positive, torch.tensor([0.3, -0.5]), torch.tensor([5, 6]), negatives, negative_bias, torch.tensor([2, 6]), 8
    )
    first_own, first = 0.8, [1.1 + math.log(4), -0.8 + math.log(4)]
    second_own, second = 1.5, [2.1 + math.log(4)]
    expected = math.log(sum(map(math.exp, [first_own, *first]))) - first_own
    expected += math.log(sum(map(math.exp, [second_own, *second]))) - second_own
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def sampled_from(query, vectors, bias, target, negative_idx):
    return sampled_cross_entropy(
        query, vectors[target], bias[target], target, vectors[negative_idx], bias[negative_idx], negative_idx, len(vectors)
    )


def test_sampled_cross_entropy_with_the_whole_catalogue_as_negatives_is_the_full_one():
    query, vectors, bias, target = random_catalogue()
    sampled = sampled_from(query, vectors, bias, target, torch.arange(len(vectors)))
    torch.testing.assert_close(sampled, catalogue_cross_entropy(query, vectors, bias, target), atol=1e-5, rtol=1e-6)


def test_sampled_cross_entropy_approaches_the_full_one_with_more_negatives():
    query, vectors, bias, target = random_catalogue()
    query, vectors, bias = (one.detach() for one in (query, vectors, bias))
    full, draw = float(catalogue_cross_entropy(query, vectors, bias, target)), torch.Generator().manual_seed(4)

    def mean_error(count):
        draws = [torch.randint(len(vectors), (count,), generator=draw) for _ in range(50)]
        return sum(abs(float(sampled_from(query, vectors, bias, target, one)) - full) for one in draws) / 50

    errors = [mean_error(count) for count in (4, 32, 512)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * full

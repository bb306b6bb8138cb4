"""benchmarks/flops.py: the formula against PyTorch's own count of what forward and backward multiply."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from contrec_dist.benchmarks.flops import BatchCounts, training_flops
from contrec_dist.model import packed_attention
from contrec_dist.model.backbone import add_adapters, causal_lm

HISTORIES = [list(range(1, 14)), [3, 6, 9, 12], list(range(15, 30)), [11, 8, 14, 17, 15, 2, 4], [5, 9]]
TERMS = ("lm", "negative", "diffusion", "dispersive")


@pytest.fixture(params=["eager", "packed"])
def world(request, make_world, monkeypatch):
    """A world whose attention is made of plain products at every length, which the counter sees on every device."""
    monkeypatch.setattr(packed_attention, "LONGEST_BY_HAND", 512)
    world = make_world(HISTORIES, titled_items=-1, response_drop=0.0)
    world.config.backbone.attention = request.param
    return world


def build(world, rows=2):
    """(model in training mode, batch of all samples)."""
    plan = world.rows.plan(0)
    plan = replace(plan, rows=[np.concatenate(plan.rows[0::2]), np.concatenate(plan.rows[1::2])] if len(plan.rows) > 1 else plan.rows)
    world.config.train.row_tokens = 512
    return world.build_model().train(), world.rows.build(plan, np.arange(len(plan.rows)), rows)


def count(model, batch, terms=TERMS) -> float:
    """What PyTorch counts in forward and backward."""
    with FlopCounterMode(display=False) as counter:
        out = model(batch, 0)
        sum(out[name] for name in terms).backward()
    return counter.get_total_flops()


def formula(model, batch) -> dict[str, float]:
    return training_flops(model, BatchCounts.of(model, batch))


def test_flops_of_a_step_equal_what_pytorch_counts(world):
    model, batch = build(world)
    assert sum(formula(model, batch).values()) == pytest.approx(count(model, batch), rel=0.02)


def test_flops_with_adapters_leave_out_the_gradients_of_frozen_weights(world):
    model, batch = build(world)
    whole = formula(model, batch)["backbone"]
    world.config.backbone.lora.rank = 4
    model.backbone = add_adapters(model.backbone, world.config.backbone.lora).train()
    adapted = formula(model, batch)
    assert sum(adapted.values()) == pytest.approx(count(model, batch), rel=0.02)
    assert adapted["backbone"] < 0.9 * whole


def test_flops_with_sampled_negatives_and_few_drawn_targets_equal_what_pytorch_counts(world):
    world.config.loss.num_negatives = 8
    world.config.head.max_targets = 5
    model, batch = build(world)
    assert sum(formula(model, batch).values()) == pytest.approx(count(model, batch), rel=0.03)


def test_the_part_of_the_head_is_what_its_losses_add(world):
    model, batch = build(world)
    whole = count(model, batch)
    model.head.losses = lambda *_: {"diffusion": torch.zeros(()), "dispersive": torch.zeros(())}
    model.zero_grad()
    assert formula(model, batch)["head"] == pytest.approx(whole - count(model, batch), rel=0.02)


def test_attention_inside_samples_is_counted_by_their_own_squares(world):
    model, batch = build(world)
    pairs = BatchCounts.of(model, batch).attention_pairs
    if causal_lm(model.backbone).config._attn_implementation == "eager":
        assert pairs == 2 * 512**2
    else:
        lengths = torch.cat([torch.bincount(row)[1:] for row in batch.segments])
        assert int(lengths.square().sum()) <= pairs < 2 * 512**2 / 2

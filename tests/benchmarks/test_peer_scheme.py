"""benchmarks/peer_scheme.py computes what our model computes, so that only the scheme is compared."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from contrec_dist.benchmarks.peer_scheme import IGNORED, PROMPT_TOKENS, PeerBatch, PeerSamples, measure_peer, peer_losses
from contrec_dist.model.backbone import causal_lm

TWO_ITEMS = [[4, 7, 1, 2], [9, 3, 5, 6], [20, 28, 0, 1]]  # the last two are held out: one input and one target remain
LONG = [list(range(1, 14)), [3, 6, 9, 12, 5, 7], list(range(15, 30))]
CPU = torch.device("cpu")


def make(make_world, histories, attention="sdpa"):
    """(world, model in eval mode, samples of the peer)."""
    world = make_world(histories, titled_items=-1, response_drop=0.0)
    world.config.prompt.max_history = 20
    world.config.backbone.attention = attention
    world.config.train.row_tokens = 1024
    return world, world.build_model(), PeerSamples(world.config, world.rows)


def pack(world):
    """All windows in one row of ours, in the order of the plan."""
    rows = world.rows
    plan = replace(rows.plan(0), rows=[np.arange(len(rows.sample_user))])
    return rows.build(plan, np.arange(1), 1)


def read_hidden(model, batch):
    """Hidden states of packed rows. -> (R * L, D)"""
    latents = model.normalise(batch.latents)
    vectors, _ = model.items(latents.flatten(1), batch.item_idx)
    return model._encode_rows(batch, latents, vectors)


@pytest.mark.parametrize("attention", ["sdpa", "packed", "eager"])
def test_losses_of_samples_with_one_target_equal_ours(make_world, attention):
    world, model, samples = make(make_world, TWO_ITEMS, attention)
    batch = PeerBatch.of([samples.read_window(window) for window in range(3)], CPU)
    with torch.no_grad():
        theirs, ours = peer_losses(model, batch, 7), model(pack(world), 7)
    assert int(ours["num_targets"]) == 3 and float(ours["lm"]) > 0
    for name in ("lm", "diffusion", "dispersive"):
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-4, rtol=1e-4)


def test_logits_and_conditions_of_long_samples_equal_ours(make_world):
    world, model, samples = make(make_world, LONG)
    batch, packed = PeerBatch.of([samples.read_window(window) for window in range(3)], CPU), pack(world)
    with torch.no_grad():
        theirs, hidden = peer_losses(model, batch, 0), read_hidden(model, packed)
        logits = causal_lm(model.backbone).get_output_embeddings()(hidden[packed.text_positions])
    assert theirs["logits"].shape == (3, PROMPT_TOKENS, logits.shape[1])
    torch.testing.assert_close(theirs["logits"][batch.labels != IGNORED], logits, atol=1e-4, rtol=1e-4)
    last = np.cumsum([len(sample.items) - 1 for sample in batch.samples]) - 1
    torch.testing.assert_close(theirs["condition"], hidden[packed.targets[last]], atol=1e-4, rtol=1e-4)


def test_a_user_is_one_sample_of_the_newest_twenty_items_and_their_last_one_as_target(make_world):
    history = [item % 30 for item in range(40)]
    world, _, samples = make(make_world, [history, [3, 6, 9, 12]])
    world.config.prompt.max_history = 50
    assert len(samples.order) == 2
    read = {len(sample.items): sample for sample in map(samples.read, range(2))}
    assert read[21].items.tolist() == history[17:38] and read[2].items.tolist() == [3, 6]  # two are held out
    assert all(sample.layout.length < PROMPT_TOKENS for sample in read.values())


class OpenData:
    """What measure_peer needs of TrainingData, over a hand-made world."""

    def __init__(self, world):
        self.rows, self.build_model = world.rows, lambda config: world.build_model()


def test_the_best_batch_size_of_the_peer_is_the_one_reported(make_world):
    world, _, _ = make(make_world, LONG)
    settings = {"num_steps": 1, "num_repeats": 2, "num_warmup": 1}
    found = measure_peer(world.config, OpenData(world), batch_sizes=[1, 3], **settings)
    rates = {size: found["by_batch_size"][size]["targets_per_second"] for size in ("1", "3")}
    assert found["targets_per_second"] == max(rates.values()) == rates[str(found["batch_size"])]
    assert 0.7 < found["padding_share"] < 1

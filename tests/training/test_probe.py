"""training/probe.py: what it reports is what the exported model would score, and training cannot tell that it ran."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from contrec_dist.config import ZeroConfig
from contrec_dist.model.history_reader import HistoryReader
from contrec_dist.retrieval.scored_users import ScoredUsers
from contrec_dist.retrieval.user_views import UserViews
from contrec_dist.training import probe
from contrec_dist.training.probe import ValidationProbe

DRAW = np.random.default_rng(11)
HISTORIES = [DRAW.permutation(30)[: 3 + number % 9].tolist() for number in range(14)] + [[4, 5], [6]]
NUM_WITH_TARGET = 14


@pytest.fixture
def world(make_world):
    world = make_world(HISTORIES, max_history=6)
    world.config = replace(world.config, zero=ZeroConfig(stage=0))
    world.config.score.batch_users = 4  # several chunks
    return world


@pytest.fixture
def trained(world):
    """A model in training mode whose average is not its head."""
    model = world.build_model().train()
    with torch.no_grad():
        for buffer in model.average.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(3)))
    return model


def open_probe(world, model, **monitor) -> ValidationProbe:
    world.config.monitor = replace(world.config.monitor, **monitor)
    return ValidationProbe(world.config, model, world.texts, world.user_latents)


def go_on() -> bool:
    return False


def exported(model):
    """The model as an export has it: the average in the place of the head, eval mode."""
    for name, parameter in model.head.named_parameters():
        parameter.data.copy_(getattr(model.average, model.average._buffer_name(name)))
    return model.eval()


def test_figures_by_query_are_those_of_the_exported_model_ranked_by_hand(one_rank, world, trained):
    figures = open_probe(world, trained).measure(go_on)
    model = exported(trained)
    everybody = ScoredUsers.of_catalog(world.config.folder("catalog"))
    views = UserViews(
        world.config, model, HistoryReader(model, world.texts, None), world.item_latents, None, everybody
    )
    condition = views.read(np.arange(NUM_WITH_TARGET), "validation", reasoning=False).condition
    scores = (views.queries(condition) @ model.item_vectors().T).numpy()
    places = []
    for row, history in zip(scores, HISTORIES):
        row[history[:-2]] = -np.inf
        places.append(1 + int((row > row[history[-2]]).sum()))
    places = np.array(places)
    assert figures["num_users"] == NUM_WITH_TARGET
    assert figures["query_hr@10"] == pytest.approx((places <= 10).mean())
    assert figures["query_ndcg@10"] == pytest.approx(np.where(places <= 10, 1 / np.log2(1 + places), 0).mean())
    assert 0 < figures["query_hr@10"] < 1


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_samples_of_the_closed_form_are_of_the_ranking_itself(one_rank, world, guidance):
    """head.kind bayes: many guided samples of few steps rank about as the query does; without one there is nothing to train."""
    world.config.head = replace(world.config.head, kind="bayes")
    world.config.score = replace(world.config.score, num_samples=64, guidance=guidance)
    figures = open_probe(world, world.build_model().train()).measure(go_on)
    assert 0 < figures["query_hr@10"] < 1 and abs(figures["sampler_hr@10"] - figures["query_hr@10"]) < 0.4
    assert figures["sampler_hr@10"] > 0


def test_head_is_the_moving_average_where_there_is_one(one_rank, world, trained):
    measured = open_probe(world, trained)
    measured.measure(go_on)
    own, average = dict(trained.head.named_parameters()), trained.average
    for name, parameter in measured.head.named_parameters():
        assert torch.equal(parameter, getattr(average, average._buffer_name(name)))
        assert not torch.equal(parameter, own[name])


def test_head_is_the_trained_one_where_there_is_no_average(one_rank, world, trained):
    trained.average = None
    measured = open_probe(world, trained)
    measured.measure(go_on)
    own = dict(trained.head.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in measured.head.named_parameters())


def test_training_cannot_tell_that_a_probe_ran(one_rank, world, trained):
    trained.backbone.eval()  # modes of the modules may differ
    modes = [module.training for module in trained.modules()]
    weights = {name: value.clone() for name, value in trained.state_dict().items()}
    random_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    open_probe(world, trained).measure(go_on)
    assert [module.training for module in trained.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state) and (np.random.get_state()[1] == numpy_state).all()
    assert all(torch.equal(value, weights[name]) for name, value in trained.state_dict().items())
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_the_same_model_gives_the_same_figures_again(one_rank, world, trained):
    measured = open_probe(world, trained)
    assert measured.measure(go_on) == measured.measure(go_on)


def test_users_are_spread_over_all_that_have_a_target(one_rank, world, trained):
    chunks = open_probe(world, trained, probe_users=5).chunks
    users = sorted(user for chunk in chunks for user in chunk.user_idx.tolist())
    assert users == [0, 3, 6, 9, 13] and all(len(chunk) <= 4 for chunk in chunks)
    for chunk in chunks:
        for row, user in enumerate(chunk.user_idx):
            assert chunk.items[chunk.offsets[row] : chunk.offsets[row + 1]].tolist() == HISTORIES[user][:-2]
            assert chunk.targets[row] == HISTORIES[user][-2]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_rank_reads_equally_often_and_together_they_rank_every_user_once(one_rank, world, trained, monkeypatch, world_size):
    """Ranks one after the other in this process: what each would do while the others do their part."""
    measured = open_probe(world, trained)
    alone = measured.measure(go_on)
    read, parts, num_reads = measured.views.read_users, [], []

    def count(users, *, reasoning):
        num_reads[-1] += 1
        return read(users, reasoning=reasoning)

    monkeypatch.setattr(measured.views, "read_users", count)
    monkeypatch.setattr(probe.dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(measured, "_summarize", parts.append)
    for rank in range(world_size):
        num_reads.append(0)
        monkeypatch.setattr(probe.dist, "get_rank", lambda rank=rank: rank)
        measured.measure(go_on)
    assert len(set(num_reads)) == 1
    assert sorted(number for part in parts for number in part) == list(range(len(measured.chunks)))
    monkeypatch.undo()
    assert measured._summarize({number: places for part in parts for number, places in part.items()}) == alone


def test_probe_ends_between_chunks_when_the_run_is_asked_to_stop(one_rank, world, trained):
    asked = []

    def stop_at_second() -> bool:
        asked.append(None)
        return len(asked) == 2

    assert open_probe(world, trained).measure(stop_at_second) is None
    assert len(asked) == 2 and trained.training

"""head.latents: trained. Latents turn at their length, by every loss but the denoising one; an export holds the turned ones."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from contrec_dist.config import Config, HeadConfig
from contrec_dist.data.latents import item_latents_path
from contrec_dist.model.continuous_inputs import TurnedLatents
from contrec_dist.model.export import load_export, save_export
from contrec_dist.model.history_reader import HistoryBatch, HistoryReader

HISTORIES = [[1, 4, 7, 10, 13, 2, 5], [3, 6, 9, 12]]


@pytest.fixture(params=["marked", "fused"])
def world(make_world, request):
    world = make_world(HISTORIES, item_layout=request.param)
    world.config.head.latents = "trained"
    return world


def pack(world):
    plan = world.rows.plan(0)
    return world.rows.build(plan, np.arange(len(plan.rows)), len(plan.rows))


def whole_state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def read(model, world, latents) -> torch.Tensor:
    """Conditions of the histories by latents of the catalogue (N, K, Z)."""
    items = np.concatenate(HISTORIES)
    offsets = np.cumsum([0, *map(len, HISTORIES)])
    return HistoryReader(model, world.texts, None).read(HistoryBatch(items, offsets, latents[items], None), reasoning=False).condition


def test_a_shift_turns_a_latent_and_keeps_its_length_by_hand():
    """(3, 0) shifted by (0, 3) points to 45 degrees and is still 3 long; the others stay as they are, zeros too."""
    turned = TurnedLatents(num_items=3, latent_width=2)
    with torch.no_grad():
        turned.shift.weight[1] = torch.tensor([0.0, 3.0])
    latents = torch.tensor([[[3.0], [0.0]], [[3.0], [0.0]], [[0.0], [0.0]]])
    found = turned(latents, torch.tensor([0, 1, 2]))
    expected = torch.tensor([[[3.0], [0.0]], [[3 / 2**0.5], [3 / 2**0.5]], [[0.0], [0.0]]])
    torch.testing.assert_close(found, expected)


def test_items_taken_for_new_ones_keep_the_tokenizers_latents():
    turned = TurnedLatents(num_items=6, latent_width=2)
    torch.nn.init.constant_(turned.shift.weight, 1.0)
    latents, rows = torch.tensor([1.0, -0.5]).expand(6, 2)[..., None], torch.arange(6)
    as_new = rows % 2 == 0
    found = turned(latents, rows, as_new)
    assert ((found == latents).all(2).all(1) == as_new).all()
    torch.testing.assert_close(found[~as_new], turned(latents, rows)[~as_new])


@pytest.mark.parametrize("num_negatives", [0, 40])
def test_the_share_that_goes_without_is_the_configs_in_training_alone(world, num_negatives):
    world.config.head.residual_drop, world.config.loss.num_negatives = 1.0, num_negatives
    model, batch = world.build_model().train(), pack(world)
    model(batch, 0)["negative"].backward()
    turned_inputs = model.turned.shift.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert set(turned_inputs) <= set(batch.item_idx.tolist())  # through the inputs' own tokens, not the catalogue's vectors
    model.turned.shift.weight.grad = None
    model.eval()(batch, 0)["negative"].backward()
    reached = set(model.turned.shift.weight.grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert reached > set(batch.item_idx.tolist())


def test_frozen_is_the_default_and_has_no_weights_of_its_own(make_world):
    assert HeadConfig().latents == "frozen" and make_world(HISTORIES).build_model().turned is None


def test_training_starts_at_the_tokenizers_latents(world):
    model = world.build_model()
    with torch.no_grad():
        model.turned.shift.weight.zero_()
    torch.testing.assert_close(model.raw_catalogue(), torch.from_numpy(world.item_latents), atol=1e-5, rtol=1e-5)


def test_what_reads_latents_turns_them_and_what_denoises_them_does_not(world):
    """The ranking reaches inputs and the whole catalogue; the denoising loss the inputs alone, never the target it is to hit."""
    model, batch = world.build_model(), pack(world)
    shift = model.turned.shift.weight
    model(batch, 0)["negative"].backward()
    assert (shift.grad.abs().sum(1) > 0).all()
    shift.grad = None
    model(batch, 0)["diffusion"].backward()
    reached = set(shift.grad.abs().sum(1).nonzero()[:, 0].tolist())
    only_targets = set(batch.target_idx.tolist()) - set(batch.item_idx.tolist())
    assert reached and reached <= set(batch.item_idx.tolist()) and only_targets and not reached & only_targets


def test_the_denoising_target_is_the_turned_latent(world):
    model, batch, seen = world.build_model(), pack(world), []
    model.head.losses = lambda condition, latents, *rest: seen.append(latents) or {}
    model(batch, 0)
    expected = model.catalogue(torch.device("cpu")).detach().flatten(1)[batch.target_idx]
    got = {tuple(row) for row in seen[0].numpy().round(3).tolist()}
    assert got == {tuple(row) for row in expected.numpy().round(3).tolist()} and not seen[0].requires_grad


def test_sampled_negatives_meet_the_turned_latents_too(world):
    world.config.loss.num_negatives = 8
    model = world.build_model()
    model(pack(world), 0)["negative"].backward()
    assert (model.turned.shift.weight.grad.abs().sum(1) > 0).sum() > 0


def test_an_export_holds_the_turned_latents_and_reads_and_ranks_with_them(world, tmp_path):
    model = world.build_model()
    model.average.update(dict(model.head.named_parameters()))
    for name, buffer in model.average.named_buffers():
        if name != "num_updates":
            buffer.copy_(dict(model.head.named_parameters())[name.replace("__", ".")].detach())
    save_export(model, whole_state(model), world.tokenizer, tmp_path, {})
    latents = np.load(tmp_path / "item_latents.npy")
    np.testing.assert_allclose(latents, model.raw_catalogue().numpy(), atol=1e-5)
    assert np.abs(latents - world.item_latents).max() > 0.05
    assert not any(name.startswith("turned") for name in load_file(tmp_path / "head.safetensors"))
    loaded, _ = load_export(tmp_path, item_latents=torch.from_numpy(latents))
    assert loaded.turned is None
    torch.testing.assert_close(loaded.item_vectors(), model.item_vectors(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(read(loaded, world, latents), read(model, world, latents), atol=1e-5, rtol=1e-5)


def test_the_models_own_latents_come_before_the_tokenizers(tmp_path):
    config = Config(name="toy", run_dir=str(tmp_path))
    assert item_latents_path(config) == tmp_path / "tokens/item_latents.npy"
    (tmp_path / "model").mkdir()
    (tmp_path / "model/item_latents.npy").touch()
    assert item_latents_path(config) == tmp_path / "model/item_latents.npy"
    assert item_latents_path(config, tmp_path / "other") == tmp_path / "tokens/item_latents.npy"

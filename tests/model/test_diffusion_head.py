"""model/diffusion_head.py: what trains it, what it draws, and its moving average."""

import numpy as np
import pytest
import torch

from contrec_dist.config import HeadConfig
from contrec_dist.model import diffusion_head
from contrec_dist.model.diffusion_head import DiffusionHead, HeadAverage

WIDTH, LATENT = 6, 4


def make_head(perturbed=True, **changes) -> DiffusionHead:
    torch.manual_seed(0)
    config = HeadConfig(**{"width": 16, "query_dim": 5, "batch_mul": 2, "dropout": 0.0, **changes})
    head = DiffusionHead(config, condition_width=WIDTH, latent_width=LATENT)
    if perturbed:
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return head


def make_batch(rows=8, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=draw), torch.randn(rows, LATENT, generator=draw)


def losses(head, condition, latents, seed=0):
    return head.losses(condition, latents, 0.5, torch.Generator().manual_seed(seed))


def draw(head, condition, seed=0, **changes):
    settings = {"num_steps": 4, "solver": "dpm", "guidance": 1.0, **changes}
    samples = head.sample(condition, **settings, generator=torch.Generator().manual_seed(seed))
    return samples if "num_samples" in changes else samples[0]


def count_calls(head) -> list[int]:
    """Latents of every call of the denoiser from now on."""
    calls = []
    head.denoiser.register_forward_hook(lambda module, arguments, output: calls.append(arguments[0].numel() // LATENT))
    return calls


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
def test_diffusion_loss_is_the_error_of_what_the_output_stands_for(prediction):
    """A fresh head outputs 0, so its loss is the mean square of the target over the draws that the generator gives."""
    head, (condition, latents) = make_head(perturbed=False, prediction=prediction), make_batch()
    generator = torch.Generator().manual_seed(3)
    torch.rand(len(condition), 1, generator=generator)  # which conditions are dropped
    x0 = latents.repeat(2, 1)
    step = torch.randint(1000, (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    alpha, sigma = head.schedule.alphas[step][:, None], head.schedule.sigmas[step][:, None]
    target = {"x0": x0, "v": alpha * noise - sigma * x0, "eps": noise}[prediction]
    torch.testing.assert_close(losses(head, condition, latents, seed=3)["diffusion"], target.square().mean())


def test_gradient_of_the_diffusion_loss_reaches_the_condition():
    head, (condition, latents) = make_head(condition_drop=0.0), make_batch()
    condition.requires_grad_()
    losses(head, condition, latents)["diffusion"].backward()
    assert (condition.grad.abs().sum(dim=1) > 0).all()


def test_training_lets_the_head_tell_conditions_apart():
    """Two conditions with two latents: after some steps a sample lies at its own condition's latent."""
    head = make_head(perturbed=False, condition_drop=0.1, batch_mul=4)
    condition = torch.eye(2, WIDTH).repeat(16, 1) * 3
    latents = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]]).repeat(16, 1)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for seed in range(150):
        loss = losses(head, condition, latents, seed)["diffusion"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(draw(head, condition[:2], num_steps=10, guidance=0.0), latents[:2], atol=0.2, rtol=0)


def test_conditions_are_dropped_at_the_rate_asked_for():
    condition, latents = make_batch(rows=2000)
    for ratio in (0.0, 0.3, 1.0):
        head = make_head(condition_drop=ratio)
        seen = []
        head.denoiser.embed_condition.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
        losses(head, condition, latents)
        dropped = (seen[0] == head.null_condition.weight).all(dim=1).float().mean()
        assert float(dropped) == pytest.approx(ratio, abs=0.04)
        assert len(seen[0]) == 2000  # once for all its draws: a dropped condition is dropped in all of them


def test_losses_leave_their_inputs_alone_and_follow_the_generator():
    head, (condition, latents) = make_head(), make_batch()
    before = condition.clone(), latents.clone()
    first, again, other = (losses(head, condition, latents, seed)["diffusion"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(condition, before[0]) and torch.equal(latents, before[1])


def test_an_empty_batch_costs_nothing_and_is_finite():
    values = losses(make_head(), torch.zeros(0, WIDTH), torch.zeros(0, LATENT))
    assert {name: float(value.detach()) for name, value in values.items()} == {"diffusion": 0.0, "dispersive": 0.0}


def test_the_query_is_the_one_step_prediction_at_the_last_step_from_the_mean_of_the_noise():
    head, (condition, _) = make_head(), make_batch()
    normal = head.norm(condition)
    features, _ = head.denoiser(torch.zeros(8, LATENT), torch.full((8,), 999), normal)
    expected = head.direct_query(normal) + head.denoised_query(features)
    torch.testing.assert_close(head.query(condition), expected, atol=0, rtol=0)


@pytest.mark.parametrize("solver", ["ddim", "dpm", "ddpm"])
def test_sampling_is_a_function_of_the_generator(solver):
    head, (condition, _) = make_head(), make_batch()
    first, again, other = (draw(head, condition, seed, solver=solver) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (8, LATENT) and first.dtype == torch.float32


def test_guidance_is_one_plus_w_of_the_conditional_less_w_of_the_null_prediction():
    head, (condition, _) = make_head(), make_batch()
    noise = torch.randn(8, LATENT, generator=torch.Generator().manual_seed(0))
    last = torch.full((8,), 999)
    null = head.null_condition.weight.expand(8, -1)
    conditional, unconditional = (head.predict_x0(noise, last, one) for one in (head.norm(condition), null))
    for guidance in (0.0, 0.5, 2.0):
        expected = (1 + guidance) * conditional - guidance * unconditional
        got = draw(head, condition, num_steps=1, guidance=guidance)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_number_of_denoiser_calls_does_not_depend_on_the_number_of_users():
    head = make_head()
    for rows in (1, 8, 300):
        condition, _ = make_batch(rows)
        calls = count_calls(head)
        draw(head, condition, num_steps=5, guidance=1.0)
        assert calls == [rows] * 10  # five steps, each with and without the condition
        calls.clear()
        head.query(condition)
        assert calls == [rows]


def test_guidance_ends_where_the_noise_is_below_its_limit():
    head, (condition, _) = make_head(), make_batch()
    sigmas = [float(head.schedule.sigmas[t]) for t in (999, 799, 599, 399, 199)]
    calls = count_calls(head)
    for limit in (0.0, sigmas[4] + 0.01, sigmas[2] + 0.01, 1.1):
        calls.clear()
        draw(head, condition, num_steps=5, guidance=1.0, guidance_min_sigma=limit)
        assert len(calls) == 5 + sum(sigma >= limit for sigma in sigmas)
    unguided = draw(head, condition, num_steps=5, guidance=0.0)
    assert torch.equal(draw(head, condition, num_steps=5, guidance=1.0, guidance_min_sigma=1.1), unguided)


def test_guidance_begins_where_the_noise_has_fallen_to_its_limit():
    head, (condition, _) = make_head(), make_batch()
    sigmas = [float(head.schedule.sigmas[t]) for t in (999, 799, 599, 399, 199)]
    calls = count_calls(head)
    for limit in (1.0, 0.999, sigmas[2], 0.0):
        calls.clear()
        draw(head, condition, num_steps=5, guidance=1.0, guidance_max_sigma=limit)
        assert len(calls) == 5 + sum(sigma <= limit for sigma in sigmas)
    unguided = draw(head, condition, num_steps=5, guidance=0.0)
    assert torch.equal(draw(head, condition, num_steps=5, guidance=1.0, guidance_max_sigma=0.0), unguided)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_samples_that_share_a_modulation_equal_samples_of_repeated_conditions(guidance):
    """Three samples a condition against conditions named three times: the slow reference, over the same noise."""
    head, (condition, _) = make_head(), make_batch()
    for solver in ("ddim", "dpm", "ddpm"):
        together = draw(head, condition, solver=solver, guidance=guidance, num_samples=3)
        alone = draw(head, condition.repeat(3, 1), solver=solver, guidance=guidance)
        torch.testing.assert_close(together.flatten(0, 1), alone, atol=1e-5, rtol=1e-5)


def test_conditions_in_chunks_draw_one_after_the_other(monkeypatch):
    head, (condition, _) = make_head(), make_batch()
    monkeypatch.setattr(diffusion_head, "SAMPLE_ROWS", 6)
    got = draw(head, condition, num_samples=2)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_samples": 2, "num_steps": 4, "solver": "dpm", "guidance": 1.0, "generator": generator}
    expected = [head.sample(part, **settings) for part in condition.split(3)]
    torch.testing.assert_close(got, torch.cat(expected, dim=1), atol=1e-6, rtol=1e-6)


def test_sampling_stays_in_fp32_inside_autocast_callers():
    head, (condition, _) = make_head(), make_batch()
    torch.testing.assert_close(draw(head, condition.bfloat16()), draw(head, condition.bfloat16().float()), atol=0, rtol=0)


def test_head_average_warms_up_as_computed_by_hand():
    """Decay 2/11 then 3/12, then the limit 0.26 instead of 4/13."""
    average = HeadAverage({"a.b": torch.zeros(2)}, decay=0.26)
    expected, got = 0.0, []
    for value, decay in ((1.0, 2 / 11), (2.0, 3 / 12), (4.0, 0.26)):
        average.update({"a.b": torch.full((2,), value)})
        expected = decay * expected + (1 - decay) * value
        got.append(float(average.a__b[0]))
        assert got[-1] == pytest.approx(expected, rel=1e-6)
    assert int(average.num_updates) == 3 and got[0] == pytest.approx(9 / 11)


def test_head_average_is_carried_by_the_state_and_is_no_parameter():
    head = make_head()
    average = HeadAverage(dict(head.named_parameters()), decay=0.9)
    assert not list(average.parameters())
    names = {name.replace(".", "__") for name, _ in head.named_parameters()}
    assert set(average.state_dict()) == names | {"num_updates"}
    head.direct_query.weight.data.zero_()  # the average owns its values
    assert np.abs(average.direct_query__weight.numpy()).max() > 0

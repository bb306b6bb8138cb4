"""The noise schedule against diffusers, against its own algebra, and its named errors."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from contrec_dist.errors import ConfigError
from contrec_dist.model.noise_schedule import NoiseSchedule

DIFFUSERS_KINDS = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
DIFFUSERS_PREDICTIONS = {"x0": "sample", "v": "v_prediction", "eps": "epsilon"}


def draw_batch(schedule, rows=64, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, schedule.num_train_steps - 1, rows).long()
    return torch.randn(rows, width, generator=generator), torch.randn(rows, width, generator=generator), t


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("num_train_steps", [1000, 700])
def test_add_noise_and_velocity_agree_with_diffusers(kind, num_train_steps):
    schedule = NoiseSchedule(num_train_steps, kind)
    reference = DDPMScheduler(num_train_steps, beta_schedule=DIFFUSERS_KINDS[kind])
    x0, noise, t = draw_batch(schedule)
    assert_close(schedule.alphas_cumprod, reference.alphas_cumprod, rtol=0, atol=1e-5)
    assert_close(schedule.add_noise(x0, noise, t), reference.add_noise(x0, noise, t), rtol=0, atol=1e-5)
    assert_close(schedule.target(x0, noise, t, "v"), reference.get_velocity(x0, noise, t), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
def test_the_clean_latent_of_an_output_agrees_with_diffusers(kind, prediction):
    schedule = NoiseSchedule(1000, kind)
    reference = DDIMScheduler(
        1000,
        beta_schedule=DIFFUSERS_KINDS[kind],
        prediction_type=DIFFUSERS_PREDICTIONS[prediction],
        clip_sample=False,
    )
    reference.set_timesteps(1000)
    generator = torch.Generator().manual_seed(1)
    for t in (0, 1, 250, 500, 750, 990):
        output, x_t = torch.randn(2, 5, 4, generator=generator)
        expected = reference.step(output, t, x_t).pred_original_sample
        actual = schedule.to_x0(output, x_t, torch.full((5,), t), prediction)
        assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_alpha_and_sigma_are_a_unit_vector_that_turns_from_data_to_noise(kind):
    schedule = NoiseSchedule(1000, kind)
    t = torch.arange(1000)
    assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(1000), rtol=0, atol=1e-6)
    assert (schedule.alpha(t).diff() < 0).all() and (schedule.sigma(t).diff() >= 0).all()
    assert schedule.alpha(t[0]) > 0.999 and 0 < schedule.alpha(t[-1]) < 0.01


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
def test_the_target_converts_back_to_the_clean_latent_and_its_noise(kind, prediction):
    schedule = NoiseSchedule(1000, kind)
    x0, noise, _ = draw_batch(schedule)
    t = torch.linspace(5, 900, len(x0)).long()
    x_t = schedule.add_noise(x0, noise, t)
    recovered = schedule.to_x0(schedule.target(x0, noise, t, prediction), x_t, t, prediction)
    assert_close(recovered, x0, rtol=0, atol=2e-5)
    assert_close(schedule.to_eps(x0, x_t, t), noise, rtol=0, atol=2e-4)


def test_hand_computed_linear_values():
    schedule = NoiseSchedule(1000, "linear")
    assert_close(schedule.alphas_cumprod[0].item(), 0.9999, rtol=1e-6, atol=0)
    second = 0.9999 * (1 - (1e-4 + (0.02 - 1e-4) / 999))
    assert_close(schedule.alphas_cumprod[1].item(), second, rtol=1e-6, atol=0)
    x_t = schedule.add_noise(torch.tensor([[3.0]]), torch.tensor([[2.0]]), torch.tensor([0]))
    assert_close(x_t.item(), 3 * 0.9999**0.5 + 2 * 0.0001**0.5, rtol=1e-6, atol=0)


def test_a_noise_step_a_row_broadcasts_over_token_dimensions():
    schedule = NoiseSchedule(1000)
    x0, noise = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([10, 500, 990])
    whole = schedule.add_noise(x0, noise, t)
    for row in range(3):
        assert_close(whole[row], schedule.add_noise(x0[row : row + 1], noise[row : row + 1], t[row : row + 1])[0])


def test_results_are_float32_for_bf16_inputs_and_inputs_stay_as_they_are():
    schedule = NoiseSchedule(1000)
    x0, noise, t = draw_batch(schedule)
    x0, noise = x0.bfloat16(), noise.bfloat16()
    before = x0.clone(), noise.clone(), t.clone()
    x_t = schedule.add_noise(x0, noise, t)
    for kind in ("x0", "v", "eps"):
        assert schedule.target(x0, noise, t, kind).dtype == torch.float32
        assert schedule.to_x0(x0, x_t.bfloat16(), t, kind).dtype == torch.float32
    assert x_t.dtype == schedule.to_eps(x0, x_t, t).dtype == torch.float32
    assert all(torch.equal(old, new) for old, new in zip(before, (x0, noise, t)))


def test_eps_at_pure_noise_stays_within_a_thousand_times_the_output():
    schedule = NoiseSchedule(1000, "cosine")
    x_t, output = torch.full((1, 1), 1.0), torch.full((1, 1), 2.0)
    x0 = schedule.to_x0(output, x_t, torch.tensor([999]), "eps")
    assert_close(x0.item(), -1000.0, rtol=1e-3, atol=0)


def test_gradients_reach_the_output_through_every_conversion():
    schedule = NoiseSchedule(1000)
    x_t, t = torch.ones(2, 3), torch.tensor([100, 200])
    for kind in ("x0", "v", "eps"):
        output = torch.ones(2, 3, requires_grad=True)
        schedule.to_x0(output, x_t, t, kind).sum().backward()
        assert (output.grad != 0).all()


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (lambda: NoiseSchedule(0), "head.num_train_steps", "0"),
        (lambda: NoiseSchedule(1000, "quadratic"), "head.schedule", "quadratic"),
        (lambda: NoiseSchedule(100, "linear"), "head.num_train_steps", "100"),
        (lambda: NoiseSchedule(1000).target(*draw_batch(NoiseSchedule(1000)), "score"), "head.prediction", "score"),
    ],
)
def test_what_cannot_be_used_is_named(make, key, value):
    with pytest.raises(ConfigError) as caught:
        make()
    assert key in str(caught.value) and value in str(caught.value)

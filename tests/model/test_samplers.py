"""The solvers against diffusers step by step, and against the closed form for a Gaussian."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch.testing import assert_close

from contrec_dist.errors import ConfigError
from contrec_dist.model.noise_schedule import NoiseSchedule
from contrec_dist.model.samplers import sample, spaced_timesteps

SOLVERS = ("ddim", "dpm", "ddpm")
DIFFUSERS_KINDS = {"cosine": "squaredcos_cap_v2", "linear": "linear"}


def make_reference(solver, kind):
    settings = {"beta_schedule": DIFFUSERS_KINDS[kind], "prediction_type": "sample", "timestep_spacing": "trailing"}
    if solver == "dpm":
        return DPMSolverMultistepScheduler(1000, **settings)
    scheduler = DDIMScheduler if solver == "ddim" else DDPMScheduler
    return scheduler(1000, clip_sample=False, **settings)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def curved_denoiser(x_t, t):
    """A smooth nonlinear function of both arguments."""
    phase = t[:, None].float() / 1000
    return torch.tanh(x_t + phase) * (1 + 0.5 * torch.sin(5 * phase)) + 0.1 * x_t.roll(1, dims=1) ** 2


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_step_agrees_with_diffusers(solver, kind, num_steps):
    seen = []

    def recording_denoiser(x_t, t):
        seen.append((t[0].item(), x_t.clone()))
        return curved_denoiser(x_t, t)

    schedule = NoiseSchedule(1000, kind)
    shape = (4, 6)
    result = sample(
        recording_denoiser, schedule, shape=shape, num_steps=num_steps, solver=solver, generator=seeded()
    )

    reference, generator = make_reference(solver, kind), seeded()
    reference.set_timesteps(num_steps)
    x_t = torch.randn(shape, generator=generator)
    assert [t for t, _ in seen] == reference.timesteps.tolist()
    for t, (_, actual) in zip(reference.timesteps, seen):
        assert_close(actual, x_t, rtol=1e-5, atol=1e-5)
        x0 = curved_denoiser(x_t, t.expand(shape[0]))
        noise = {} if solver == "ddim" else {"generator": generator}
        x_t = reference.step(x0, t, x_t, **noise).prev_sample
    assert_close(result, x_t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_is_the_prediction_from_pure_noise(solver):
    schedule = NoiseSchedule(1000)
    result = sample(curved_denoiser, schedule, shape=(3, 5), num_steps=1, solver=solver, generator=seeded(7))
    noise = torch.randn(3, 5, generator=seeded(7))
    assert torch.equal(result, curved_denoiser(noise, torch.full((3,), 999)))


def gaussian_denoiser(schedule, mean, std):
    """E[x0 | x_t] for x0 ~ N(mean, std^2), exact at every noise step."""

    def denoise(x_t, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return mean + alpha * std**2 * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return denoise


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(("solver", "num_steps"), [("ddim", 200), ("dpm", 50), ("ddpm", 1000)])
def test_a_gaussian_comes_back_with_its_mean_and_standard_deviation(solver, num_steps, kind):
    schedule = NoiseSchedule(1000, kind)
    mean, std = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.5])
    denoise = gaussian_denoiser(schedule, mean, std)
    samples = sample(
        denoise, schedule, shape=(20000, 2), num_steps=num_steps, solver=solver, generator=seeded(3)
    )
    assert_close(samples.mean(dim=0), mean, rtol=0, atol=0.04)
    assert_close(samples.std(dim=0), std, rtol=0.03, atol=0)
    assert abs(torch.corrcoef(samples.T)[0, 1]) < 0.03


def test_dpm_needs_fewer_steps_than_ddim_for_the_same_accuracy():
    schedule = NoiseSchedule(1000)
    denoise = gaussian_denoiser(schedule, torch.tensor([1.0]), torch.tensor([0.3]))

    def run(solver, num_steps):
        return sample(denoise, schedule, shape=(500, 1), num_steps=num_steps, solver=solver, generator=seeded(4))

    exact = run("ddim", 1000)
    assert (run("dpm", 20) - exact).abs().mean() < 0.5 * (run("ddim", 20) - exact).abs().mean()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_generator_state_gives_the_same_bits(solver):
    schedule = NoiseSchedule(1000)

    def run(seed):
        return sample(curved_denoiser, schedule, shape=(3, 4), num_steps=5, solver=solver, generator=seeded(seed))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_token_dimensions_and_bf16_denoisers_come_back_as_float32_of_the_same_shape():
    result = sample(
        lambda x_t, t: x_t.bfloat16(), NoiseSchedule(1000), shape=(3, 2, 4), num_steps=4, solver="dpm", generator=seeded()
    )
    assert result.shape == (3, 2, 4) and result.dtype == torch.float32 and result.isfinite().all()


@pytest.mark.parametrize("num_train_steps", [1000, 37])
def test_steps_fall_from_the_last_and_never_repeat(num_train_steps):
    for num_steps in range(1, num_train_steps + 1):
        steps = spaced_timesteps(num_train_steps, num_steps)
        assert len(steps) == num_steps and steps[0] == num_train_steps - 1 and steps[-1] >= 0
        assert all(later < earlier for earlier, later in zip(steps, steps[1:]))
    assert steps == list(range(num_train_steps - 1, -1, -1))


def test_a_spacing_above_one_puts_more_steps_where_the_noise_is_high():
    assert spaced_timesteps(1000, 5, 2.0) == [999, 959, 839, 639, 359]
    assert spaced_timesteps(100, 10, 3.0) == [99, 98, 97, 96, 93, 87, 77, 65, 48, 26]  # one apart at least
    assert spaced_timesteps(1000, 200, 1.0) == spaced_timesteps(1000, 200)


@pytest.mark.parametrize("spacing", [1.0, 1.2, 2.0, 5.0, 200.0])
def test_whatever_the_spacing_steps_fall_from_the_last_and_never_repeat(spacing):
    for num_steps in range(1, 38):
        steps = spaced_timesteps(37, num_steps, spacing)
        assert len(steps) == num_steps and steps[0] == 36 and steps[-1] >= 0
        assert all(later < earlier for earlier, later in zip(steps, steps[1:]))


@pytest.mark.parametrize("spacing", [0.0, -1.0, 0.9, float("nan"), float("inf")])
def test_a_wrong_spacing_is_named(spacing):
    with pytest.raises(ConfigError, match="score.step_spacing"):
        spaced_timesteps(1000, 5, spacing)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_spacing_keeps_the_distribution_of_a_gaussian(solver):
    """Each solver walks the steps that it is given: 200 of them, closer at high noise, end at the same mean and deviation."""
    schedule, mean, std = NoiseSchedule(1000), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.5])
    visited = []
    exact = gaussian_denoiser(schedule, mean, std)

    def denoise(x_t, t):
        visited.append(int(t[0]))
        return exact(x_t, t)

    settings = {"shape": (20000, 2), "num_steps": 200, "spacing": 1.2, "solver": solver, "generator": seeded(3)}
    samples = sample(denoise, schedule, **settings)
    assert visited == spaced_timesteps(1000, 200, 1.2)
    assert_close(samples.mean(dim=0), mean, rtol=0, atol=0.04)
    assert_close(samples.std(dim=0), std, rtol=0.05, atol=0)


@pytest.mark.parametrize("num_steps", [0, -3, 1001])
def test_a_wrong_number_of_steps_is_named(num_steps):
    with pytest.raises(ConfigError, match=f"num_sampling_steps.*got {num_steps},.*1000"):
        sample(curved_denoiser, NoiseSchedule(1000), shape=(1, 2), num_steps=num_steps, solver="ddim", generator=seeded())


def test_an_unknown_solver_is_named():
    with pytest.raises(ConfigError, match="score.solver.*euler"):
        sample(curved_denoiser, NoiseSchedule(1000), shape=(1, 2), num_steps=2, solver="euler", generator=seeded())

"""From pure noise to a clean latent in a few denoiser calls: DDIM, DPM-Solver++(2M) and ancestral DDPM. Used in score.

All three walk the same noise steps, by default evenly spaced and ending at clean data ("trailing" in `diffusers`): with n
steps over T, t_i = round(T (n - i) / n) - 1 for i = 0 .. n-1, and after the last one x0 itself. So a chain starts at T-1 for
every n (pure noise, also for n = 1), never visits a step twice, and n = T visits each. The solvers then agree with
`diffusers` step by step; its "linspace" spacing starts DDIM at t = 0 for n = 1 and repeats a step for n = T. A spacing p
above 1 walks T (1 - (i / n)^p) - 1 instead, at least one noise step at a time: short steps at high noise, long ones at low.

Cost: num_steps calls of the denoiser.
"""

import math
from typing import Callable, Literal, NamedTuple

import torch
from torch import Tensor

from contrec_dist.errors import ConfigError
from contrec_dist.model.noise_schedule import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
Solver = Literal["ddim", "dpm", "ddpm"]


@torch.no_grad()
def sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    *,
    shape: tuple[int, ...],
    num_steps: int,
    solver: Solver,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    spacing: float = 1.0,
) -> Tensor:
    """Draw clean latents.

    `denoise(x_t, t)` predicts x0, guidance included. 'ddim' (eta 0) and 'dpm' draw from the generator once, the noise
    they start from; 'ddpm' draws again after every step but the last. Draws are made on the generator's device, so a
    CPU generator gives the same numbers on every device. With one step all three return denoise(noise, T-1).

    Shapes   shape (B, ..., D); denoise: x_t (B, ..., D) float32, t (B,) int64 -> (B, ..., D); returns (B, ..., D) float32
    Errors   ConfigError naming num_steps outside [1, T], a spacing below 1, or a solver that is not known.
    Source   DDIM arXiv 2010.02502 eq. 12; DPM-Solver++ arXiv 2211.01095 alg. 2; DDPM arXiv 2006.11239 eq. 7
    """
    if solver not in _STEPS:
        raise ConfigError("score.solver", solver, f"one of {sorted(_STEPS)}")
    levels = [_Level.of(schedule, t) for t in spaced_timesteps(schedule.num_train_steps, num_steps, spacing)]

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).to(device)

    x_t, previous = draw(), None
    for now, after in zip(levels, levels[1:]):
        x0 = _predict(denoise, x_t, now.t)
        x_t = _STEPS[solver](x_t, x0, now, after, previous, draw)
        previous = (x0, now)
    return _predict(denoise, x_t, levels[-1].t)  # towards sigma 0 every solver's update is x0 itself


def spaced_timesteps(num_train_steps: int, num_steps: int, spacing: float = 1.0) -> list[int]:
    """The noise steps that a chain visits, falling from T-1; all differ.

    Errors   ConfigError naming num_steps outside [1, T] or a spacing below 1.
    """
    if not 1 <= num_steps <= num_train_steps:
        raise ConfigError("score.num_sampling_steps", num_steps, f"1 to {num_train_steps}, the steps of the schedule")
    if spacing == 1.0:
        return [round(num_train_steps * (num_steps - i) / num_steps) - 1 for i in range(num_steps)]
    if not 1.0 <= spacing < math.inf:
        raise ConfigError("score.step_spacing", spacing, "a number of at least 1")
    steps = [num_train_steps - 1]
    for i in range(1, num_steps):
        wanted = round(num_train_steps * (1.0 - (i / num_steps) ** spacing)) - 1
        steps.append(min(wanted, steps[-1] - 1))
    return steps


class _Level(NamedTuple):
    """A noise step with its coefficients; log_snr is lambda = log(alpha / sigma)."""

    t: int
    alpha: float
    sigma: float
    log_snr: float

    @classmethod
    def of(cls, schedule: NoiseSchedule, t: int) -> "_Level":
        alpha, sigma = schedule.alphas[t].item(), schedule.sigmas[t].item()
        return cls(t, alpha, sigma, math.log(alpha / sigma))


def _predict(denoise: Denoiser, x_t: Tensor, t: int) -> Tensor:
    """The denoiser's x0 at one noise step for the whole batch, in float32."""
    return denoise(x_t, torch.full((x_t.shape[0],), t, dtype=torch.int64, device=x_t.device)).float()


def _ddim_step(x_t: Tensor, x0: Tensor, now: _Level, after: _Level, previous, draw) -> Tensor:
    """Keep the noise that x0 implies, and add less of it."""
    eps = (x_t - now.alpha * x0) / now.sigma
    return after.alpha * x0 + after.sigma * eps


def _dpm_step(x_t: Tensor, x0: Tensor, now: _Level, after: _Level, previous, draw) -> Tensor:
    """Second order in lambda from the last two predictions; the first step has only one and is first order."""
    width = after.log_snr - now.log_snr
    x0_midway = x0
    if previous is not None:
        x0_before, before = previous
        x0_midway = x0 + 0.5 * width / (now.log_snr - before.log_snr) * (x0 - x0_before)
    return (after.sigma / now.sigma) * x_t - after.alpha * math.expm1(-width) * x0_midway


def _ddpm_step(x_t: Tensor, x0: Tensor, now: _Level, after: _Level, previous, draw) -> Tensor:
    """Draw from the exact posterior q(x_after | x_t, x0)."""
    alpha_step = now.alpha / after.alpha
    beta_step = 1.0 - alpha_step**2
    mean = (after.alpha * beta_step * x0 + alpha_step * after.sigma**2 * x_t) / now.sigma**2
    return mean + math.sqrt(beta_step) * after.sigma / now.sigma * draw()


_STEPS = {"ddim": _ddim_step, "dpm": _dpm_step, "ddpm": _ddpm_step}

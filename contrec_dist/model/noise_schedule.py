"""How much noise a latent carries at noise step t, and what a denoiser's output means. Used in train and score.

    x_t = alpha(t) x_0 + sigma(t) eps,    alpha(t)^2 + sigma(t)^2 = 1,    t = 0 .. T-1

Guarantees: everything is float32, whatever the dtype of the model around it; the schedule is no nn.Module, so casting
a model to bf16 cannot round it. The coefficients are computed in float64 and agree with `diffusers`.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from contrec_dist.errors import ConfigError

Prediction = Literal["x0", "v", "eps"]
MAX_COSINE_BETA = 0.999
LINEAR_BETA_RANGE = (1e-4, 0.02)
MAX_LAST_ALPHA = 0.1
MIN_ALPHA = 1e-3
MIN_SIGMA = 1e-4


class NoiseSchedule:
    """alpha and sigma of every noise step, and the conversions between x0, v and eps.

    alphas_cumprod, alphas, sigmas: (T,) float32 on the CPU; the methods move them to their argument's device once.
    alpha(T-1) is nearly 0, so that sampling may start from pure noise; it is never 0 because every beta is below 1.

    Errors   ConfigError for a kind that is not known, for num_train_steps < 1, and for so few steps that the last one
             still carries signal (alpha > 0.1): sampling would start where training never was.
    Source   linear: DDPM, arXiv 2006.11239; cosine: arXiv 2102.09672, eq. 17; v: arXiv 2202.00512.
    """

    def __init__(self, num_train_steps: int, kind: Literal["cosine", "linear"] = "cosine"):
        if num_train_steps < 1:
            raise ConfigError("head.num_train_steps", num_train_steps, "at least 1")
        self.num_train_steps, self.kind = num_train_steps, kind
        cumprod = torch.cumprod(1.0 - _betas(num_train_steps, kind), dim=0)  # (T,) float64
        if cumprod[-1].sqrt() > MAX_LAST_ALPHA:
            expected = f"so many steps that the last is nearly pure noise; schedule '{kind}' ends at alpha {cumprod[-1].sqrt():.3f}"
            raise ConfigError("head.num_train_steps", num_train_steps, expected)
        self.alphas_cumprod = cumprod.float()
        self.alphas = cumprod.sqrt().float()
        self.sigmas = (1.0 - cumprod).sqrt().float()
        self._tables: dict[torch.device, Tensor] = {}

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal at t. Shapes: t (...) int64 -> (...) float32."""
        return self._table(t.device)[0, t]

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at t. Shapes: t (...) int64 -> (...) float32."""
        return self._table(t.device)[1, t]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of a clean latent. Shapes: x0, noise (B, ..., D), t (B,) int64 -> (B, ..., D) float32."""
        alpha, sigma = self._coefficients(x0, t)
        return alpha * x0.float() + sigma * noise.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, kind: Prediction) -> Tensor:
        """What the denoiser should put out. Shapes: x0, noise (B, ..., D), t (B,) int64 -> (B, ..., D) float32."""
        if kind == "x0":
            return x0.float()
        if kind == "eps":
            return noise.float()
        _check_kind(kind)
        alpha, sigma = self._coefficients(x0, t)
        return alpha * noise.float() - sigma * x0.float()

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor, kind: Prediction) -> Tensor:
        """The clean latent that a denoiser's output stands for.

        For eps the division by alpha is guarded at 1e-3 (only the last step of the cosine schedule is below it): there
        x_t holds no signal, and an unguarded quotient would magnify the output's error 20,000 times.

        Shapes   output, x_t (B, ..., D), t (B,) int64 -> (B, ..., D) float32
        """
        if kind == "x0":
            return output.float()
        alpha, sigma = self._coefficients(x_t, t)
        if kind == "eps":
            return (x_t.float() - sigma * output.float()) / alpha.clamp_min(MIN_ALPHA)
        _check_kind(kind)
        return alpha * x_t.float() - sigma * output.float()

    def to_eps(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise in x_t, were x0 its clean latent; sigma is guarded at 1e-4 (never reached for T = 1000).

        Shapes   x0, x_t (B, ..., D), t (B,) int64 -> (B, ..., D) float32
        """
        alpha, sigma = self._coefficients(x_t, t)
        return (x_t.float() - alpha * x0.float()) / sigma.clamp_min(MIN_SIGMA)

    def _coefficients(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t) with trailing dimensions of 1, to multiply a tensor shaped as `like`."""
        alpha, sigma = self._table(like.device)[:, t]
        trailing = (1,) * (like.ndim - t.ndim)
        return alpha.reshape(t.shape + trailing), sigma.reshape(t.shape + trailing)

    def _table(self, device: torch.device) -> Tensor:
        """alphas and sigmas, (2, T), on a device."""
        if device not in self._tables:
            self._tables[device] = torch.stack([self.alphas, self.sigmas]).to(device)
        return self._tables[device]


def _betas(num_train_steps: int, kind: str) -> Tensor:
    """Noise added by each step. Shapes: -> (T,) float64."""
    if kind == "linear":
        return torch.linspace(*LINEAR_BETA_RANGE, num_train_steps, dtype=torch.float64, device="cpu")
    if kind != "cosine":
        raise ConfigError("head.schedule", kind, "'cosine' or 'linear'")
    bars = [math.cos((t / num_train_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(num_train_steps + 1)]
    betas = [1.0 - after / before for before, after in zip(bars, bars[1:])]
    return torch.tensor(betas, dtype=torch.float64, device="cpu").clamp_max(MAX_COSINE_BETA)


def _check_kind(kind: str) -> None:
    """Refuse a prediction that is none of the three ('v' is what is left after the other two)."""
    if kind != "v":
        raise ConfigError("head.prediction", kind, "'x0', 'v' or 'eps'")

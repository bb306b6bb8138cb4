"""Ranking by the model's own likelihood: log p(item | history) of a diffusion model, estimated for candidates.

A denoiser that knows the history removes noise from an item's latents better than one that does not, by as much as the
history makes the item likely:

    log p(i | h) ~ log p(i) + 1/2 * integral over log-SNR of SNR * E[ |mu_i - x0(z_t, null)|^2 - |mu_i - x0(z_t, h)|^2 ]

The noise is shared by all candidates, so that its error cancels in the order; the null part depends on the item alone.
Cost     (B * C + unique items) * levels * draws calls of the denoiser, at one noise level and by chunks of whole users, so that
         its modulation is computed once a user, as in sampling.
Source   I-MMSE: Guo, Shamai, Verdu, arXiv cs/0412108; diffusion as a classifier: arXiv 2303.16203
"""

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from contrec_dist.model.noise_schedule import NoiseSchedule

LOG_SNR_RANGE = (-6.0, 4.0)
CHUNK_ROWS = 2048  # latents that are denoised at a time: they fit a core's cache
Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"(z (C, b, D), step (1,), condition (b, W), or None for the null one and b = 1) -> x0 (C, b, D)"


@dataclass(frozen=True)
class NoiseLevels:
    """Where the integral is evaluated. Shapes   steps (L,) int64, weights (L,) float64 = SNR * width in log-SNR / 2."""

    steps: Tensor
    weights: Tensor

    @classmethod
    def spread(cls, schedule: NoiseSchedule, count: int) -> "NoiseLevels":
        """Steps whose log-SNR are nearest to `count` evenly spaced ones, with the weights of the trapezoidal rule."""
        log_snr = 2 * (schedule.alphas.double().log() - schedule.sigmas.double().log())  # falls with the step
        wanted = torch.linspace(*LOG_SNR_RANGE, count, dtype=torch.float64)
        steps = torch.unique((log_snr[None, :] - wanted[:, None]).abs().argmin(dim=1))
        places = log_snr[steps]
        widths = torch.zeros(len(steps), dtype=torch.float64)
        gaps = (places[:-1] - places[1:]) / 2
        widths[:-1] += gaps
        widths[1:] += gaps
        return cls(steps, places.exp() * widths / 2)


def likelihood_gain(
    denoise: Denoise, schedule: NoiseSchedule, levels: NoiseLevels, *, latents: Tensor, condition: Tensor,
    candidates: Tensor, num_draws: int, generator: torch.Generator,
) -> Tensor:
    """log p(i | h) - log p(i) of each user's candidates, up to a constant of the user.

    Shapes   latents (M, D) of the items that occur, condition (B, W), candidates (B, C) rows of `latents` -> (B, C) float64
    Units    nats
    """
    gain = torch.zeros(candidates.shape, dtype=torch.float64, device=latents.device)
    users_at_once = max(1, CHUNK_ROWS // candidates.shape[1])
    for step, weight in zip(levels.steps.to(latents.device)[:, None], levels.weights.tolist()):
        for _ in range(num_draws):
            noise = torch.randn(latents.shape[1], generator=generator).to(latents.device)
            noised = schedule.add_noise(latents, noise.expand_as(latents), step.expand(len(latents)))
            blind = _blind_errors(denoise, latents, noised, step)
            for start in range(0, len(candidates), users_at_once):
                rows = slice(start, start + users_at_once)
                chosen = candidates[rows].T  # (C, b)
                told = _squared_error(latents[chosen], denoise(noised[chosen], step, condition[rows]))
                gain[rows] += weight / num_draws * (blind[chosen] - told).T
    return gain


def _blind_errors(denoise: Denoise, latents: Tensor, noised: Tensor, step: Tensor) -> Tensor:
    """Errors of every item under the null condition. Shapes   (M, D) -> (M,) float64"""
    parts = zip(latents.split(CHUNK_ROWS), noised.split(CHUNK_ROWS))
    return torch.cat([_squared_error(part, denoise(z[:, None], step, None)[:, 0]) for part, z in parts])


def _squared_error(latents: Tensor, denoised: Tensor) -> Tensor:
    """|mu - x0|^2. (..., D) -> (...) float64"""
    return (latents - denoised).double().square().sum(dim=-1)


class LikelihoodRanker:
    """Scores candidates by the likelihood of a trained head. `log_prior` (N,) is log p(item)."""

    def __init__(self, model, item_latents: np.ndarray, log_prior: np.ndarray, *, num_levels: int, num_draws: int):
        self.model, self.item_latents, self.log_prior, self.num_draws = model, item_latents, log_prior, num_draws
        self.levels = NoiseLevels.spread(model.head.schedule, num_levels)

    @torch.no_grad()
    def score(self, condition: Tensor, item_idx: np.ndarray, seed: int) -> np.ndarray:
        """log p(i | h) up to a constant of the user; -inf where item_idx is -1. (B, D), (B, C) -> (B, C) float32"""
        items, place = np.unique(np.maximum(item_idx, 0), return_inverse=True)
        device = condition.device
        latents = torch.from_numpy(np.array(self.item_latents[items], dtype=np.float32)).to(device)
        gain = likelihood_gain(
            self._denoise, self.model.head.schedule, self.levels,
            latents=self.model.normalise(latents).flatten(1),
            condition=self.model.head.norm(condition.float()),
            candidates=torch.from_numpy(place.reshape(item_idx.shape)).to(device),
            num_draws=self.num_draws,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        scores = gain.cpu().numpy() + self.log_prior[np.maximum(item_idx, 0)]
        return np.where(item_idx >= 0, scores, -np.inf).astype(np.float32)

    def _denoise(self, z: Tensor, step: Tensor, condition: Tensor | None) -> Tensor:
        head = self.model.head
        return head.predict_x0(z, step, head.null_conditions(1) if condition is None else condition)

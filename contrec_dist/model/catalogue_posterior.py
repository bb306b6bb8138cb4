"""The denoiser of a finite catalogue in closed form: no training beyond the ranking, exact at every noise step.

With logits l_i(h) of p(item | history) from the cross-entropy at pure noise, and latents mu_i, Bayes' rule gives

    p(i | x_t, h) = softmax_i( l_i(h) + a_t / s_t^2 <x_t, mu_i> - a_t^2 / (2 s_t^2) |mu_i|^2 ),    x0 = sum_i p(i | x_t, h) mu_i

for x_t = a_t mu_i + s_t eps. Guidance w stands for p(i | h)^(1 + w) / p(i)^w. At t = T - 1 the posterior is the ranking itself.
Used by score with `head.kind: bayes`; the learned denoiser of `head.kind: denoiser` converges to it (a test shows it).
Cost     4 rows C W FLOP a call for C items: the whole catalogue, or each user's candidates from the index.
"""

import torch
from torch import Tensor

from contrec_dist.model.noise_schedule import NoiseSchedule


class CataloguePosterior:
    """p(item | x_t, history) over the items given, and the clean latent that it expects.

    Shapes   latents (C, W) for all users, or (B, C, W) each user's own candidates, normalised; logits (B, C), -inf for none
    """

    def __init__(self, latents: Tensor, logits: Tensor, schedule: NoiseSchedule):
        self.latents, self.logits, self.schedule = latents.float(), logits.float(), schedule
        self.half_norms = self.latents.square().sum(-1) / 2  # (C,) or (B, C)

    def log_probabilities(self, x_t: Tensor, step: Tensor) -> Tensor:
        """x_t (..., B, W) with one step for all, step () or (n,) of equal steps -> (..., B, C) log p(i | x_t, h)"""
        now = step.flatten()[0]
        ratio = self.schedule.alpha(now) / self.schedule.sigma(now)
        scaled = x_t.float() * ratio / self.schedule.sigma(now)
        evidence = torch.einsum(self._equation("...bw,{}->...bc"), scaled, self.latents)
        return torch.log_softmax(self.logits + evidence - ratio.square() * self.half_norms, dim=-1)

    def predict_x0(self, x_t: Tensor, step: Tensor) -> Tensor:
        """E[x0 | x_t, h]. Shapes   as log_probabilities -> (..., B, W)"""
        weights = self.log_probabilities(x_t, step).exp()
        return torch.einsum(self._equation("...bc,{}->...bw"), weights, self.latents)

    def _equation(self, pattern: str) -> str:
        return pattern.format("bcw" if self.latents.ndim == 3 else "cw")


def guide(logits: Tensor, log_prior: Tensor, guidance: float) -> Tensor:
    """Logits of p(i | h)^(1 + w) / p(i)^w. Shapes   logits (B, C), log_prior (C,) or (B, C) -> (B, C)"""
    return logits if guidance == 0.0 else (1 + guidance) * logits - guidance * log_prior

"""Ranking by likelihood, on a finite catalogue whose posterior is known in closed form."""

import numpy as np
import pytest
import torch

from contrec_dist.model.noise_schedule import NoiseSchedule
from contrec_dist.retrieval.likelihood import LikelihoodRanker, NoiseLevels, likelihood_gain

NUM_ITEMS, WIDTH = 12, 16


@pytest.fixture
def catalogue():
    """Latents of unit variance, the popularity of the items, and two histories' own distributions."""
    draw = torch.Generator().manual_seed(3)
    latents = torch.randn(NUM_ITEMS, WIDTH, generator=draw)
    prior = torch.softmax(torch.randn(NUM_ITEMS, generator=draw), 0)
    own = torch.softmax(2.5 * torch.randn(2, NUM_ITEMS, generator=draw), 1)
    return latents, prior, own


def bayes_denoiser(schedule, latents, prior):
    """The best denoiser there is: the posterior mean over the catalogue, exact; a condition is a distribution."""

    def denoise(z, step, condition):
        weights = prior[None] if condition is None else condition  # (b, N)
        alpha, sigma = schedule.alpha(step), schedule.sigma(step)
        distance = (z[..., None, :] - alpha * latents).square().sum(-1)  # (C, b, N)
        return torch.softmax(weights.log() - distance / (2 * sigma**2), dim=-1) @ latents

    return denoise


def test_the_gain_of_the_best_denoiser_is_the_log_ratio_of_posterior_and_prior(catalogue):
    latents, prior, own = catalogue
    schedule = NoiseSchedule(num_train_steps=1000)
    gain = likelihood_gain(
        bayes_denoiser(schedule, latents, prior), schedule, NoiseLevels.spread(schedule, 40), latents=latents,
        condition=own, candidates=torch.arange(NUM_ITEMS).expand(2, -1), num_draws=200,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    exact = (own.log() - prior.log()).double()
    centred = lambda rows: rows - (rows * own).sum(1, keepdim=True)  # noqa: E731  a user's constant is free
    torch.testing.assert_close(centred(gain), centred(exact), atol=0.35, rtol=0.05)
    assert (gain.argsort(1)[:, -3:] == exact.argsort(1)[:, -3:]).all()


def test_without_a_history_there_is_no_gain(catalogue):
    latents, prior, _ = catalogue
    schedule = NoiseSchedule(num_train_steps=1000)
    gain = likelihood_gain(
        bayes_denoiser(schedule, latents, prior), schedule, NoiseLevels.spread(schedule, 8), latents=latents,
        condition=prior[None], candidates=torch.arange(NUM_ITEMS)[None], num_draws=1,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    torch.testing.assert_close(gain, torch.zeros(1, NUM_ITEMS, dtype=torch.float64), atol=1e-4, rtol=0)


def test_levels_rise_with_the_step_and_their_weights_integrate_the_snr():
    levels = NoiseLevels.spread(NoiseSchedule(num_train_steps=1000), 60)
    assert (levels.steps.diff() > 0).all() and (levels.weights > 0).all()
    exact = (np.exp(4.0) - np.exp(-6.0)) / 2  # half the integral of exp over the range
    assert abs(float(levels.weights.sum()) / exact - 1) < 0.05


def test_scores_follow_the_candidates_and_absent_ones_are_minus_infinity(make_world):
    world = make_world([[1, 2, 3, 4, 5], [6, 7, 8, 9]])
    model = world.build_model()
    prior = np.linspace(-3, -1, len(world.item_latents)).astype(np.float32)
    ranker = LikelihoodRanker(model, world.item_latents, prior, num_levels=4, num_draws=1)
    condition = torch.randn(2, model.head.norm.normalized_shape[0], generator=torch.Generator().manual_seed(1))
    item_idx = np.array([[3, 9, 4, -1], [0, 3, 2, 1]])
    scores = ranker.score(condition, item_idx, seed=5)
    assert scores[0, 3] == -np.inf and np.isfinite(scores[item_idx >= 0]).all()
    turned = ranker.score(condition, item_idx[:, ::-1].copy(), seed=5)[:, ::-1]
    np.testing.assert_allclose(scores, turned, rtol=1e-5)

"""model/catalogue_posterior.py: the closed form against enumeration, its two ends, and what a trained denoiser becomes."""

import math

import pytest
import torch

from contrec_dist.config import HeadConfig
from contrec_dist.model.catalogue_posterior import CataloguePosterior, guide
from contrec_dist.model.diffusion_head import DiffusionHead
from contrec_dist.model.noise_schedule import NoiseSchedule

ITEMS, WIDTH, USERS = 12, 6, 3
SCHEDULE = NoiseSchedule(num_train_steps=1000)


def toy(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """latents (N, W) of unequal norms, logits (B, N) that are no probabilities."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(ITEMS, WIDTH, generator=draw), 2.0 + 1.5 * torch.randn(USERS, ITEMS, generator=draw)


@pytest.mark.parametrize("step", [0, 250, 600, 999])
def test_closed_form_equals_enumeration_of_the_posterior(step):
    latents, logits = toy()
    x_t = torch.randn(2, USERS, WIDTH, generator=torch.Generator().manual_seed(1))
    alpha, sigma = float(SCHEDULE.alphas[step]), float(SCHEDULE.sigmas[step])
    posterior = CataloguePosterior(latents, logits, SCHEDULE)
    found = posterior.predict_x0(x_t, torch.tensor([step]))
    for sample in range(2):
        for user in range(USERS):
            prior = torch.softmax(logits[user].double(), 0)
            distance = (x_t[sample, user].double() - alpha * latents.double()).square().sum(1)
            log_density = -distance / (2 * sigma**2) - WIDTH * math.log(sigma)
            joint = (prior.log() + log_density - (prior.log() + log_density).max()).exp()
            expected = (joint / joint.sum()) @ latents.double()
            torch.testing.assert_close(found[sample, user].double(), expected, atol=1e-4, rtol=1e-4)


def test_own_candidates_of_each_user_give_what_the_whole_catalogue_gives():
    latents, logits = toy()
    x_t, step = torch.randn(4, USERS, WIDTH, generator=torch.Generator().manual_seed(2)), torch.tensor([500])
    order = torch.stack([torch.randperm(ITEMS, generator=torch.Generator().manual_seed(user)) for user in range(USERS)])
    whole = CataloguePosterior(latents, logits, SCHEDULE).predict_x0(x_t, step)
    own = CataloguePosterior(latents[order], logits.gather(1, order), SCHEDULE).predict_x0(x_t, step)
    torch.testing.assert_close(own, whole, atol=1e-5, rtol=1e-5)


def test_pure_noise_leaves_the_ranking_and_clean_latents_leave_one_item():
    latents, logits = toy()
    posterior = CataloguePosterior(latents, logits, SCHEDULE)
    noise = torch.randn(USERS, WIDTH, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        posterior.log_probabilities(noise, torch.tensor([999])), torch.log_softmax(logits, 1), atol=1e-3, rtol=1e-3
    )
    clean = posterior.predict_x0(float(SCHEDULE.alphas[0]) * latents[:USERS], torch.tensor([0]))
    torch.testing.assert_close(clean, latents[:USERS], atol=1e-4, rtol=1e-4)


def test_guidance_is_the_power_of_bayes_rule():
    _, logits = toy()
    log_prior = torch.log_softmax(torch.randn(ITEMS, generator=torch.Generator().manual_seed(4)), 0)
    wanted = torch.softmax(logits, 1) ** 3 / log_prior.exp() ** 2
    torch.testing.assert_close(torch.softmax(guide(logits, log_prior, 2.0), 1), wanted / wanted.sum(1, keepdim=True))


def test_samples_of_the_closed_form_come_from_the_models_own_distribution():
    latents, logits = toy()
    head = DiffusionHead(HeadConfig(kind="bayes", query_dim=4), condition_width=8, latent_width=WIDTH)
    posterior = CataloguePosterior(latents, logits, head.schedule)
    samples = head.sample(
        torch.zeros(USERS, 8), num_samples=4000, num_steps=100, solver="ddpm", guidance=0.0,
        generator=torch.Generator().manual_seed(5),
        denoise=lambda rows, x_t, step: CataloguePosterior(latents, logits[rows], head.schedule).predict_x0(x_t, step),
    )
    nearest = torch.cdist(samples, latents.expand(4000, -1, -1)).argmin(-1)  # (S, B)
    share = torch.stack([torch.bincount(nearest[:, user], minlength=ITEMS) for user in range(USERS)]) / 4000
    assert (share - torch.softmax(posterior.logits, 1)).abs().max() < 0.03  # 4 standard errors of a share of one half


def test_trained_denoiser_converges_to_the_closed_form():
    """Three histories, each with its own distribution over the catalogue; the head sees draws from them alone."""
    latents, logits = toy()
    torch.manual_seed(0)
    config = HeadConfig(width=96, num_blocks=2, query_dim=4, condition_drop=0.0, dropout=0.0)
    head = DiffusionHead(config, condition_width=8, latent_width=WIDTH)
    conditions = torch.randn(USERS, 8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    draw = torch.Generator().manual_seed(6)
    for _ in range(500):
        user = torch.randint(USERS, (256,), generator=draw)
        item = torch.multinomial(torch.softmax(logits[user], 1), 1, generator=draw)[:, 0]
        head.losses(conditions[user], latents[item], 0.5, draw)["diffusion"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    posterior, distances = CataloguePosterior(latents, logits, SCHEDULE), []
    for step in (200, 400, 600, 800):
        item = torch.multinomial(torch.softmax(logits, 1), 200, replacement=True, generator=draw).T  # (200, B)
        steps = torch.tensor([step])
        x_t = SCHEDULE.add_noise(latents[item], torch.randn(200, USERS, WIDTH, generator=draw), torch.full((200,), step))
        with torch.no_grad():
            learned = head.predict_x0(x_t, steps, head.norm(conditions))
        distances.append(float((learned - posterior.predict_x0(x_t, steps)).square().mean()))
    assert max(distances) < 0.06 * float(latents.var()), distances

"""baselines/tiger/rq_vae.py."""

import numpy as np
import pytest
import torch

from contrec_dist.baselines.tiger.rq_vae import RqVae, encode_rows, fit_rq_vae, measure_codes
from contrec_dist.config import TigerConfig
from contrec_dist.errors import DataError

CONFIG = TigerConfig(num_codes=8, latent_dim=6, hidden_dims=[32], rqvae_steps=300, rqvae_batch_rows=64, rqvae_learning_rate=3e-3)


def make_rows(num_rows=240, seed=0):
    """8 groups of 4 sub-groups each, with a little noise: two levels of codes say nearly all."""
    draw = np.random.default_rng(seed)
    groups, parts = draw.normal(size=(8, 10)) * 3, draw.normal(size=(4, 10))
    number = np.arange(num_rows)
    return (groups[number % 8] + parts[number // 8 % 4] + 0.05 * draw.normal(size=(num_rows, 10))).astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    rows = make_rows()
    model, losses = fit_rq_vae(rows, CONFIG, 0)
    return rows, model, losses


def test_round_trip_keeps_the_rows(fitted):
    rows, model, _ = fitted
    codes = encode_rows(model, rows)
    facts = measure_codes(model, rows, codes)
    assert codes.shape == (240, 3) and codes.min() >= 0 and codes.max() < 8
    assert facts["relative_error"] < 0.15
    assert min(facts["perplexity"][:2]) > 3


def test_every_level_takes_the_nearest_code_of_what_is_left(fitted):
    rows, model, _ = fitted
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(rows))
        codes, _ = model.quantize(latents)
        for level, book in enumerate(model.codebooks):
            assert (torch.cdist(latents, book).argmin(1) == codes[:, level]).float().mean() > 0.995
            latents = latents - book[codes[:, level]]
        torch.testing.assert_close(model.sum_codes(codes) + latents, model.encode(torch.from_numpy(rows)))


def test_same_seed_same_bits_and_no_other_random_state(fitted):
    rows, model, losses = fitted
    torch.manual_seed(5)
    before, kept = torch.get_rng_state(), rows.copy()
    again, losses_again = fit_rq_vae(rows, CONFIG, 0)
    assert losses == losses_again and torch.equal(model.codebooks, again.codebooks)
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(rows, kept)
    assert not torch.equal(fit_rq_vae(rows, CONFIG, 1)[0].codebooks, model.codebooks)


def test_gradients_go_where_each_term_belongs():
    rows = torch.from_numpy(make_rows(40))
    model = RqVae(rows, CONFIG)
    model.start_from_kmeans(rows, 0)

    def reached(term):
        model.zero_grad()
        model.loss(rows)[0][term].backward()
        norm = lambda parameters: sum(p.grad.abs().sum().item() for p in parameters if p.grad is not None)  # noqa: E731
        return norm(model.encoder.parameters()) > 0, norm([model.codebooks]) > 0

    assert reached("reconstruction") == (True, False)  # straight through the codes
    assert reached("codebook") == (False, True)
    assert reached("commitment") == (True, False)


def test_start_from_kmeans_leaves_no_code_unused():
    rows = torch.from_numpy(make_rows(200))
    model = RqVae(rows, CONFIG)
    model.start_from_kmeans(rows, 0)
    with torch.no_grad():
        codes, _ = model.quantize(model.encode(rows))
    assert len(codes[:, 0].unique()) == 8


def test_dead_codes_move_onto_residuals_and_living_ones_stay():
    rows = torch.from_numpy(make_rows(64))
    model = RqVae(rows, CONFIG)
    with torch.no_grad():
        model.start_from_kmeans(rows, 0)
        model.codebooks[:, 3] = 1e3  # nothing is near it
        before = model.codebooks.clone()
        _, residuals = model.quantize(model.encode(rows))
    dead = torch.zeros(3, 8, dtype=torch.bool)
    dead[:, 3] = True
    model.reset_codes(dead, rows, torch.Generator().manual_seed(0))
    assert torch.equal(model.codebooks[:, [0, 1, 2, 4, 5, 6, 7]], before[:, [0, 1, 2, 4, 5, 6, 7]])
    for level in range(3):
        assert (torch.cdist(model.codebooks[level, 3:4], residuals[level]).min() < 1e-5).item()


def test_fewer_rows_than_codes_and_wrong_rows():
    model, _ = fit_rq_vae(make_rows(5), TigerConfig(hidden_dims=[8], rqvae_steps=2), 0)
    assert model.codebooks.shape == (3, 5, 32)
    with pytest.raises(DataError, match="at least 2"):
        fit_rq_vae(make_rows(1), CONFIG, 0)
    bad = make_rows(5)
    bad[3, 1] = np.nan
    with pytest.raises(DataError, match="first 3"):
        fit_rq_vae(bad, CONFIG, 0)

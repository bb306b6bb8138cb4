"""Probes against hand computation, and the quantised yardsticks."""

import numpy as np
import pytest
import torch

from contrec_dist.config import TokenizerConfig
from contrec_dist.tokenizer import probes
from contrec_dist.tokenizer.quantized import MAX_LEVELS, count_equal_levels, quantize_product, quantize_residual
from contrec_dist.tokenizer.sigma_vae import InputSpace, SigmaVAE


def toy_rows(num_rows: int = 300, width: int = 12) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_rows, width)).astype(np.float32)


def test_neighbours_on_a_line_by_hand():
    rows = np.array([[0.0], [1.0], [3.0], [7.0]], np.float32)
    assert probes.find_neighbours(rows, np.array([0, 2, 3]), 2).tolist() == [[1, 2], [1, 0], [2, 1]]


def test_neighbours_never_contain_the_row_itself_among_equal_rows():
    rows = np.zeros((30, 2), np.float32)
    found = probes.find_neighbours(rows, np.arange(30), 10)
    assert found.shape == (30, 10) and not (found == np.arange(30)[:, None]).any()


def test_neighbours_are_fewer_in_a_small_set():
    assert probes.find_neighbours(toy_rows(4), np.arange(4)).shape == (4, 3)


def test_overlap_by_hand():
    before, after = np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 9]])
    assert probes.measure_overlap(before, after) == pytest.approx(0.75)


def test_relative_error_by_hand():
    rows = np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)  # mean variance 1/2
    assert probes.measure_relative_error(rows, rows) == 0
    assert probes.measure_relative_error(rows, np.zeros_like(rows)) == pytest.approx(1)
    assert probes.measure_relative_error(rows, rows + 0.5) == pytest.approx(0.5)


def test_effective_rank_by_hand():
    corners = np.array([[1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]], np.float32)
    assert probes.compute_effective_rank(corners) == pytest.approx(2)
    assert probes.compute_effective_rank(corners[:, :1] @ np.ones((1, 5), np.float32)) == pytest.approx(1, abs=1e-5)
    assert probes.compute_effective_rank(np.ones((4, 3), np.float32)) == 0


def test_spectrum_is_the_covariance_eigenvalues():
    rows = toy_rows()
    expected = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]
    np.testing.assert_allclose(probes.compute_spectrum(rows), expected, rtol=1e-5)


def test_collisions_by_hand():
    assert probes.measure_collisions(np.array([[1, 2], [1, 2], [3, 4], [1, 3]])) == pytest.approx(0.5)
    assert probes.measure_collisions(np.arange(4)[:, None]) == 0


@pytest.mark.parametrize("quantize", [quantize_residual, quantize_product])
def test_quantised_rows_get_better_with_more_codes_and_are_deterministic(quantize):
    rows = toy_rows()
    few, many, again = (quantize(rows, codes, 0) for codes in (2, 6, 6))
    errors = [probes.measure_relative_error(rows, quantized.reconstruction) for quantized in (few, many)]
    assert errors[1] < errors[0] < 1
    assert np.array_equal(many.codes, again.codes) and np.array_equal(many.reconstruction, again.reconstruction)
    assert (few.bits, many.bits) == (16, 48) and len(many.codes) == 300


def test_quantisers_take_the_bits_that_rows_and_width_allow():
    assert quantize_residual(toy_rows(20), 3, 0).bits == 3 * 4
    assert quantize_product(toy_rows(), 5, 0).name == "PQ 6 x 8 bits"  # 12 dimensions: 4 or 6 parts, 6 is nearer to 5


def test_equal_levels_by_hand():
    assert [count_equal_levels(bits) for bits in (0.5, 24, 213, 10_000, float("inf"))] == [1, 3, 27, MAX_LEVELS, MAX_LEVELS]


@pytest.fixture(scope="module")
def measured():
    rows, config = toy_rows(), TokenizerConfig(num_item_tokens=2, latent_dim=4, hidden_dim=8, probe_rows=50, sigma=1.0)
    torch.manual_seed(0)
    vae = SigmaVAE(12, config, InputSpace.fit(torch.from_numpy(rows), whiten=True, floor=1.0)).eval()
    return vae, rows, config, probes.measure_tokenizer(vae, rows, config, seed=0)


def test_every_method_is_measured_with_its_bits(measured):
    *_, result = measured
    assert [(r["method"], r["bits"]) for r in result["methods"]] == [
        ("sigma-VAE", 4.0), ("RQ 3 x 8 bits", 24), ("RQ 1 x 8 bits", 8), ("PQ 1 x 8 bits", 8)
    ]  # fmt: skip
    assert result["num_rows"] == 300 and result["num_queries"] == 50 and len(result["latent_spectrum"]) == 8


def test_measured_values_equal_a_direct_computation(measured):
    vae, rows, config, result = measured
    with torch.no_grad():
        mu = vae.encode(torch.from_numpy(rows))
        decoded = vae.decode(mu).numpy()
    record = result["methods"][0]
    assert record["relative_mse"] == pytest.approx(((decoded - rows) ** 2).mean() / rows.var(0).mean(), rel=1e-4)
    assert record["latent_variance_mean"] == pytest.approx(mu.var(0, correction=0).mean().item(), rel=1e-3)
    assert record["latent_variance_min"] == pytest.approx(mu.flatten(1).var(0, correction=0).min().item(), rel=1e-3)


def test_measuring_is_deterministic(measured):
    vae, rows, config, result = measured
    assert probes.measure_tokenizer(vae, rows, config, seed=0) == result


def test_no_noise_means_no_finite_capacity_and_is_reported_as_none():
    rows, config = toy_rows(60), TokenizerConfig(num_item_tokens=1, latent_dim=4, hidden_dim=8, sigma=0.0)
    result = probes.measure_tokenizer(SigmaVAE(12, config), rows, config, seed=0)
    assert result["methods"][0]["bits"] is None

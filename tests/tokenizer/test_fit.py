"""Training of the sigma-VAE: it learns, it does not collapse, and the seed decides."""

import numpy as np
import pytest
import torch

from contrec_dist.config import TokenizerConfig
from contrec_dist.errors import DataError
from contrec_dist.tokenizer.fit import fit_tokenizer
from contrec_dist.tokenizer.probes import compute_effective_rank

NUM_STEPS = 150


def toy_rows() -> np.ndarray:
    """400 rows that lie near an 8-dimensional plane of 16 dimensions."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(400, 8)) @ rng.normal(size=(8, 16)) + 0.05 * rng.normal(size=(400, 16))).astype(np.float32)


def toy_config(**settings) -> TokenizerConfig:
    return TokenizerConfig(**{"num_item_tokens": 2, "latent_dim": 8, "hidden_dim": 32, "batch_rows": 64, "learning_rate": 3e-3, **settings})


def fit_toy(
    seed: int = 0, rows: np.ndarray | None = None, num_steps: int = NUM_STEPS, collaborative: slice | None = None, **settings
):
    rows = toy_rows() if rows is None else rows
    return fit_tokenizer(rows, toy_config(**settings), seed, num_steps=num_steps, what="item", collaborative=collaborative)


@pytest.fixture(scope="module")
def trained():
    return fit_toy()


def encode(vae, rows: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(torch.from_numpy(rows))


def test_training_reconstructs_most_of_the_variance(trained):
    vae, rows = trained[0], toy_rows()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(torch.from_numpy(rows))).numpy()
    assert ((decoded - rows) ** 2).mean() < 0.2 * rows.var(0).mean()


def test_latents_do_not_collapse(trained):
    mu = encode(trained[0], toy_rows())
    assert compute_effective_rank(mu.flatten(1).numpy()) > 8
    assert mu.var(0).min() > 0.05


def test_the_noise_keeps_latents_larger_than_itself_against_the_pull():
    variances = {sigma: encode(fit_toy(sigma=sigma, kl_weight=0.05)[0], toy_rows()).var(0).mean() for sigma in (0.0, 0.5)}
    assert variances[0.5] > 2 * variances[0.0] and variances[0.5] > 0.5**2


def test_decorrelation_keeps_the_ways_apart():
    on, off = (fit_toy(decorrelation_weight=weight)[1][-1]["decorrelation"] for weight in (0.05, 0.0))
    assert on < 0.5 * off


def test_text_alone_finds_the_collaborative_part_where_it_was_dropped_in_training():
    """The first 4 columns are 4 of the others, mixed: what is left of a row tells all of it."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(400, 8)).astype(np.float32)
    rows = np.concatenate([text[:, :4] @ np.linalg.qr(rng.normal(size=(4, 4)))[0].astype(np.float32), text], axis=1)
    new = rows.copy()
    new[:, :4] = 0.0
    errors = {}
    for share in (0.0, 0.5):
        vae, _ = fit_toy(rows=rows, latent_dim=16, collaborative_drop=share, num_steps=300, collaborative=slice(0, 4))
        with torch.no_grad():
            errors[share] = ((vae.decode(encode(vae, new)).numpy() - rows) ** 2)[:, :4].mean()
    assert errors[0.5] < 0.05 < 0.15 < errors[0.0]


def test_columns_are_dropped_only_where_they_are_named_and_a_share_is_set():
    plain = fit_toy(num_steps=3)[1]
    assert fit_toy(num_steps=3, collaborative=slice(0, 4))[1] == plain == fit_toy(num_steps=3, collaborative_drop=0.5)[1]
    assert fit_toy(num_steps=3, collaborative_drop=0.5, collaborative=slice(0, 4))[1] != plain


def test_same_seed_same_bits_and_another_seed_others():
    runs = [fit_toy(seed=seed, num_steps=5) for seed in (1, 1, 2)]
    states = [torch.cat([p.flatten() for p in vae.parameters()]) for vae, _ in runs]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert runs[0][1] == runs[1][1]


def test_training_neither_reads_nor_changes_the_global_random_state():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = fit_toy(num_steps=3)[1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert fit_toy(num_steps=3)[1] == first


def test_training_does_not_modify_the_rows():
    rows = toy_rows()
    fit_toy(rows=rows, num_steps=3)
    assert np.array_equal(rows, toy_rows())


def test_loss_curve_falls_and_covers_the_run(trained):
    curve = trained[1]
    assert [record["step"] for record in curve] == list(range(1, NUM_STEPS + 1))
    assert curve[-1]["reconstruction"] < 0.5 * curve[0]["reconstruction"]


def test_one_row_and_infinite_rows_are_refused():
    with pytest.raises(DataError, match="at least 2"):
        fit_toy(rows=toy_rows()[:1])
    bad = toy_rows()
    bad[7, 3] = np.nan
    with pytest.raises(DataError, match="first 7"):
        fit_toy(rows=bad)

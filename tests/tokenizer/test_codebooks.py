"""Code books: hand-computed codes, levels that leave less over, and tokenizers that have some."""

import json
import math

import numpy as np
import pytest
import torch

from contrec_dist.config import TokenizerConfig
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.tokenizer import codebooks
from contrec_dist.tokenizer.codebooks import Codebooks
from contrec_dist.tokenizer.fit import fit_tokenizer
from contrec_dist.tokenizer.sigma_vae import SigmaVAE

NUM_ROWS, NUM_CODES = 60, 8


def draw(num_rows: int = NUM_ROWS, *shape: int) -> torch.Tensor:
    return torch.randn(num_rows, *shape, generator=torch.Generator().manual_seed(0))


def fit_toy(kind: str, **settings) -> tuple[SigmaVAE, torch.Tensor]:
    """A tokenizer of 2 x 3 numbers fitted on 60 rows of 10, and the rows."""
    rows = draw(NUM_ROWS, 10)
    sizes = {"num_item_tokens": 2, "latent_dim": 3, "hidden_dim": 8, "num_codes": NUM_CODES, "num_levels": 2}
    config = TokenizerConfig(kind=kind, **{**sizes, **settings})
    return fit_tokenizer(rows.numpy(), config, 0, num_steps=4, what="item")[0], rows


def encode(tokenizer: SigmaVAE, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tokenizer.encode(rows)


def test_codes_of_two_levels_by_hand():
    books = torch.tensor([[[[0.0, 0.0], [10.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]])  # (1, 2, 2, 2)
    latents = torch.tensor([[[10.9, 0.2]], [[0.1, 0.9]]])
    quantiser = Codebooks(books)
    assert quantiser.find_codes(latents).tolist() == [[[1, 1]], [[0, 0]]]
    assert quantiser(latents).tolist() == [[[11.0, 0.0]], [[0.0, 1.0]]]
    assert quantiser.bits == 2


def test_every_token_has_a_book_of_its_own():
    books = torch.tensor([[[[1.0], [2.0]]], [[[-1.0], [-2.0]]]])  # (2, 1, 2, 1)
    assert Codebooks(books)(torch.tensor([[[1.9], [1.9]]])).tolist() == [[[2.0], [-1.0]]]


def test_codes_are_the_nearest_by_brute_force():
    quantiser, latents = Codebooks.fit(draw(NUM_ROWS, 2, 3), num_levels=1, num_codes=5, seed=0), draw(20, 2, 3)
    distances = (latents[:, :, None] - quantiser.vectors[None, :, 0]).square().sum(-1)  # (20, 2, 5)
    assert torch.equal(quantiser.find_codes(latents)[..., 0], distances.argmin(-1))


def test_one_code_a_cluster_is_the_cluster_mean():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    rows = (centres[:, None] + torch.tensor([[0.5, 0.0], [-0.5, 0.0]])).reshape(-1, 1, 2)
    fitted = Codebooks.fit(rows, num_levels=1, num_codes=3, seed=0)
    torch.testing.assert_close(fitted(rows)[:, 0], centres.repeat_interleave(2, 0))


def test_more_levels_leave_less_over():
    latents = draw(NUM_ROWS, 2, 3)
    fitted = [Codebooks.fit(latents, num_levels=levels, num_codes=4, seed=0) for levels in (1, 2, 3)]
    errors = [(books(latents) - latents).square().mean().item() for books in fitted]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]
    assert torch.equal(fitted[0].vectors[:, 0], fitted[2].vectors[:, 0])  # a further level changes none before it


def test_books_have_no_more_codes_than_there_are_rows():
    fitted = Codebooks.fit(draw(5, 2, 3), num_levels=2, num_codes=256, seed=0)
    assert fitted.vectors.shape == (2, 2, 5, 3)


def test_many_rows_are_learned_from_by_a_sample_of_the_seed(monkeypatch):
    monkeypatch.setattr(codebooks, "MAX_TRAIN_ROWS", 20)
    latents = draw(NUM_ROWS, 1, 2)
    first, second, other = (Codebooks.fit(latents, num_levels=1, num_codes=4, seed=seed).vectors for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("kind, levels", [("vq", 1), ("rq", 2)])
def test_a_quantised_tokenizer_has_so_many_tokens_and_no_more(kind, levels):
    tokenizer, rows = fit_toy(kind)
    latents = encode(tokenizer, torch.cat([rows, draw(500, 10)]))
    assert latents.shape == (560, 2, 3)
    assert tokenizer.codebooks.vectors.shape == (2, levels, NUM_CODES, 3)
    for token in range(2):
        distinct = len(torch.unique(latents[:, token], dim=0))
        assert 1 < distinct <= NUM_CODES**levels
    assert len(torch.unique(encode(fit_toy("sigma_vae")[0], rows), dim=0)) == NUM_ROWS


def test_quantised_and_continuous_tokenizers_have_the_same_encoder():
    """What they differ in is the quantisation alone: each code is the nearest to the continuous token."""
    (continuous, rows), (quantised, _) = fit_toy("sigma_vae"), fit_toy("vq")
    torch.testing.assert_close(encode(quantised, rows), quantised.codebooks(encode(continuous, rows)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["vq", "rq"])
def test_what_is_loaded_encodes_new_rows_as_what_was_fitted(kind, tmp_path):
    tokenizer, _ = fit_toy(kind)
    tokenizer.save(tmp_path, "item_tokenizer")
    loaded = SigmaVAE.load(tmp_path, "item_tokenizer")
    new = draw(7, 10) + 1
    assert loaded.config == tokenizer.config and torch.equal(encode(loaded, new), encode(tokenizer, new))


def test_a_tokenizer_of_an_earlier_version_is_continuous(tmp_path):
    tokenizer, rows = fit_toy("sigma_vae")
    tokenizer.save(tmp_path, "item_tokenizer")
    stored = json.loads((tmp_path / "item_tokenizer.json").read_text())
    for name in ("kind", "num_codes", "num_levels"):
        stored["config"].pop(name)
    (tmp_path / "item_tokenizer.json").write_text(json.dumps(stored))
    assert torch.equal(encode(SigmaVAE.load(tmp_path, "item_tokenizer"), rows), encode(tokenizer, rows))


def test_a_quantised_tokenizer_without_its_books_is_refused(tmp_path):
    tokenizer, _ = fit_toy("sigma_vae")
    tokenizer.config.kind = "vq"
    tokenizer.save(tmp_path, "item_tokenizer")
    with pytest.raises(ArtifactError, match="no code books"):
        SigmaVAE.load(tmp_path, "item_tokenizer")


@pytest.mark.parametrize("name", ["num_codes", "num_levels"])
def test_no_codes_and_no_levels_are_refused(name):
    with pytest.raises(ConfigError, match=f"tokenizer.{name}"):
        fit_toy("rq", **{name: 0})


def test_bits_count_every_code_of_a_row():
    tokenizer, _ = fit_toy("rq")
    assert tokenizer.codebooks.bits == 2 * 2 * math.log2(NUM_CODES)
    assert np.isfinite(tokenizer.codebooks.vectors.numpy()).all()

"""The sigma-VAE: noise, mask and decorrelation do what they say, when they should and only then."""

import math

import pytest
import torch

from contrec_dist.config import TokenizerConfig
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.tokenizer.sigma_vae import InputSpace, SigmaVAE, compute_decorrelation, count_channel_bits

OFF = {"mask_ratio": 0.0, "sigma": 0.0, "kl_weight": 0.0, "decorrelation_weight": 0.0}


def toy_config(**settings) -> TokenizerConfig:
    return TokenizerConfig(**{"num_item_tokens": 2, "latent_dim": 3, "hidden_dim": 8, **settings})


def toy_vae(seed: int = 0, space: InputSpace | None = None, **settings) -> SigmaVAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SigmaVAE(6, toy_config(**settings), space)


def toy_rows(num_rows: int = 16) -> torch.Tensor:
    """Correlated columns of different sizes."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(6, 6, generator=generator)
    return torch.randn(num_rows, 6, generator=generator) @ mixing + 5.0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shapes():
    vae = toy_vae()
    mu = vae.encode(toy_rows())
    assert mu.shape == (16, 2, 3) and vae.decode(mu).shape == (16, 6)
    assert {value.shape for value in vae.loss(toy_rows()).values()} == {torch.Size([])}


def test_noise_is_drawn_anew_at_every_call():
    vae, generator, mu = toy_vae(**{**OFF, "sigma": 0.5}), seeded(), torch.zeros(4, 2, 3)
    assert not torch.equal(vae.add_noise(mu, generator), vae.add_noise(mu, generator))
    losses = [vae.loss(toy_rows(), generator)["loss"].item() for _ in range(3)]
    assert len(set(losses)) == 3


def test_noise_is_nothing_that_is_stored_in_the_module():
    vae = toy_vae(sigma=0.5)
    assert {name.partition("_")[0] for name, _ in vae.named_buffers()} == {"space"}
    assert all(name.startswith(("encoders.", "decoder.")) for name, _ in vae.named_parameters())


def test_expected_size_of_the_noise_is_sigma():
    noise = toy_vae(**{**OFF, "sigma": 0.3}).add_noise(torch.zeros(200_000, 2, 3), seeded())
    sizes = noise.flatten(1).abs().mean(1) / math.sqrt(2 / math.pi)  # E|s eps| = |s| sqrt(2 / pi), sample by sample
    assert sizes.mean().item() == pytest.approx(0.3, rel=0.01)


def test_size_of_the_noise_is_one_number_a_sample():
    noise = toy_vae(latent_dim=4000, sigma=0.3).add_noise(torch.zeros(50, 2, 4000), seeded())
    per_token = noise.std(2)  # (50, 2)
    torch.testing.assert_close(per_token[:, 0], per_token[:, 1], rtol=0.1, atol=0)
    assert per_token[:, 0].max() > 5 * per_token[:, 0].min()


def test_loss_does_not_modify_its_input_row_0_too():
    vae, x = toy_vae(mask_ratio=0.9), toy_rows()
    before = x.clone()
    vae.loss(x, seeded())
    assert torch.equal(x, before)


def test_mask_hits_rows_independently_in_the_stated_share():
    vae, ones = toy_vae(mask_ratio=0.3), torch.ones(20_000, 6)
    masked = vae._mask(ones, seeded())
    assert masked.mean().item() == pytest.approx(0.7, abs=0.01) and ones.min() == 1
    assert len(torch.unique(masked, dim=0)) == 2**6  # every pattern occurs: neither rows nor dimensions share a draw
    generator = seeded()
    assert not torch.equal(vae._mask(ones, generator), vae._mask(ones, generator))


def test_target_of_the_reconstruction_is_whole():
    """With nearly all of the input masked and a decoder of zeros, the loss is the mean square of the WHOLE target."""
    vae, x = toy_vae(**{**OFF, "mask_ratio": 0.99}), toy_rows()
    for parameter in vae.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    assert vae.loss(x, seeded())["reconstruction"].item() == pytest.approx(x.square().mean().item(), rel=1e-6)


def test_mask_changes_the_loss_when_on_and_nothing_is_random_when_all_is_off():
    x = toy_rows()
    off = [toy_vae(**OFF).loss(x, seeded(seed))["loss"].item() for seed in (1, 2)]
    on = [toy_vae(**{**OFF, "mask_ratio": 0.5}).loss(x, seeded(seed))["loss"].item() for seed in (1, 2)]
    assert off[0] == off[1] and on[0] != on[1] and off[0] not in on


@pytest.mark.parametrize("guard, part", [("kl_weight", "kl"), ("decorrelation_weight", "decorrelation")])
def test_each_weighted_guard_has_a_gradient_when_on_and_none_when_off(guard, part):
    def gradient(**settings) -> torch.Tensor:
        vae = toy_vae(**{**OFF, **settings})
        losses = vae.loss(toy_rows(), seeded())
        losses["loss"].backward()
        return torch.cat([parameter.grad.flatten() for parameter in vae.encoders.parameters()])

    vae = toy_vae(**OFF)
    vae.loss(toy_rows(), seeded())[part].backward()
    alone = torch.cat([parameter.grad.flatten() for parameter in vae.encoders.parameters()])
    assert alone.norm() > 1e-4
    torch.testing.assert_close(gradient(**{guard: 2.0}) - gradient(), 2.0 * alone, rtol=1e-3, atol=1e-5)


def test_noise_reaches_the_gradient_when_on():
    def gradient(seed: int, **settings) -> torch.Tensor:
        vae = toy_vae(**{**OFF, **settings})
        vae.loss(toy_rows(), seeded(seed))["loss"].backward()
        return vae.encoders[0].shortcut.weight.grad

    assert torch.equal(gradient(1), gradient(2))
    assert not torch.equal(gradient(1, sigma=0.5), gradient(2, sigma=0.5))


def test_loss_is_the_weighted_sum_of_its_parts():
    losses = toy_vae(kl_weight=0.5, decorrelation_weight=0.25).loss(toy_rows(), seeded())
    expected = losses["reconstruction"] + 0.5 * losses["kl"] + 0.25 * losses["decorrelation"]
    torch.testing.assert_close(losses["loss"], expected)


def test_kl_is_the_mean_square_of_mu():
    vae, x = toy_vae(**OFF), toy_rows()
    assert vae.loss(x)["kl"].item() == pytest.approx(vae.encode(x).square().mean().item(), rel=1e-6)


def test_decorrelation_by_hand():
    first, second = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), torch.tensor([[1.0], [1.0], [1.0], [-3.0]])
    # means 0; E[ab] = (1 + 1 - 1 + 3) / 4 = 1; variances 1 and 3; correlation 1 / sqrt(3)
    assert compute_decorrelation(torch.stack([first, second], 1)).item() == pytest.approx(1 / 3, rel=1e-4)
    assert compute_decorrelation(torch.stack([first, 7 * first - 2], 1)).item() == pytest.approx(1, rel=1e-4)
    # three ways: the pairs have 1/3, 1 and 1/3
    assert compute_decorrelation(torch.stack([first, second, -first], 1)).item() == pytest.approx(5 / 9, rel=1e-4)


def test_decorrelation_is_divided_by_the_batch_and_zero_for_one_way():
    mu = torch.randn(32, 2, 3, generator=seeded())
    torch.testing.assert_close(compute_decorrelation(torch.cat([mu, mu])), compute_decorrelation(mu))
    assert compute_decorrelation(mu[:, :1]).item() == 0


def test_decorrelation_is_least_when_ways_are_apart():
    mu = torch.randn(500, 1, 3, generator=seeded())
    apart = torch.randn(500, 1, 3, generator=seeded(1))
    assert compute_decorrelation(torch.cat([mu, apart], 1)) < 0.05 < 2.5 < compute_decorrelation(torch.cat([mu, mu], 1))


def test_mean_decoding_sees_the_mean_alone_and_concat_every_token():
    z = torch.randn(4, 2, 3, generator=seeded())
    shifted = z + torch.tensor([[[1.0], [-1.0]]])
    by_mean, by_all = toy_vae(decode_from="mean"), toy_vae(decode_from="concat")
    torch.testing.assert_close(by_mean.decode(z), by_mean.decode(shifted), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(by_all.decode(z), by_all.decode(shifted))


def test_whitened_rows_have_identity_covariance_and_come_back():
    x = toy_rows(500)
    vae = toy_vae(space=InputSpace.fit(x, whiten=True, floor=0.0))
    y = vae.to_space(x)
    torch.testing.assert_close(y.T @ y / len(y), torch.eye(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(vae.from_space(y), x, atol=1e-3, rtol=0)


def test_whitening_keeps_small_directions_small_below_the_floor():
    generator = seeded()
    shared, own = torch.randn(4000, 1, generator=generator), torch.randn(4000, 2, generator=generator)
    x = shared + 0.1 * own  # correlation .99: variances about 1.99 and .01 after standardisation
    y = toy_vae_of_two(x, floor=0.5).to_space(x)
    variances = y.var(0, unbiased=False)
    assert variances[0].item() == pytest.approx(1, abs=0.01)
    assert variances[1].item() == pytest.approx(0.01 / 0.5, rel=0.2)


def toy_vae_of_two(x: torch.Tensor, floor: float) -> SigmaVAE:
    return SigmaVAE(2, toy_config(), InputSpace.fit(x, whiten=True, floor=floor))


def test_without_whitening_dimensions_are_standardised_one_by_one():
    x = toy_rows(500)
    y = toy_vae(space=InputSpace.fit(x, whiten=False, floor=0.0)).to_space(x)
    torch.testing.assert_close(y, (x - x.mean(0)) / x.std(0, unbiased=False), atol=1e-4, rtol=0)


def test_constant_dimensions_stay_finite():
    x = torch.cat([toy_rows(50)[:, :5], torch.full((50, 1), 3.0)], 1)
    vae = toy_vae(space=InputSpace.fit(x, whiten=True, floor=1.0))
    assert vae.to_space(x).isfinite().all()
    torch.testing.assert_close(vae.from_space(vae.to_space(x)), x, atol=1e-3, rtol=0)


def test_saved_and_loaded_tokenizer_gives_the_same_bits(tmp_path):
    x = toy_rows()
    vae = toy_vae(seed=3, space=InputSpace.fit(x, whiten=True, floor=1.0), decode_from="concat")
    vae.save(tmp_path, "item_tokenizer")
    loaded = SigmaVAE.load(tmp_path, "item_tokenizer")
    assert loaded.config == vae.config and not loaded.training
    for (name, a), b in zip(vae.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(vae.encode(x), loaded.encode(x)) and torch.equal(vae.decode(vae.encode(x)), loaded.decode(loaded.encode(x)))


def test_missing_or_foreign_files_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="item_tokenizer.safetensors"):
        SigmaVAE.load(tmp_path, "item_tokenizer")
    toy_vae().save(tmp_path, "a")
    toy_vae(latent_dim=4).save(tmp_path, "b")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="a.safetensors"):
        SigmaVAE.load(tmp_path, "a")


@pytest.mark.parametrize("key, value", [("latent_dim", 0), ("mask_ratio", 1.0), ("collaborative_drop", 1.0), ("sigma", -0.1), ("num_item_tokens", 0)])
def test_impossible_settings_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"tokenizer.{key}"):
        SigmaVAE(6, toy_config(**{key: value}))


def test_channel_bits_by_hand():
    config = TokenizerConfig(num_item_tokens=2, latent_dim=32, sigma=1.0)
    assert count_channel_bits(config) == pytest.approx(32.0)  # 64 numbers of half a bit
    assert count_channel_bits(TokenizerConfig(sigma=0.1)) == pytest.approx(213.06, abs=0.01)
    assert count_channel_bits(TokenizerConfig(sigma=0.0)) == math.inf

"""The sigma-VAE: an embedding to K continuous tokens and back (stage tokenize; used by precompute and for new items).

K encoders give mu_1 .. mu_K. A latent is z_k = mu_k + s * eps, where s is one number a sample with E|s| = sigma and eps
is standard normal, both drawn ANEW at every call of `loss`. The decoder reconstructs the whole input from the mean of the
z_k, or from all of them side by side (`decode_from`). Three guards against collapse, each with a switch: masked
inputs, the fixed noise with a pull of mu to 0, and decorrelation between the encoders. With code books (codebooks.py, kinds vq
and rq) `encode` gives every mu's code in its place.

Guarantees   inputs are never modified; the target of the reconstruction is never masked; `encode` and `decode` are
             deterministic functions of weights and input; save -> load gives the same bits.
Cost         (K + 1) MLPs of hidden_dim: some microseconds a row.
Source       ContRec, arXiv 2504.12007; fixed variance: LatentLM, arXiv 2412.08635; Barlow Twins, arXiv 2103.03230
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from contrec_dist.config import TokenizerConfig
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import write_json
from contrec_dist.tokenizer.codebooks import Codebooks

NOISE_SCALE = 0.8  # ~ E|n| of a standard normal (sqrt(2 / pi) = 0.798), so that E|s| = sigma
VARIANCE_EPSILON = 1e-6


@dataclass(kw_only=True)
class InputSpace:
    """The affine map into which embeddings are brought first: standardised, and whitened or not.

    x -> ((x - mean) / scale) @ forward, and back with `backward`.
    """

    mean: torch.Tensor
    "(E,)"
    scale: torch.Tensor
    "(E,)"
    forward: torch.Tensor
    "(E, E)"
    backward: torch.Tensor
    "(E, E), the inverse"

    @classmethod
    def fit(cls, rows: torch.Tensor, *, whiten: bool, floor: float) -> "InputSpace":
        """Learn the map on `rows` (n, E): every dimension to unit variance, then PCA whitening with all dimensions kept.

        Principal directions with a variance above `floor` times the mean variance are brought to unit variance; those
        below keep their size relative to the floor, so that noise is not blown up to the size of signal.
        """
        rows = rows.double()
        mean, scale = rows.mean(0), rows.std(0, unbiased=False)
        scale = torch.where(scale > VARIANCE_EPSILON, scale, 1.0)  # a constant dimension stays 0
        forward = backward = torch.eye(rows.shape[1], dtype=torch.float64)
        if whiten:
            standardised = (rows - mean) / scale
            variances, directions = torch.linalg.eigh(standardised.T @ standardised / len(rows))
            variances, directions = variances.flip(0), _fix_signs(directions.flip(1))
            lengths = variances.clamp(min=max(floor * variances.mean().item(), VARIANCE_EPSILON)).sqrt()
            forward, backward = directions / lengths, (directions * lengths).T
        return cls(mean=mean.float(), scale=scale.float(), forward=forward.float(), backward=backward.float())

    @classmethod
    def identity(cls, width: int) -> "InputSpace":
        """The map that changes nothing."""
        return cls(mean=torch.zeros(width), scale=torch.ones(width), forward=torch.eye(width), backward=torch.eye(width))


class ResidualMLP(nn.Module):
    """Linear map plus a two-layer MLP with LayerNorm and SiLU: starts near a projection and learns what that misses."""

    def __init__(self, width_in: int, hidden: int, width_out: int):
        super().__init__()
        self.shortcut = nn.Linear(width_in, width_out)
        self.mlp = nn.Sequential(
            nn.Linear(width_in, hidden), nn.LayerNorm(hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.SiLU(),
            nn.Linear(hidden, width_out),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.mlp(x)


class SigmaVAE(nn.Module):
    """Embedding <-> K continuous tokens of width Z.

    Shapes   encode: (B, E) -> (B, K, Z); decode: (B, K, Z) -> (B, E), in units of the embedding
    """

    def __init__(self, embedding_dim: int, config: TokenizerConfig, space: InputSpace | None = None):
        super().__init__()
        _check_config(config)
        self.embedding_dim, self.config = embedding_dim, config
        space = space or InputSpace.identity(embedding_dim)
        for name in ("mean", "scale", "forward", "backward"):
            # one memory layout, the one that loading gives too: a transposed matrix multiplies with other roundings
            self.register_buffer(f"space_{name}", getattr(space, name).clone(memory_format=torch.contiguous_format))
        width, tokens = config.latent_dim, config.num_item_tokens
        self.encoders = nn.ModuleList(ResidualMLP(embedding_dim, config.hidden_dim, width) for _ in range(tokens))
        decoder_in = width if config.decode_from == "mean" else width * tokens
        self.decoder = ResidualMLP(decoder_in, config.hidden_dim, embedding_dim)
        self.codebooks: Codebooks | None = None

    def to_space(self, x: torch.Tensor) -> torch.Tensor:
        """Standardise and whiten. Shapes   (B, E) -> (B, E)"""
        return ((x - self.space_mean) / self.space_scale) @ self.space_forward

    def from_space(self, y: torch.Tensor) -> torch.Tensor:
        """Undo `to_space`. Shapes   (B, E) -> (B, E)"""
        return (y @ self.space_backward) * self.space_scale + self.space_mean

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """mu of every token, without mask or noise; its code where there are code books. Shapes   (B, E) -> (B, K, Z)"""
        mu = self._encode_space(self.to_space(x))
        return mu if self.codebooks is None else self.codebooks(mu)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruct embeddings. Shapes   (B, K, Z) -> (B, E)"""
        return self.from_space(self._decode_space(z))

    def loss(
        self, x: torch.Tensor, generator: torch.Generator | None = None, *, target: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The training objective "loss" and its parts, unweighted, each a scalar.

        Mask and noise are drawn anew from `generator` at every call. `target` is what is reconstructed where x holds a part
        of it only; x itself without it.
        Shapes   x, target: (B, E) -> "reconstruction", "kl", "decorrelation", "loss": () float32
        """
        seen = self.to_space(x)  # (B, E)
        target = seen if target is None else self.to_space(target)
        mu = self._encode_space(self._mask(seen, generator))  # (B, K, Z)
        reconstruction = F.mse_loss(self._decode_space(self.add_noise(mu, generator)), target)
        parts = {"reconstruction": reconstruction, "kl": mu.square().mean(), "decorrelation": compute_decorrelation(mu)}
        weighted = self.config.kl_weight * parts["kl"] + self.config.decorrelation_weight * parts["decorrelation"]
        return {**parts, "loss": reconstruction + weighted}

    def add_noise(self, mu: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """mu + s * eps with s and eps drawn anew: s one number a sample, eps one a number. Shapes   (B, K, Z) -> same"""
        if self.config.sigma == 0:
            return mu
        size = torch.randn((len(mu), 1, 1), generator=generator, device=mu.device)
        noise = torch.randn(mu.shape, generator=generator, device=mu.device)
        return mu + (self.config.sigma / NOISE_SCALE) * size * noise

    def save(self, folder: Path, name: str) -> None:
        """Write <name>.safetensors (weights and buffers) and <name>.json (widths and settings)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in self.state_dict().items()}, folder / f"{name}.safetensors")
        settings = {"embedding_dim": self.embedding_dim, "config": dataclasses.asdict(self.config)}
        write_json(folder / f"{name}.json", settings)

    @classmethod
    def load(cls, folder: Path, name: str) -> "SigmaVAE":
        """The tokenizer that `save` wrote, in evaluation mode.

        Errors   ArtifactError naming the file that is missing or does not fit
        """
        weights, settings = Path(folder) / f"{name}.safetensors", Path(folder) / f"{name}.json"
        for path in (weights, settings):
            if not path.is_file():
                raise ArtifactError(path, "no such file", "a trained tokenizer")
        stored = json.loads(settings.read_text())
        tokenizer, state = cls(stored["embedding_dim"], TokenizerConfig(**stored["config"])), load_file(weights)
        if tokenizer.config.kind != "sigma_vae":
            if "codebooks.vectors" not in state:
                raise ArtifactError(weights, "no code books", f"those of kind '{tokenizer.config.kind}', which {settings} names")
            tokenizer.codebooks = Codebooks(torch.empty_like(state["codebooks.vectors"]))
        try:
            tokenizer.load_state_dict(state)
        except RuntimeError as error:
            raise ArtifactError(weights, f"other weights ({error})", f"the weights of {settings}") from None
        return tokenizer.eval()

    def _encode_space(self, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([encoder(y) for encoder in self.encoders], dim=1)  # (B, K, Z)

    def _decode_space(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z.mean(1) if self.config.decode_from == "mean" else z.flatten(1))  # (B, E)

    def _mask(self, y: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """A copy of `y` with a fresh share of its dimensions, chosen sample by sample, at 0, the mean."""
        if self.config.mask_ratio == 0:
            return y
        dropped = torch.rand(y.shape, generator=generator, device=y.device) < self.config.mask_ratio
        return y.masked_fill(dropped, 0.0)


def compute_decorrelation(mu: torch.Tensor) -> torch.Tensor:
    """Sum of squared cross-correlations between two encoders' dimensions over the batch, mean over the pairs of encoders.

    0 when no dimension of one encoder tells anything linear about a dimension of another; Z when they are the same.
    Shapes   mu: (B, K, Z) -> ()
    Source   Barlow Twins, with 0 as the target of every entry of the matrix: the ways are kept apart, not made equal
    """
    pairs = list(combinations(range(mu.shape[1]), 2))
    if not pairs:
        return mu.new_zeros(())
    centred = mu - mu.mean(0)
    normalised = centred / (centred.square().mean(0) + VARIANCE_EPSILON).sqrt()
    squares = [(normalised[:, a].T @ normalised[:, b] / len(mu)).square().sum() for a, b in pairs]
    return torch.stack(squares).mean()


def count_channel_bits(config: TokenizerConfig) -> float:
    """Capacity of the latent channel in bits: K Z / 2 log2(1 + 1 / sigma^2), for latents of unit variance.

    Source   capacity of a Gaussian channel; 213 bits for K = 2, Z = 32, sigma = 0.1
    """
    if config.sigma == 0:
        return math.inf
    return config.num_item_tokens * config.latent_dim * 0.5 * math.log2(1 + config.sigma**-2)


def _fix_signs(directions: torch.Tensor) -> torch.Tensor:
    """Give every column the sign that makes its largest entry positive: eigenvectors have none of their own."""
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * torch.where(largest < 0, -1.0, 1.0)


def _check_config(config: TokenizerConfig) -> None:
    """Refuse settings that make no tokenizer, by name."""
    for key in ("num_item_tokens", "latent_dim", "hidden_dim", "num_steps", "batch_rows", "num_codes", "num_levels"):
        if getattr(config, key) < 1:
            raise ConfigError(f"tokenizer.{key}", getattr(config, key), "at least 1")
    if not 0 <= config.mask_ratio < 1:
        raise ConfigError("tokenizer.mask_ratio", config.mask_ratio, "a share in [0, 1)")
    if not 0 <= config.collaborative_drop < 1:
        raise ConfigError("tokenizer.collaborative_drop", config.collaborative_drop, "a share in [0, 1)")
    for key in ("sigma", "kl_weight", "decorrelation_weight", "whiten_floor"):
        if getattr(config, key) < 0:
            raise ConfigError(f"tokenizer.{key}", getattr(config, key), "at least 0")

"""What a tokenizer kept: the sigma-VAE beside quantised tokens, measured on the same rows (stage tokenize).

A record of a method:
  relative_mse           squared error of the reconstruction / variance of the embedding (0 perfect, 1 the mean)
  relative_mse_input     the same in the tokenizer's own input space, standardised and whitened
  neighbour_overlap      share of the 10 nearest neighbours of the embedding (L2, among all rows) that are also the 10
                         nearest among the tokens: latents for the sigma-VAE, decoded codes for the quantised
  neighbour_overlap_decoded   the same for the reconstruction (equal to the former for the quantised)
  effective_rank         exp of the entropy of the normalised singular values of the tokens (Roy & Vetterli 2007)
  latent_variance_mean, latent_variance_min   over the token's dimensions
  collision_rate         share of rows whose code, or latent rounded to steps of sigma, equals another row's
  bits                   bits a row; for the sigma-VAE its channel capacity
A tokenizer with code books (kinds vq and rq) is measured by its codes, under its own name.

Guarantees   deterministic given the seed.
Cost         probe_rows exact searches in at most MAX_ROWS rows, and the quantisers' training: under 30 s at 12,000 x 192.
"""

from dataclasses import dataclass

import faiss
import numpy as np
import torch

import sharding.faiss_settings  # noqa: F401
from contrec_dist.config import TokenizerConfig
from contrec_dist.tokenizer.quantized import TIGER_LEVELS, Quantized, count_equal_levels, quantize_product, quantize_residual
from contrec_dist.tokenizer.sigma_vae import SigmaVAE, count_channel_bits

MAX_ROWS = 100_000
NUM_NEIGHBOURS = 10
DEFAULT_STEP = 0.1
CHUNK_ROWS = 8192


@dataclass(kw_only=True)
class Tokens:
    """The rows as one method sees them."""

    method: str
    bits: float
    latents: np.ndarray
    "(n, width): what neighbours are searched among"
    codes: np.ndarray
    "(n, any) integers: equal rows collide"
    decoded: np.ndarray
    "(n, E), in units of the embedding"
    decoded_input: np.ndarray
    "(n, E), in the tokenizer's input space"


def measure_tokenizer(tokenizer: SigmaVAE, rows: np.ndarray, config: TokenizerConfig, seed: int) -> dict:
    """Probe the tokenizer, RQ at TIGER's 24 bits, and RQ and PQ at the tokenizer's bits.

    Shapes   rows: (n, E), those with training interactions
    Returns  {"methods": [record, ...], "latent_spectrum": eigenvalues of the latents' covariance, descending,
             "num_rows", "num_queries"}
    """
    rows = rows[_draw(len(rows), MAX_ROWS, seed)]
    queries = _draw(len(rows), config.probe_rows, seed)
    inputs = _in_chunks(tokenizer.to_space, rows)
    methods = [_tokens_of_vae(tokenizer, rows, config)]
    levels = count_equal_levels(methods[0].bits)
    for quantized in (
        quantize_residual(inputs, TIGER_LEVELS, seed), quantize_residual(inputs, levels, seed), quantize_product(inputs, levels, seed)
    ):  # fmt: skip
        methods.append(_tokens_of_codes(tokenizer, quantized))
    neighbours = find_neighbours(rows, queries)
    return {
        "methods": [_measure(tokens, rows, inputs, neighbours, queries) for tokens in methods],
        "latent_spectrum": [round(float(value), 6) for value in compute_spectrum(methods[0].latents)],
        "num_rows": len(rows),
        "num_queries": len(queries),
    }


def find_neighbours(rows: np.ndarray, queries: np.ndarray, num_neighbours: int = NUM_NEIGHBOURS) -> np.ndarray:
    """Exact L2 neighbours of rows[queries] among the other rows. Shapes   (n, d), (q,) -> (q, num_neighbours) int64"""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count = min(num_neighbours, len(rows) - 1)
    _, found = faiss.knn(rows[queries], rows, count + 1)
    others = found != queries[:, None]
    others[others.all(axis=1), -1] = False  # among many equal rows the row itself may be missing: drop the farthest
    return found[others].reshape(len(queries), count)


def measure_overlap(before: np.ndarray, after: np.ndarray) -> float:
    """Mean share of a row of `before` that stands in the same row of `after`. Shapes   (q, k), (q, k)"""
    return float((before[:, :, None] == after[:, None, :]).any(axis=2).mean())


def measure_relative_error(rows: np.ndarray, decoded: np.ndarray) -> float:
    """Mean squared error / mean variance. Shapes   (n, E), (n, E)"""
    rows, decoded = rows.astype(np.float64), decoded.astype(np.float64)
    return float(((rows - decoded) ** 2).mean() / max(rows.var(axis=0).mean(), 1e-12))


def compute_spectrum(latents: np.ndarray) -> np.ndarray:
    """Eigenvalues of the covariance, descending. Shapes   (n, d) -> (min(n, d),)"""
    centred = latents.astype(np.float64) - latents.mean(axis=0, dtype=np.float64)
    return np.linalg.svd(centred, compute_uv=False) ** 2 / len(latents)


def compute_effective_rank(latents: np.ndarray) -> float:
    """exp(entropy) of the singular values as shares: d for d equal directions, 1 for one; 0 when nothing varies."""
    values = np.sqrt(compute_spectrum(latents))
    if values.sum() == 0:
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def measure_collisions(codes: np.ndarray) -> float:
    """Share of rows that are equal to another row. Shapes   (n, any)"""
    _, counts = np.unique(codes.reshape(len(codes), -1), axis=0, return_counts=True)
    return float(counts[counts > 1].sum() / len(codes))


def _measure(tokens: Tokens, rows: np.ndarray, inputs: np.ndarray, neighbours: np.ndarray, queries: np.ndarray) -> dict:
    """The record of one method; see the module."""
    variances = tokens.latents.var(axis=0, dtype=np.float64)
    values = {
        "bits": tokens.bits,
        "relative_mse": measure_relative_error(rows, tokens.decoded),
        "relative_mse_input": measure_relative_error(inputs, tokens.decoded_input),
        "neighbour_overlap": measure_overlap(neighbours, find_neighbours(tokens.latents, queries)),
        "neighbour_overlap_decoded": measure_overlap(neighbours, find_neighbours(tokens.decoded, queries)),
        "effective_rank": compute_effective_rank(tokens.latents),
        "latent_variance_mean": float(variances.mean()),
        "latent_variance_min": float(variances.min()),
        "collision_rate": measure_collisions(tokens.codes),
    }
    rounded = {name: round(value, 6) if np.isfinite(value) else None for name, value in values.items()}
    return {"method": tokens.method, **rounded}


def _tokens_of_vae(tokenizer: SigmaVAE, rows: np.ndarray, config: TokenizerConfig) -> Tokens:
    latents = _in_chunks(lambda x: tokenizer.encode(x).flatten(1), rows)
    shape = (-1, config.num_item_tokens, config.latent_dim)
    decoded = _in_chunks(lambda z: tokenizer.decode(z.reshape(shape)), latents)
    books = tokenizer.codebooks
    if books is None:
        method, bits = "sigma-VAE", count_channel_bits(config)
        codes = np.rint(latents / (config.sigma or DEFAULT_STEP)).astype(np.int64)
    else:
        method, bits = f"{config.kind.upper()} of the VAE, {books.bits:.0f} bits", books.bits
        codes = _in_chunks(lambda z: books.find_codes(z.reshape(shape)).flatten(1), latents)
    return Tokens(
        method=method,
        bits=bits,
        latents=latents,
        codes=codes,
        decoded=decoded,
        decoded_input=_in_chunks(tokenizer.to_space, decoded),
    )


def _tokens_of_codes(tokenizer: SigmaVAE, quantized: Quantized) -> Tokens:
    decoded = _in_chunks(tokenizer.from_space, quantized.reconstruction)
    return Tokens(
        method=quantized.name,
        bits=quantized.bits,
        latents=decoded,
        codes=quantized.codes,
        decoded=decoded,
        decoded_input=quantized.reconstruction,
    )


def _in_chunks(function, rows: np.ndarray) -> np.ndarray:
    """Apply a torch function to rows, a bounded number at a time."""
    with torch.no_grad():
        parts = [function(torch.from_numpy(rows[start : start + CHUNK_ROWS])) for start in range(0, len(rows), CHUNK_ROWS)]
    return torch.cat(parts).numpy()


def _draw(num_rows: int, count: int, seed: int) -> np.ndarray:
    """At most `count` row numbers, ascending."""
    if num_rows <= count:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, count, replace=False))

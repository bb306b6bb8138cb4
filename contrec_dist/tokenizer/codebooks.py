"""Quantised tokens in the place of continuous ones: code books over a trained encoder's latents (tokenize, precompute).

A token's latent becomes the sum of one code a level, each the nearest to what the levels before left over. One level is
vector quantisation (tokenizer.kind vq), several are residual quantisation (rq). Every token has books of its own. The
encoder is trained as the sigma-VAE's, so the two differ in the quantisation alone, and what follows reads latents of the
same shape.

Guarantees   the same latents and seed give the same books on the same machine; a code of a code is that code (one level).
Cost         k-means over at most MAX_TRAIN_ROWS latents: K * levels books, under a second each at 12,000 x 32.
Source       one level: VQ-VAE, arXiv 1711.00937; residual levels: RQ-VAE, arXiv 2203.01941. Both train the codes together
             with the encoder; here they are fitted to it afterwards.
"""

import math

import faiss
import numpy as np
import torch
from torch import Tensor, nn

import sharding.faiss_settings  # noqa: F401

MAX_TRAIN_ROWS = 65_536
KMEANS_ROUNDS = 25


class Codebooks(nn.Module):
    """Latents to the sums of their codes.

    Shapes   vectors: (K, levels, codes, Z); forward: (B, K, Z) -> (B, K, Z)
    """

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.register_buffer("vectors", vectors.contiguous())

    @classmethod
    def fit(cls, latents: Tensor, *, num_levels: int, num_codes: int, seed: int) -> "Codebooks":
        """Books for latents (n, K, Z), of no more codes than there are rows."""
        rows = _sample_rows(latents, seed)
        num_codes = min(num_codes, len(rows))
        return cls(torch.stack([_fit_levels(token, num_levels, num_codes, seed) for token in rows.unbind(1)]))

    @property
    def bits(self) -> float:
        """Bits of a row's codes."""
        num_tokens, num_levels, num_codes, _ = self.vectors.shape
        return num_tokens * num_levels * math.log2(num_codes)

    def find_codes(self, latents: Tensor) -> Tensor:
        """The nearest code of each token and level, ties to the lower number.

        Shapes   (B, K, Z) -> (B, K, levels) int64
        """
        left_over, codes = latents.transpose(0, 1), []  # (K, B, Z)
        for book in self.vectors.unbind(1):  # (K, C, Z)
            distances = book.square().sum(-1)[:, None] - 2 * left_over @ book.transpose(1, 2)  # (K, B, C)
            codes.append(distances.argmin(-1))
            left_over = left_over - _take(book, codes[-1])
        return torch.stack(codes, dim=-1).transpose(0, 1)

    def forward(self, latents: Tensor) -> Tensor:
        codes = self.find_codes(latents).transpose(0, 1)  # (K, B, levels)
        chosen = [_take(book, codes[..., level]) for level, book in enumerate(self.vectors.unbind(1))]
        return torch.stack(chosen).sum(0).transpose(0, 1)  # (B, K, Z)


def _take(book: Tensor, codes: Tensor) -> Tensor:
    """Rows of every token's book. Shapes   (K, C, Z), (K, B) -> (K, B, Z)"""
    return book.gather(1, codes[..., None].expand(-1, -1, book.shape[-1]))


def _fit_levels(rows: Tensor, num_levels: int, num_codes: int, seed: int) -> Tensor:
    """Books of one token, each fitted to what the ones before leave over. Shapes   (n, Z) -> (levels, codes, Z)"""
    books = []
    for _ in range(num_levels):
        means = faiss.Kmeans(rows.shape[1], num_codes, niter=KMEANS_ROUNDS, seed=seed, min_points_per_centroid=1)
        means.train(np.ascontiguousarray(rows.numpy(), dtype=np.float32))
        books.append(torch.from_numpy(means.centroids.copy()))
        rows = rows - Codebooks(books[-1][None, None])(rows[:, None])[:, 0]
    return torch.stack(books)


def _sample_rows(latents: Tensor, seed: int) -> Tensor:
    if len(latents) <= MAX_TRAIN_ROWS:
        return latents
    drawn = np.random.default_rng(seed).choice(len(latents), MAX_TRAIN_ROWS, replace=False)
    return latents[torch.from_numpy(np.sort(drawn))]

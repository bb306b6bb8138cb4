"""RQ-VAE: item embeddings to a few discrete codes, each level coding what the levels before left over.

Guarantees   weights and codes are a function of rows, config and seed; no other random state is read or changed.
Cost         2000 steps of 1024 rows, E = 128: about 60 ms a step on one core of a CPU.
Source       TIGER, arXiv 2305.05065, section 3.1; k-means start and reset of dead codes as in SoundStream, arXiv 2107.03312
"""

import faiss
import numpy as np
import torch
from torch import Tensor, nn

import sharding.faiss_settings  # noqa: F401
from contrec_dist.config import TigerConfig
from contrec_dist.errors import DataError
from contrec_dist.progress import track

WEIGHT_DECAY = 1e-4
CLIP_NORM = 1.0
KMEANS_ROWS, KMEANS_ITERATIONS = 20_000, 20
RESET_EVERY_STEPS, RESET_UNTIL = 50, 0.8  # a code that no row of so many steps chose starts anew; never near the end
ENCODE_ROWS = 16_384


class RqVae(nn.Module):
    """Encoder, code books, decoder. Input and output are standardised by the statistics of the rows it was made for."""

    def __init__(self, rows: Tensor, config: TigerConfig):
        """Shapes   rows (n, E) float32"""
        super().__init__()
        self.commitment_weight = config.commitment_weight
        num_codes = min(config.num_codes, len(rows))
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("scale", rows.var(0, correction=0).mean().sqrt().clamp(min=1e-6))
        self.encoder = _mlp([rows.shape[1], *config.hidden_dims, config.latent_dim])
        self.decoder = _mlp([config.latent_dim, *reversed(config.hidden_dims), rows.shape[1]])
        self.codebooks = nn.Parameter(torch.zeros(config.num_levels, num_codes, config.latent_dim))

    def encode(self, rows: Tensor) -> Tensor:
        """Latents in front of the quantisation. (n, E) -> (n, Z)"""
        return self.encoder((rows - self.mean) / self.scale)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest code of every level's residual. (n, Z) -> codes (n, levels) int64, residuals (levels, n, Z) that they code"""
        codes, residuals = [], []
        for book in self.codebooks:
            residuals.append(latents)
            codes.append(_nearest(latents.detach(), book.detach()))
            latents = latents - book[codes[-1]].detach()
        return torch.stack(codes, dim=1), torch.stack(residuals)

    def decode(self, codes: Tensor) -> Tensor:
        """Embeddings in the units of the input. (n, levels) -> (n, E)"""
        return self.decoder(self.sum_codes(codes)) * self.scale + self.mean

    def sum_codes(self, codes: Tensor) -> Tensor:
        """The quantised latent, the sum of the levels' vectors. (n, levels) -> (n, Z)"""
        return sum(book[column] for book, column in zip(self.codebooks, codes.T))

    def loss(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Terms of the loss, and the codes that were chosen. The gradient of the reconstruction passes straight through.

        Shapes   rows (n, E) -> terms () float32, codes (n, levels) int64
        Source   TIGER equations 1 and 2
        """
        latents = self.encode(rows)
        codes, residuals = self.quantize(latents)
        chosen = torch.stack([book[column] for book, column in zip(self.codebooks, codes.T)])  # (levels, n, Z)
        straight = latents + (chosen.sum(0) - latents).detach()
        target = (rows - self.mean) / self.scale
        terms = {
            "reconstruction": (self.decoder(straight) - target).square().sum(1).mean(),
            "codebook": (chosen - residuals.detach()).square().sum(2).mean(1).sum(),
            "commitment": (residuals - chosen.detach()).square().sum(2).mean(1).sum(),
        }
        terms["loss"] = terms["reconstruction"] + terms["codebook"] + self.commitment_weight * terms["commitment"]
        return terms, codes

    @torch.no_grad()
    def start_from_kmeans(self, rows: Tensor, seed: int) -> None:
        """Set every level's codes to the k-means centres of its residuals. Shapes   rows (n, E)"""
        latents = self.encode(rows)
        for book in self.codebooks:
            centres = _find_centres(latents.numpy(), len(book), seed)
            book.copy_(torch.from_numpy(centres))
            latents = latents - book[_nearest(latents, book)]

    @torch.no_grad()
    def reset_codes(self, dead: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        """Move the codes that `dead` marks onto residuals of rows drawn at random. Shapes   dead (levels, codes) bool"""
        _, residuals = self.quantize(self.encode(rows))
        for book, marked, residual in zip(self.codebooks, dead, residuals):
            drawn = torch.randint(len(rows), (int(marked.sum()),), generator=generator)
            book[marked] = residual[drawn]


def fit_rq_vae(rows: np.ndarray, config: TigerConfig, seed: int) -> tuple[RqVae, dict]:
    """Train on `rows` with AdamW, cosine to 0. Returns the model in evaluation mode, and its last losses.

    Shapes   rows (n, E) float32
    Errors   DataError for fewer than two rows, or values that are not finite
    """
    table = torch.from_numpy(_check_rows(rows))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RqVae(table, config)
    generator = torch.Generator().manual_seed(seed)
    model.start_from_kmeans(table[torch.randperm(len(table), generator=generator)[:KMEANS_ROWS]], seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.rqvae_learning_rate, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.rqvae_steps))
    used, last = torch.zeros(model.codebooks.shape[:2], dtype=torch.bool), {}
    for step in track(range(1, config.rqvae_steps + 1), stage="tiger", unit="RQ-VAE steps", total=config.rqvae_steps):
        batch = table[torch.randint(len(table), (config.rqvae_batch_rows,), generator=generator)]
        terms, codes = model.loss(batch)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        used[torch.arange(len(used)), codes] = True
        if step % RESET_EVERY_STEPS == 0:
            if step <= RESET_UNTIL * config.rqvae_steps:
                model.reset_codes(~used, batch, generator)
            used.zero_()
        last = terms
    return model.eval(), {name: round(value.item(), 6) for name, value in last.items()}


@torch.no_grad()
def encode_rows(model: RqVae, rows: np.ndarray) -> np.ndarray:
    """Codes of every row, in chunks. (n, E) -> (n, levels) int64"""
    chunks = (torch.from_numpy(rows[start : start + ENCODE_ROWS]) for start in range(0, len(rows), ENCODE_ROWS))
    return np.concatenate([model.quantize(model.encode(chunk))[0].numpy() for chunk in chunks])


def measure_codes(model: RqVae, rows: np.ndarray, codes: np.ndarray) -> dict:
    """How well the codes describe the rows: relative error, and the share of each book's codes in use, by perplexity.

    Shapes   rows (n, E) float32, codes (n, levels)
    """
    with torch.no_grad():
        decoded = model.decode(torch.from_numpy(codes)).numpy()
    spread = float(np.square(rows - rows.mean(0)).sum())
    shares = [np.bincount(column, minlength=model.codebooks.shape[1]) / len(codes) for column in codes.T]
    perplexity = [float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())) for share in shares]
    return {
        "relative_error": round(float(np.square(rows - decoded).sum()) / max(spread, 1e-12), 6),
        "perplexity": [round(value, 2) for value in perplexity],
    }


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _nearest(rows: Tensor, book: Tensor) -> Tensor:
    """(n, Z), (C, Z) -> (n,) int64: the code at the smallest distance."""
    return (book.square().sum(1) - 2 * rows @ book.T).argmin(1)


def _find_centres(rows: np.ndarray, num_centres: int, seed: int) -> np.ndarray:
    """(n, Z) -> (num_centres, Z) float32"""
    kmeans = faiss.Kmeans(rows.shape[1], num_centres, niter=KMEANS_ITERATIONS, seed=seed, min_points_per_centroid=1)
    kmeans.train(np.ascontiguousarray(rows))
    return kmeans.centroids


def _check_rows(rows: np.ndarray) -> np.ndarray:
    if len(rows) < 2:
        raise DataError("embeddings for the RQ-VAE", f"{len(rows)} rows", "at least 2 to learn from")
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise DataError("embeddings for the RQ-VAE", f"{int(bad.sum())} rows that are not finite, first {int(bad.argmax())}", "finite")
    return np.ascontiguousarray(rows, dtype=np.float32)

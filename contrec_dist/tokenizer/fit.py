"""Training of a sigma-VAE, and of its code books where it has some, on a matrix of embeddings (stage tokenize).

Guarantees   weights are a function of rows, config and seed; no other random state is read or changed.
Cost         2000 steps of 512 rows, E = 192, K = 2, Z = 32, hidden 256: 20 ms a step, 40 s on one idle core.
"""

import numpy as np
import torch

from contrec_dist.config import TokenizerConfig
from contrec_dist.errors import DataError
from contrec_dist.progress import track
from contrec_dist.tokenizer.codebooks import Codebooks
from contrec_dist.tokenizer.sigma_vae import InputSpace, SigmaVAE

WEIGHT_DECAY = 1e-4
CLIP_NORM = 1.0
CURVE_POINTS = 100
CHUNK_ROWS = 8192


def fit_tokenizer(
    rows: np.ndarray,
    config: TokenizerConfig,
    seed: int,
    *,
    num_steps: int,
    what: str,
    collaborative: slice | None = None,
) -> tuple[SigmaVAE, list[dict]]:
    """Train a sigma-VAE on `rows` with AdamW, cosine to 0.

    `what` names the rows in errors and progress. `collaborative` names columns that a share `config.collaborative_drop` of
    the samples is encoded without (at 0, as items have them that nobody has met) and all are reconstructed with: the text
    alone then finds a place among the latents of the others. Returns the tokenizer in evaluation mode, and its loss curve: about
    CURVE_POINTS records of {"step", "loss", "reconstruction", "kl", "decorrelation"}, each a mean since the last.
    Shapes   rows: (n, E) float32
    Errors   DataError for fewer than two rows, or values that are not finite
    """
    table = torch.from_numpy(_check_rows(rows, what))
    space = InputSpace.fit(table, whiten=config.whiten, floor=config.whiten_floor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = SigmaVAE(table.shape[1], config, space)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=config.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    curve, sums, every = [], {}, max(1, num_steps // CURVE_POINTS)
    for step in track(range(1, num_steps + 1), stage="tokenize", unit=f"{what} steps", total=num_steps):
        batch = table[torch.randint(len(table), (config.batch_rows,), generator=generator)]  # (B, E)
        seen = _drop_columns(batch, collaborative, config.collaborative_drop, generator)
        losses = _take_step(tokenizer, seen, batch, optimizer, generator)
        schedule.step()
        sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
        if step % every == 0:
            curve.append({"step": step, **{name: round(value / every, 6) for name, value in sums.items()}})
            sums = {}
    tokenizer.eval()
    if config.kind != "sigma_vae":
        with torch.no_grad():
            latents = torch.cat([tokenizer.encode(chunk) for chunk in table.split(CHUNK_ROWS)])
        levels = config.num_levels if config.kind == "rq" else 1
        tokenizer.codebooks = Codebooks.fit(latents, num_levels=levels, num_codes=config.num_codes, seed=seed)
    return tokenizer, curve


def _check_rows(rows: np.ndarray, what: str) -> np.ndarray:
    if len(rows) < 2:
        raise DataError(f"embeddings of {what}", f"{len(rows)} with training interactions", "at least 2 to learn from")
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise DataError(f"embeddings of {what}", f"{int(bad.sum())} rows that are not finite, first {int(bad.argmax())}", "finite")
    return np.ascontiguousarray(rows, dtype=np.float32)


def _drop_columns(batch: torch.Tensor, columns: slice | None, share: float, generator: torch.Generator) -> torch.Tensor:
    """A copy of the batch (B, E) with `columns` of a fresh share of its rows at 0."""
    if columns is None or share == 0:
        return batch
    dropped = torch.rand(len(batch), generator=generator) < share
    batch = batch.clone()
    batch[dropped, columns] = 0.0
    return batch


def _take_step(tokenizer: SigmaVAE, seen: torch.Tensor, target: torch.Tensor, optimizer, generator) -> dict[str, float]:
    """One optimizer step; the losses as numbers."""
    losses = tokenizer.loss(seen, generator, target=target)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), CLIP_NORM)
    optimizer.step()
    return {name: value.item() for name, value in losses.items()}

"""The conditional denoiser: an MLP whose layers are modulated by (condition, noise level) through adaptive layer norm.

Source   adaLN: DiT (arXiv 2212.09748); a per-token diffusion MLP: MAR (arXiv 2406.11838). Written from the papers.
"""

import math

import torch
from torch import Tensor, nn


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of the step through a two-layer MLP. (B,) int64 -> (B, width)."""

    def __init__(self, width: int, num_features: int = 128):
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, step: Tensor) -> Tensor:
        half = self.num_features // 2
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=step.device, dtype=torch.float32) / half)
        angles = step.float()[:, None] * rates  # (B, half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class ModulatedBlock(nn.Module):
    """x + gate(c) * MLP(shift(c) + scale(c) * LN(x)); the gate starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(signal).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Denoiser(nn.Module):
    """adaLN MLP from (x_t, t, condition) to features, and from features to the prediction.

    Several noisy latents a condition may be given at once, draw after draw: the condition is embedded once for all of them.
    At one step for all, as in sampling, the modulation too is computed once a condition, and once in all for a single one.
    Shapes   x_t (M*B, K*Z), step (M*B,), condition (B, D) -> features (M*B, width), middle (M*B, width)
             x_t (M, B, K*Z), step (1,), condition (B, D) or (1, D) -> features (M, B, width), middle (M, B, width)
    """

    def __init__(self, *, latent_width: int, condition_width: int, width: int, num_blocks: int):
        super().__init__()
        self.embed_latent = nn.Linear(latent_width, width)
        self.embed_condition = nn.Linear(condition_width, width)
        self.embed_step = TimestepEmbedding(width)
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, latent_width)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Tensor, step: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        condition = self.embed_condition(condition)  # (B, width)
        if x_t.ndim == 2 and len(x_t) > len(condition):
            condition = condition.repeat(len(x_t) // len(condition), 1)  # (M*B, width)
        signal = nn.functional.silu(condition + self.embed_step(step))  # (M*B, width)
        x = self.embed_latent(x_t)  # (M*B, width)
        middle = x
        for number, block in enumerate(self.blocks):
            x = block(x, signal)
            middle = x if number == (len(self.blocks) - 1) // 2 else middle
        shift, scale = self.modulation(signal).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift, middle

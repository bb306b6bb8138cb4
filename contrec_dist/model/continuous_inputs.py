"""What enters the LLM: text tokens, the `<item>` marker, and the continuous tokens of items and users.

`ItemTable` gives every item one vector, a function of its latents plus a learned residual; the same vector enters the
LLM and is what the one-step prediction is compared with, so what training learns of an item serves both sides. An item
that training did not see has residual zero and is still described by its latents.
"""

import math

import torch
from torch import Tensor, nn

from contrec_dist.model.dropout import Dropout

MARKER_ITEM, MARKER_USER = 0, 1


class ItemTable(nn.Module):
    """Vectors and biases of the catalogue.

    Items that training does not see, those whose `log_popularity` is -inf and every item_idx past the catalogue, have no
    residual and the bias `new_item_bias`, the lowest of the others where it is None; in training they are nobody's
    negatives.
    Shapes   latents: (n, K*Z) normalised, item_idx: (n,), as_new: (n,) bool, items without their residual in training, as such
             items are -> vectors (n, Q), bias (n,)
    """

    def __init__(
        self, *, num_items: int, latent_width: int, query_dim: int, residual: bool, log_popularity: Tensor
    ):  # fmt: skip
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(latent_width, 2 * query_dim), nn.SiLU(), nn.Linear(2 * query_dim, query_dim)
        )
        self.residual = nn.Embedding(num_items, query_dim) if residual else None
        self.new_item_bias: float | None = None
        self._lowest_bias: float | None = None
        self.bias = nn.Embedding(num_items, 1)
        self.register_buffer("trained", torch.isfinite(log_popularity))
        if residual:
            nn.init.normal_(self.residual.weight, std=0.02)
        with torch.no_grad():
            self.bias.weight.copy_(log_popularity.masked_fill(~self.trained, 0.0)[:, None])

    def forward(self, latents: Tensor, item_idx: Tensor, as_new: Tensor | None = None) -> tuple[Tensor, Tensor]:
        vectors = self.project(latents)
        if not self.training:
            return self._describe(vectors, item_idx)
        if self.residual is not None:
            vectors = vectors + _without(self.residual(item_idx), as_new)
        return vectors, self.bias(item_idx)[:, 0].masked_fill(~self.trained[item_idx], -torch.inf)

    def _describe(self, vectors: Tensor, item_idx: Tensor) -> tuple[Tensor, Tensor]:
        inside = item_idx < len(self.trained)
        rows = item_idx.where(inside, 0)
        trained = inside & self.trained[rows]
        if self.residual is not None:
            vectors = vectors + self.residual(rows) * trained[:, None]
        bias = self.bias(rows)[:, 0]
        if not trained.all():
            new = self._find_lowest_bias() if self.new_item_bias is None else self.new_item_bias
            bias = bias.where(trained, bias.new_tensor(new))
        return vectors, bias

    @torch.no_grad()
    def expect_bias(self, queries: Tensor, max_items: int = 65_536) -> float:
        """The bias that gives an item of unknown residual r and bias b the weight that the softmax expects of it.

        mean over queries q of log mean over trained items i of exp(q . r_i + b_i); of more than `max_items` trained items
        so many are taken, evenly. Shapes   queries (P, Q), P > 0
        """
        rows = self.trained.nonzero()[:, 0]
        rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), max_items), dtype=torch.float64).long()]
        bias = self.bias(rows)[:, 0].float()
        expected = []
        for chunk in queries.float().split(256):
            weights = bias if self.residual is None else chunk @ self.residual(rows).float().T + bias
            expected.append(torch.logsumexp(weights, dim=-1).expand(len(chunk)) - math.log(len(rows)))
        return float(torch.cat(expected).mean())

    def _find_lowest_bias(self) -> float:
        """Of the items that training saw; once, until the table trains again."""
        if self._lowest_bias is None:
            self._lowest_bias = float(self.bias(self.trained.nonzero()[:, 0]).min())
        return self._lowest_bias

    def train(self, mode: bool = True) -> "ItemTable":
        self._lowest_bias = None
        return super().train(mode)


class TurnedLatents(nn.Module):
    """Latents that training goes on with after the tokenizer: z -> (z + shift) at the length of z.

    The shift of an item that training does not see stays zero; those of `as_new` go without theirs, as such items do.
    Lengths are kept so that the latents stay at the scale which the noise schedule is made for.
    Shapes   latents (n, K, Z) normalised, item_idx (n,), as_new (n,) bool -> (n, K, Z)
    """

    def __init__(self, *, num_items: int, latent_width: int):
        super().__init__()
        self.shift = nn.Embedding(num_items, latent_width)
        nn.init.zeros_(self.shift.weight)

    def forward(self, latents: Tensor, item_idx: Tensor, as_new: Tensor | None = None) -> Tensor:
        flat = latents.flatten(1)
        turned = flat + _without(self.shift(item_idx), as_new)
        lengths, now = (torch.linalg.vector_norm(one, dim=1, keepdim=True) for one in (flat, turned))
        return (turned * (lengths / now.clamp(min=1e-6))).view_as(latents)


class ContinuousInputs(nn.Module):
    """Projects latents and item vectors to the width of the LLM.

    Token k of an item is project(z_k) + slot_k; the last one also carries the item's vector.
    Shapes   latents (n, K, Z) normalised, vectors (n, Q) -> (n, K, D)
    """

    def __init__(self, *, num_item_tokens: int, latent_dim: int, query_dim: int, user_dim: int, width: int, dropout: float):
        super().__init__()
        self.project = nn.Linear(latent_dim, width)
        self.slots = nn.Embedding(num_item_tokens, width)
        self.markers = nn.Embedding(2, width)
        self.join_vector = nn.Linear(query_dim, width, bias=False)
        self.project_user = nn.Linear(user_dim, width) if user_dim else None
        self.dropout = Dropout(dropout)
        for embedding in (self.slots, self.markers):
            nn.init.normal_(embedding.weight, std=0.02)

    def embed_items(self, latents: Tensor, vectors: Tensor) -> Tensor:
        slots = self.slots(torch.arange(latents.shape[1], device=latents.device))  # (K, D)
        tokens = self.project(latents) + slots  # (n, K, D)
        joined = self.join_vector(vectors)[:, None]  # (n, 1, D)
        tokens = torch.cat([tokens[:, :-1], tokens[:, -1:] + joined], dim=1)
        return self.dropout(tokens)

    def embed_marker(self, marker: int, count: int) -> Tensor:
        device = self.markers.weight.device
        return self.markers(torch.full((count,), marker, dtype=torch.int64, device=device))  # (count, D)

    def embed_users(self, latents: Tensor) -> Tensor:
        """(n, K, Z) -> (n, K, D)."""
        return self.project_user(latents)


def _without(rows: Tensor, dropped: Tensor | None) -> Tensor:
    """The rows, zeros where dropped. rows (n, C), dropped (n,) bool -> (n, C)"""
    return rows if dropped is None else rows.masked_fill(dropped[:, None], 0.0)

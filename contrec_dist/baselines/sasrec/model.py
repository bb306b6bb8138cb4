"""SASRec: item vectors -> causal transformer -> a query; the logit of an item is the inner product with its vector.

An item's vector is a learned one, and with text the sum of that and an MLP of the text's; it is what the transformer
reads and what the softmax compares with (tied). Places are counted from the newest item backwards. With a temperature,
vectors and queries are normalised and the logits are cosines over it.

With text, an item that training never met is its text alone: its learned part stays zero, and it is nobody's negative.
Without, it stands in the softmax as any other, which keeps it out of the lists.

Source   arXiv 1808.09781; pre-norm, GELU
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrec_dist.config import SasRecConfig
from contrec_dist.model.backbone import has_fast_bf16
from contrec_dist.model.dropout import Dropout
from contrec_dist.model.packed_attention import PackedSpans, attend_spans

INITIAL_STD = 0.02
CHUNK_ITEMS = 65_536


class SasRec(nn.Module):
    """Histories of items -> queries, one after every item."""

    def __init__(self, config: SasRecConfig, known: Tensor, max_history: int, text: Tensor | None = None):
        """Shapes   known (N,) bool: items with training interactions; text (N, E) float32, standardised"""
        super().__init__()
        width = config.hidden_size
        self.max_history = max_history
        self.temperature = config.temperature if text is None else config.text_temperature
        self.items = nn.Embedding(len(known), width)
        self.ages = nn.Embedding(max_history, width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        for table in (self.items, self.ages):
            nn.init.normal_(table.weight, std=INITIAL_STD)
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("candidates", torch.ones_like(known) if text is None else known, persistent=False)
        if text is not None:
            self.items.weight.data[~known] = 0.0
            self.read_text = nn.Sequential(
                nn.Linear(text.shape[1], config.text_hidden_size), nn.GELU(), Dropout(config.dropout),
                nn.Linear(config.text_hidden_size, width),
            )  # fmt: skip
            nn.init.normal_(self.read_text[-1].weight, std=INITIAL_STD / config.text_hidden_size**0.5)

    @property
    def device(self) -> torch.device:
        return self.items.weight.device

    @property
    def num_items(self) -> int:
        return self.items.num_embeddings

    def item_vectors(self, item_idx: Tensor | None = None) -> Tensor:
        """Vectors of some items, of all by default. Shapes   item_idx (M,) -> (M, D)"""
        vectors = self.items.weight if item_idx is None else self.items(item_idx)
        if self.text is not None:
            vectors = vectors + self.read_text(self.text if item_idx is None else self.text[item_idx])
        return F.normalize(vectors, dim=-1) if self.temperature else vectors

    @torch.inference_mode()
    def catalogue(self) -> Tensor:
        """Vectors of all items as scoring uses them, a chunk at a time. -> (N, D) float32"""
        chunks = torch.arange(self.num_items, device=self.device).split(CHUNK_ITEMS)
        return torch.cat([self.item_vectors(chunk) for chunk in chunks])

    def read(self, vectors: Tensor, ages: Tensor, spans: PackedSpans | None = None) -> Tensor:
        """Queries after every item. A place sees itself and the earlier ones of its own span; None: of its row.

        Shapes   vectors (B, W, D) of the items read, ages (B, W) in [0, max_history): items that came after -> (B, W, D)
        """
        hidden = self.dropout(vectors + self.ages(ages))
        for block in self.blocks:
            hidden = block(hidden, spans)
        hidden = self.norm(hidden)
        return F.normalize(hidden, dim=-1) / self.temperature if self.temperature else hidden


class Block(nn.Module):
    """Attention and a GELU MLP, each behind a LayerNorm and added to its input. (B, W, D) -> (B, W, D)"""

    def __init__(self, config: SasRecConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads_in, self.heads_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden: Tensor, spans: PackedSpans | None) -> Tensor:
        hidden = hidden + self.dropout(self._attend(self.attention_norm(hidden), spans))
        return hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))

    def _attend(self, hidden: Tensor, spans: PackedSpans | None) -> Tensor:
        query, key, value = self.heads_in(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, W, d)
        if spans is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        else:
            mixed = attend_spans(query * query.shape[3] ** -0.5, key, value, spans)
        return self.heads_out(mixed.flatten(2))


def autocast(precision: str, device: torch.device):
    """bf16 matrix products where `precision` (backbone.precision) and the hardware say so."""
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()

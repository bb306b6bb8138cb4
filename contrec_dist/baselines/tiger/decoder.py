"""Beam search over semantic ids: the most probable items after a history, and their log-probabilities.

Only ids of the catalogue are ever formed: a beam is a prefix of the trie, and its continuations are that prefix's children. A
history is read once; the beams of a user stand beside it in one row, and a mask lets each see the history and its own earlier
codes. So the KV cache is neither repeated over the beams nor reordered, and a step costs what its new tokens cost.

Guarantees   a beam as wide as the catalogue gives the exact order of log p; narrower ones may lose items, never invent them.
Cost         a user: the history's tokens and (levels - 1) * width more through the backbone.
"""

from typing import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from contrec_dist.baselines.tiger.semantic_ids import CodeTrie, SemanticIds
from contrec_dist.baselines.tiger.sequence_model import SequenceModel, first_tokens
from contrec_dist.retrieval.top_k import best_first, empty_result


class TigerDecoder:
    """A trained (or random) sequence model and a catalogue's ids, ready to recommend."""

    def __init__(
        self,
        model: SequenceModel,
        ids: SemanticIds,
        *,
        max_history: int,
        beam_width: int,
        batch_users: int = 128,
        user_buckets: int = 0,
    ):
        self.model, self.ids, self.max_history, self.beam_width = model.eval(), ids, max_history, beam_width
        self.batch_users, self.user_buckets = batch_users, user_buckets
        self.trie = CodeTrie(ids, model.device)
        self.item_tokens = ids.tokens

    def recommend(
        self, histories: Sequence[np.ndarray], k: int, users: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items that a beam of max(beam_width, k) finds, sorted, ties by lower item_idx, (-1, -inf) past the end.

        `users` (user_idx) are needed where the model has user tokens. Seen items are not left out.
        Shapes   B histories (H,) int64, oldest first -> item_idx (B, k) int64, log p (B, k) float32
        """
        scores, items = empty_result(len(histories), k)
        for rows, tokens, lengths in self.batches(histories, users):
            found, log_p = self._search(tokens, lengths, max(self.beam_width, k))
            scores[rows], items[rows] = best_first(log_p.cpu().numpy(), found.cpu().numpy(), k)
        return items, scores

    def batches(
        self, histories: Sequence[np.ndarray], users: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Batches of users with histories of like length, so that little is padded: row numbers, tokens (B, T), lengths (B,)."""
        users = np.zeros(len(histories), dtype=np.int64) if users is None else users
        by_length = np.argsort([min(len(history), self.max_history) for history in histories], kind="stable")
        for start in range(0, len(by_length), self.batch_users):
            rows = by_length[start : start + self.batch_users]
            yield rows, *self._lay_out([histories[row] for row in rows], users[rows])

    @torch.inference_mode()
    def read(self, tokens: Tensor, lengths: Tensor, width: int) -> "Beams":
        """Histories through the backbone, once: a search that has not begun."""
        with self.model.autocast():
            return Beams(self.trie, self.model, tokens, lengths, width)

    def _lay_out(self, histories: list[np.ndarray], users: np.ndarray) -> tuple[Tensor, Tensor]:
        """Start tokens and the newest items, padded on the right: tokens (B, T), lengths (B,)."""
        newest = [history[len(history) - min(len(history), self.max_history) :] for history in histories]
        lengths = np.array([1 + len(one) * self.ids.num_levels for one in newest])
        tokens = np.zeros((len(newest), lengths.max()), dtype=np.int64)
        tokens[:, 0] = first_tokens(self.ids, users, self.user_buckets)
        for row, one in enumerate(newest):
            tokens[row, 1 : lengths[row]] = self.item_tokens[one].ravel()
        return torch.from_numpy(tokens).to(self.model.device), torch.from_numpy(lengths).to(self.model.device)

    @torch.inference_mode()
    def _search(self, tokens: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Items (B, W') and log p (B, W') of the complete beams, -1 and -inf where there are fewer."""
        beams = self.read(tokens, lengths, width)
        with self.model.autocast():
            for level in range(self.ids.num_levels):
                beams.grow(level)
        return torch.where(beams.scores > -torch.inf, self.trie.item[beams.prefixes], -1), beams.scores


class Beams:
    """The beams of a batch of users, with their KV cache.

    `prefixes`, `scores` (B, W): prefixes of the trie and their log-probabilities, -inf where there is none;
    `hidden` (B, W, D): where the next code is read from; `seen`: for every level before, which of its tokens each beam
    descends from, (B, W) int64.
    """

    def __init__(self, trie: CodeTrie, model: SequenceModel, tokens: Tensor, lengths: Tensor, width: int):
        self.trie, self.model, self.lengths, self.width = trie, model, lengths, width
        self.cache, self.seen, self.widths = DynamicCache(), [], []
        places = torch.arange(tokens.shape[1], device=tokens.device)
        # Padding stands behind, so a causal mask hides it while the history is read; later steps mask it by `real`.
        hidden = model.read(tokens, mask=None, places=places.expand(tokens.shape), cache=self.cache)
        self.real = places < lengths[:, None]  # (B, T)
        self.hidden = hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1][:, None]  # (B, 1, D)
        self.prefixes = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)
        self.scores = torch.zeros(len(tokens), 1, device=tokens.device)

    def grow(self, level: int) -> None:
        """Every beam by one code; the best `width` of all continuations stay."""
        if level:
            self._read_newest(level - 1)
        log_p = self.model.logits(self.hidden, level).log_softmax(-1)  # (B, W, codes)
        children, real = self.trie.children(level, self.prefixes)  # (B, W, F)
        candidates = self.scores[..., None] + log_p.gather(2, self.trie.code[level][children])
        candidates = candidates.masked_fill(~real, -torch.inf).flatten(1)
        self.scores, place = candidates.topk(min(self.width, candidates.shape[1]), dim=1)
        origin = place // real.shape[2]
        self.prefixes = children.flatten(1).gather(1, place)
        self.seen = [ancestor.gather(1, origin) for ancestor in self.seen]
        own = torch.arange(place.shape[1], device=place.device).expand(place.shape)
        self.seen.append(own)
        self.widths.append(place.shape[1])

    def _read_newest(self, level: int) -> None:
        """Put the codes of `level` through the backbone, each beside its user's history and its own earlier codes."""
        tokens = self.trie.code[level][self.prefixes] + self.model.offsets[level]  # (B, W)
        parts = [self.real[:, None].expand(-1, tokens.shape[1], -1)]
        for ancestor, width in zip(self.seen, self.widths):
            parts.append(torch.arange(width, device=tokens.device) == ancestor[..., None])
        mask = torch.cat(parts, dim=2)[:, None]  # (B, 1, W, T + all beams so far)
        places = (self.lengths + level)[:, None].expand(tokens.shape)
        self.hidden = self.model.read(tokens, mask=mask, places=places, cache=self.cache)

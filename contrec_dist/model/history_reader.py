"""Reads histories at scoring time: batched, one user a row.

Without a text a row is padded on the right and read in one causal pass: no real position looks at padding, so there is
neither a mask nor a KV cache. With a text rows are padded on the left and the LLM writes its reasoning (greedy, KV cache).
Either way the hidden state at the `<item>` that follows is the condition of the diffusion head; with fused items and no text,
that at the last item.

Cost     layout and embedding are array operations over the whole batch; nothing loops over users.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from contrec_dist.data.prompts import PromptTexts
from contrec_dist.model.backbone import causal_lm
from contrec_dist.model.continuous_inputs import MARKER_ITEM
from contrec_dist.model.contrec import ContRec
from contrec_dist.model.last_position import read_last_positions


@dataclass(frozen=True)
class HistoryBatch:
    """Histories laid end to end, each oldest first; row b holds the items offsets[b]:offsets[b + 1].

    Shapes   items (n,) int64, offsets (B + 1,), latents (n, K, Z) raw, user_latents (B, K, Z) or None
    """

    items: np.ndarray
    offsets: np.ndarray
    latents: np.ndarray
    user_latents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class BatchLayout:
    """Where everything stands in rows of `width` positions, flattened; the positions of prompts.lay_out, shifted.

    Shapes   tokens (B * width,), real (B, width) bool, markers (m,), slots (n, K) or (n, 1), user_slots (B, K) or (B, 0), last (B,)
    """

    width: int
    tokens: np.ndarray
    real: np.ndarray
    markers: np.ndarray
    slots: np.ndarray
    user_slots: np.ndarray
    last: np.ndarray


@dataclass(frozen=True)
class Reading:
    """Shapes   condition (B, D) float32; reasons: B texts, empty where none was asked for."""

    condition: Tensor
    reasons: list[str]


class HistoryReader:
    """Turns histories into conditions. The model should be in eval mode."""

    def __init__(self, model: ContRec, texts: PromptTexts, tokenizer):
        self.model, self.texts, self.tokenizer = model, texts, tokenizer
        self.device = model.latent_mean.device

    @torch.no_grad()
    def read(self, histories: HistoryBatch, *, reasoning: bool) -> Reading:
        """Conditions for the next item after each history; with `reasoning` the text is generated first."""
        num_tokens = self.model.latent_mean.shape[0]
        layout = lay_out_batch(
            self.texts, histories.items, histories.offsets, num_item_tokens=num_tokens,
            num_user_tokens=num_tokens if histories.user_latents is not None else 0,
            with_final_marker=not reasoning, pad_left=reasoning,
        )  # fmt: skip
        with self.model.autocast(self.device):
            embeddings = self._embed(histories, layout)
            if reasoning:
                return self._read_with_text(embeddings, torch.from_numpy(layout.real).to(self.device))
            last = torch.from_numpy(layout.last % layout.width).to(self.device)
            condition = read_last_positions(causal_lm(self.model.backbone).base_model, embeddings, last)
            return Reading(condition.float(), [""] * len(histories))

    def _read_with_text(self, embeddings: Tensor, real: Tensor) -> Reading:
        cache = DynamicCache()
        lm = causal_lm(self.model.backbone)
        last = self._forward(embeddings, real, cache)[:, -1]  # (B, D)
        written = torch.zeros(len(last), 0, dtype=torch.int64, device=self.device)
        open_rows = torch.ones(len(last), dtype=torch.bool, device=self.device)
        last_place = self.texts.config.max_response_tokens - 1
        for place in range(last_place + 1):
            token = lm.get_output_embeddings()(last).float().argmax(-1)  # (B,)
            # Every response of the training ends with the end token, a cut one too.
            token = torch.where(open_rows & (place < last_place), token, self.texts.end_token)
            written = torch.cat([written, token[:, None]], dim=1)
            real = torch.cat([real, open_rows[:, None]], dim=1)
            last = self._forward(lm.get_input_embeddings()(token)[:, None], real, cache)[:, -1]
            open_rows = open_rows & (token != self.texts.end_token)
            if not open_rows.any():
                break
        real = torch.cat([real, torch.ones_like(open_rows)[:, None]], dim=1)
        marker = self.model.inputs.embed_marker(MARKER_ITEM, len(last)).to(embeddings.dtype)[:, None]
        condition = self._forward(marker, real, cache)[:, -1]
        reasons = [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]
        return Reading(condition.float(), reasons)

    def _fill(self, rows: Tensor) -> Tensor:
        """Rows of items as the matrix products shall meet them: these, and any below them."""
        return rows

    def _embed(self, histories: HistoryBatch, layout: BatchLayout) -> Tensor:
        """(B, width, D)"""
        to_device = lambda array: torch.from_numpy(array).to(self.device)  # noqa: E731
        flat = causal_lm(self.model.backbone).get_input_embeddings()(to_device(layout.tokens))
        latents = self.model.normalise(self._fill(to_device(histories.latents)))
        vectors, _ = self.model.items(latents.flatten(1), self._fill(to_device(histories.items)))
        users = histories.user_latents
        embeddings = self.model._insert(
            flat,
            to_device(layout.slots),
            self.model.embed_items(latents, vectors)[: len(histories.items)],
            to_device(layout.markers),
            to_device(layout.user_slots),
            None if users is None else self.model.normalise(to_device(users)),
        )
        return embeddings.view(len(histories), layout.width, -1)

    def _forward(self, embeddings: Tensor, real: Tensor, cache: DynamicCache) -> Tensor:
        """Hidden states of the newest positions given all that `real` covers. (B, new, D)"""
        new, total = embeddings.shape[1], real.shape[1]
        places = (real.long().cumsum(1) - 1).clamp(min=0)
        rows = torch.arange(total - new, total, device=self.device)[:, None]
        columns = torch.arange(total, device=self.device)[None]
        # A padded position looks at itself, so that no row of the mask is empty.
        allowed = ((columns <= rows) & real[:, None, :]) | (columns == rows)  # (B, new, total)
        return causal_lm(self.model.backbone).base_model(
            inputs_embeds=embeddings,
            attention_mask=self.model._as_mask(allowed[:, None]),
            position_ids=places[:, total - new :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


def lay_out_batch(
    texts: PromptTexts, items: np.ndarray, offsets: np.ndarray, *, num_item_tokens: int, num_user_tokens: int,
    with_final_marker: bool, pad_left: bool,
) -> BatchLayout:
    """prompts.lay_out, without a response, of many histories at once."""
    item = texts.item_layout(num_item_tokens)
    head, rows = len(texts.instruction), np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    titles = _written_title_lengths(texts, items, offsets, rows)
    ends = np.cumsum(item.size + titles)
    before = np.concatenate([[0], ends])[offsets]  # positions of items in earlier rows
    num_final = int(with_final_marker and not item.fused)
    lengths = head + num_user_tokens + np.diff(before) + num_final
    width = int(lengths.max())
    first = np.arange(len(lengths)) * width + (width - lengths if pad_left else 0)  # of each row
    starts = (first - before[:-1])[rows] + head + num_user_tokens + ends - (item.size + titles)
    tokens = np.zeros(len(lengths) * width, dtype=np.int64)
    tokens[first[:, None] + np.arange(head)] = texts.instruction
    place = np.arange(titles.sum()) - np.repeat(np.cumsum(titles) - titles, titles)  # inside its title
    tokens[np.repeat(starts + item.size, titles) + place] = texts.titles.flat[
        np.repeat(texts.titles.offsets[items], titles) + place
    ]
    last = first + lengths - 1
    place = np.arange(width)
    return BatchLayout(
        width=width,
        tokens=tokens,
        real=(place >= (width - lengths)[:, None]) if pad_left else (place < lengths[:, None]),
        markers=np.concatenate([item.markers(starts), last[: num_final * len(last)]]),
        slots=item.slots(starts),
        user_slots=first[:, None] + head + np.arange(num_user_tokens),
        last=last,
    )


def _written_title_lengths(texts: PromptTexts, items: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Title tokens written out after each item: those of a row's newest `titled_items` (-1: all). (n,) -> (n,)"""
    lengths = texts.titles.lengths(items)
    if texts.config.titled_items < 0:
        return lengths
    age = offsets[1:][rows] - 1 - np.arange(len(items))  # 0 is the newest
    return np.where(age < texts.config.titled_items, lengths, 0)

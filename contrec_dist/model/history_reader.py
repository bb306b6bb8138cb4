"""Reads histories at scoring time: batched, one user a row, padded on the left, with a KV cache.

The LLM reads the history, writes its reasoning text (greedy) where asked, and the hidden state at the `<item>` that
follows is the condition of the diffusion head.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from contrec_dist.data.prompts import PromptTexts, SampleLayout, lay_out
from contrec_dist.model.backbone import causal_lm
from contrec_dist.model.continuous_inputs import MARKER_ITEM
from contrec_dist.model.contrec import ContRec


@dataclass(frozen=True)
class History:
    """One user's history, oldest first: items (H,) int64, latents (H, K, Z) raw, user_latents (K, Z) or None."""

    items: np.ndarray
    latents: np.ndarray
    user_latents: np.ndarray | None = None


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
    def read(self, histories: list[History], *, reasoning: bool) -> Reading:
        """Conditions for the next item after each history; with `reasoning` the text is generated first."""
        with self.model.autocast(self.device):
            layouts = [self._lay_out(history, with_final_marker=not reasoning) for history in histories]
            embeddings, real = self._embed(histories, layouts)
            if not reasoning:
                hidden = self._forward(embeddings, real, None)
                return Reading(hidden[:, -1].float(), [""] * len(histories))
            return self._read_with_text(embeddings, real)

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

    def _lay_out(self, history: History, with_final_marker: bool) -> SampleLayout:
        num_tokens = self.model.latent_mean.shape[0]
        return lay_out(
            self.texts,
            history.items,
            num_item_tokens=num_tokens,
            num_user_tokens=num_tokens if history.user_latents is not None else 0,
            response=np.zeros(0, dtype=np.int64),
            with_final_marker=with_final_marker,
        )

    def _embed(self, histories: list[History], layouts: list[SampleLayout]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) padded on the left, and which positions are real (B, L)."""
        width = max(layout.length for layout in layouts)
        tokens = np.zeros((len(layouts), width), dtype=np.int64)
        starts = [row * width + width - layout.length for row, layout in enumerate(layouts)]
        for row, layout in enumerate(layouts):
            tokens[row, width - layout.length :] = layout.tokens
        real = torch.from_numpy(np.arange(width) >= width - np.array([one.length for one in layouts])[:, None])
        flat = causal_lm(self.model.backbone).get_input_embeddings()(torch.from_numpy(tokens).to(self.device))
        join = lambda arrays: torch.from_numpy(np.concatenate(arrays)).to(self.device)  # noqa: E731
        latents = self.model.normalise(join([history.latents for history in histories]))
        item_idx = join([history.items.astype(np.int64) for history in histories])
        vectors, _ = self.model.items(latents.flatten(1), item_idx)
        has_users = histories[0].user_latents is not None
        embeddings = self.model._insert(
            flat.flatten(0, 1),
            join([start + layout.slots for start, layout in zip(starts, layouts)]),
            self.model.inputs.embed_items(latents, vectors),
            join([start + layout.markers for start, layout in zip(starts, layouts)]),
            join([start + layout.user_slots for start, layout in zip(starts, layouts)]),
            self.model.normalise(join([history.user_latents[None] for history in histories])) if has_users else None,
        )
        return embeddings.view(len(layouts), width, -1), real.to(self.device)

    def _forward(self, embeddings: Tensor, real: Tensor, cache: DynamicCache | None) -> Tensor:
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
            use_cache=cache is not None,
        ).last_hidden_state

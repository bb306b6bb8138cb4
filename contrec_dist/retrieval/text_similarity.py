"""The text score: how close what the LLM wrote is to what is known of an item. Read in score, written nowhere."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from contrec_dist.embeddings.embed import ENCODER_FOLDER, STATISTICS_NAME
from contrec_dist.embeddings.textual import TextEncoder
from contrec_dist.retrieval.current_index import OverlaidRows

CHUNK_USERS = 256


@dataclass
class TextSimilarity:
    """Cosine of what the LLM wrote and an item's text; both encoders give unit rows, or zeros for no text.

    The catalogue is not embedded again: its text part lies in items.npy, whose standardisation (mean, scale) is undone.
    """

    encoder: TextEncoder
    items: np.ndarray | OverlaidRows
    "embeddings by item_idx"
    part: slice
    "their text columns"
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def open(cls, embeddings: Path, items: np.ndarray | OverlaidRows | None = None) -> "TextSimilarity":
        """Of a complete embeddings folder; rows are read when they are asked for, of `items` (n,) -> (n, E) or items.npy."""
        start, stop = json.loads((embeddings / "layout.json").read_text())["text"]
        statistics = load_file(embeddings / STATISTICS_NAME)
        items = np.load(embeddings / "items.npy", mmap_mode="r") if items is None else items
        encoder = TextEncoder.load(embeddings / ENCODER_FOLDER)
        return cls(encoder, items, slice(start, stop), statistics["text_mean"], statistics["text_scale"])

    def scores(self, reasons: list[str], item_idx: np.ndarray) -> np.ndarray:
        """0 where there is no reason or no item. reasons: B, item_idx (B, C) -> (B, C) float32"""
        similarity = np.zeros(item_idx.shape, dtype=np.float32)
        if not any(reasons):
            return similarity
        unique_reasons, spoken_place = np.unique(np.array(reasons, dtype=str), return_inverse=True)
        spoken = self.encoder.encode(list(unique_reasons))
        spoken[unique_reasons == ""] = 0.0
        wanted, text_place = np.unique(item_idx, return_inverse=True)
        texts = np.asarray(self.items[wanted])[:, self.part] * self.scale + self.mean
        text_place = text_place.reshape(item_idx.shape)
        for start in range(0, len(item_idx), CHUNK_USERS):  # bounds the (users, C, E) gathered at a time
            rows = slice(start, start + CHUNK_USERS)
            similarity[rows] = np.einsum("bce,be->bc", texts[text_place[rows]], spoken[spoken_place[rows]])
        return np.where(item_idx >= 0, similarity, np.float32(0.0))

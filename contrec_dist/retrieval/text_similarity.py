"""The text score: how close what the LLM wrote is to what is known of an item. Read in score, written nowhere."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from contrec_dist.embeddings.embed import ENCODER_FOLDER, STATISTICS_NAME
from contrec_dist.embeddings.textual import TextEncoder

CHUNK_USERS = 256


@dataclass
class TextSimilarity:
    """Cosine of what the LLM wrote and an item's text; both encoders give unit rows, or zeros for no text.

    The catalogue is not embedded again: its text part lies in items.npy, whose standardisation (mean, scale) is undone.
    """

    encoder: TextEncoder
    standardised: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def open(cls, embeddings: Path) -> "TextSimilarity":
        """Of a complete embeddings folder; rows of items.npy are read when they are asked for."""
        start, stop = json.loads((embeddings / "layout.json").read_text())["text"]
        statistics = load_file(embeddings / STATISTICS_NAME)
        standardised = np.load(embeddings / "items.npy", mmap_mode="r")[:, start:stop]
        encoder = TextEncoder.load(embeddings / ENCODER_FOLDER)
        return cls(encoder, standardised, statistics["text_mean"], statistics["text_scale"])

    def scores(self, reasons: list[str], item_idx: np.ndarray) -> np.ndarray:
        """0 where there is no reason or no item. reasons: B, item_idx (B, C) -> (B, C) float32"""
        similarity = np.zeros(item_idx.shape, dtype=np.float32)
        if not any(reasons):
            return similarity
        unique_reasons, spoken_place = np.unique(np.array(reasons, dtype=str), return_inverse=True)
        spoken = self.encoder.encode(list(unique_reasons))
        spoken[unique_reasons == ""] = 0.0
        wanted, text_place = np.unique(item_idx, return_inverse=True)
        texts = self.standardised[wanted] * self.scale + self.mean
        text_place = text_place.reshape(item_idx.shape)
        for start in range(0, len(item_idx), CHUNK_USERS):  # bounds the (users, C, E) gathered at a time
            rows = slice(start, start + CHUNK_USERS)
            similarity[rows] = np.einsum("bce,be->bc", texts[text_place[rows]], spoken[spoken_place[rows]])
        return np.where(item_idx >= 0, similarity, np.float32(0.0))

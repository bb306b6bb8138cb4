"""Which columns of embeddings/items.npy are what: the text part, for those who compare items by their words alone."""

import json
from pathlib import Path

import numpy as np


def read_layout(folder: Path) -> dict[str, slice]:
    """{"collaborative", "text"}: the columns of each part, empty slices where there is none."""
    written = json.loads((Path(folder) / "layout.json").read_text())
    return {part: slice(*written[part]) for part in ("collaborative", "text")}


def read_text_part(folder: Path) -> np.ndarray | None:
    """The standardised text columns, mapped from the file; None where there are none. -> (N, E) float32

    Source   written by the stage embed: layout.json, items.npy
    """
    text = read_layout(folder)["text"]
    return np.load(Path(folder) / "items.npy", mmap_mode="r")[:, text] if text.stop > text.start else None

"""Which columns of embeddings/items.npy are what: the text part, for those who compare items by their words alone."""

import json
from pathlib import Path

import numpy as np


def read_text_part(folder: Path) -> np.ndarray | None:
    """The standardised text columns, mapped from the file; None where there are none. -> (N, E) float32

    Source   written by the stage embed: layout.json, items.npy
    """
    start, stop = json.loads((Path(folder) / "layout.json").read_text())["text"]
    return np.load(Path(folder) / "items.npy", mmap_mode="r")[:, start:stop] if stop > start else None

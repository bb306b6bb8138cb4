"""Stage embed: catalog -> embeddings/.

An item's embedding is its collaborative part (LightGCN, training edges only) beside its text part (title, category,
brand, text); a user's is the collaborative part alone. Every part is standardised with the statistics of the rows that
have training interactions: zero mean in every dimension, unit mean variance over the part, so neither outweighs the
other. An item without training interactions has a collaborative part of zeros, the mean, and its text as any other.

Writes       items.npy, users.npy, user_known.npy, layout.json, standardisation.safetensors, text_encoder/
Guarantees   validation and test interactions influence nothing that is written; the same inputs give the same bytes.
Cost         see collaborative.py and textual.py. Memory: two copies of items.npy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save_file

from contrec_dist.config import Config
from contrec_dist.data.catalog import Histories, load_items
from contrec_dist.errors import ConfigError
from contrec_dist.embeddings.collaborative import fit_lightgcn
from contrec_dist.embeddings.textual import TextEncoder, join_item_text
from contrec_dist.manifest import Manifest, hash_file, hash_json, run_stage, write_json
from contrec_dist.progress import get_logger

ENCODER_FOLDER = "text_encoder"
STATISTICS_NAME = "standardisation.safetensors"


@dataclass(kw_only=True)
class Standardisation:
    """Affine map of one part: per-dimension mean, and one scale that gives the part unit mean variance."""

    mean: np.ndarray
    "(dim,) float32"
    scale: float
    "root of the mean variance; 1 where there is none"

    @classmethod
    def fit(cls, rows: np.ndarray) -> "Standardisation":
        """Statistics of `rows` (n, dim); of no rows: the identity."""
        if rows.size == 0:
            return cls(mean=np.zeros(rows.shape[1], np.float32), scale=1.0)
        variance = float(rows.var(axis=0, dtype=np.float64).mean())
        return cls(mean=rows.mean(axis=0, dtype=np.float64).astype(np.float32), scale=float(np.sqrt(variance)) or 1.0)

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Shapes   (n, dim) -> (n, dim) float32"""
        return ((rows - self.mean) / np.float32(self.scale)).astype(np.float32)


def run(config: Config) -> Manifest:
    """Run the stage; see the module."""
    identity = {"text_model": hash_model(config.embed.text_model)}
    return run_stage(
        config, stage="embed", folder="embeddings", sections=("embed",), inputs=("catalog",), build=_build, extra_identity=identity
    )


def embed_new_items(
    embeddings_folder: Path, titles: Sequence[str], categories: Sequence[str], brands: Sequence[str], texts: Sequence[str]
) -> np.ndarray:
    """Embed items that joined after the stage ran: their text, and the mean (zeros) as the collaborative part.

    Shapes   four sequences of n -> (n, E) float32, the same columns as items.npy
    Errors   ArtifactError when the folder is not a complete output; ValueError when the lengths differ
    """
    folder = Path(embeddings_folder)
    manifest = Manifest.load(folder)
    encoder = TextEncoder.load(folder / ENCODER_FOLDER)
    statistics = load_file(folder / STATISTICS_NAME)
    joined = [join_item_text(*parts) for parts in zip(titles, categories, brands, texts, strict=True)]
    text_part = Standardisation(mean=statistics["text_mean"], scale=float(statistics["text_scale"][0]))
    text = text_part.apply(encoder.encode(joined))
    return np.concatenate([np.zeros((len(text), manifest.facts["collaborative_dim"]), np.float32), text], axis=1)


def hash_model(text_model: str) -> str:
    """Hash of a model folder's files, so that new weights under an old name count; of a hub name: the name."""
    folder = Path(text_model)
    if not text_model or not folder.is_dir():
        return text_model
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hash_json({path.relative_to(folder).as_posix(): hash_file(path) for path in files})


def _build(config: Config, work_dir: Path) -> dict:
    items, edges, num_users = _read_catalog(config.folder("catalog"))
    user_known, item_known = _mark_known(edges, num_users, len(items))
    item_part, user_part, losses = _embed_edges(edges, num_users, len(items), config)
    text = _embed_text(items, config, work_dir / ENCODER_FOLDER)
    collaborative_of = Standardisation.fit(item_part[item_known])
    text_of = Standardisation.fit(text[item_known])
    collaborative = np.where(item_known[:, None], collaborative_of.apply(item_part), 0).astype(np.float32)
    embedding = np.concatenate([collaborative, text_of.apply(text)], axis=1)  # (N, E)
    if embedding.shape[1] == 0:
        raise ConfigError("embed", "no collaborative part and text_dim 0", "at least one of the two")
    users = Standardisation.fit(user_part[user_known]).apply(user_part)
    arrays = {"items.npy": embedding, "users.npy": np.where(user_known[:, None], users, 0).astype(np.float32), "user_known.npy": user_known}
    _save(work_dir, arrays, collaborative_of, text_of)
    return {
        "collaborative_dim": collaborative.shape[1],
        "text_dim": text.shape[1],
        "training_edges": len(edges),
        "items_without_training": int((~item_known).sum()),
        "users_without_training": int((~user_known).sum()),
        "bpr_loss": [round(loss, 6) for loss in losses],
        "files": {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()},
    }


def _read_catalog(folder: Path) -> tuple[pl.DataFrame, np.ndarray, int]:
    """Items, the training edges (M, 2) int64 of (user_idx, item_idx), and the number of users."""
    histories = Histories.load(folder)
    return load_items(folder), np.stack(histories.training_edges(), axis=1).astype(np.int64), histories.num_users


def _mark_known(edges: np.ndarray, num_users: int, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Which users and which items have a training edge. Shapes   (U,) bool, (N,) bool"""
    users, items = np.zeros(num_users, bool), np.zeros(num_items, bool)
    users[edges[:, 0]], items[edges[:, 1]] = True, True
    return users, items


def _embed_edges(edges: np.ndarray, num_users: int, num_items: int, config: Config) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Collaborative embeddings of items and users, of width 0 where they are switched off, and the losses."""
    if config.embed.collaborative == "none":
        return np.zeros((num_items, 0), np.float32), np.zeros((num_users, 0), np.float32), []
    learned = fit_lightgcn(edges, num_users, num_items, config.embed, config.seed)
    get_logger("embed").info("LightGCN: %d edges, loss %.4f -> %.4f", len(edges), learned.losses[0], learned.losses[-1])
    return learned.items, learned.users, learned.losses


def _embed_text(items: pl.DataFrame, config: Config, folder: Path) -> np.ndarray:
    """Text embeddings of the catalogue; the encoder is saved in `folder`. Shapes   -> (N, text width) float32"""
    texts = [join_item_text(*row) for row in items.select("title", "category", "brand", "text").iter_rows()]
    encoder = TextEncoder.fit(texts, config.embed, config.seed)
    encoder.save(folder)
    return encoder.encode(texts)


def _save(folder: Path, arrays: dict[str, np.ndarray], collaborative: Standardisation, text: Standardisation) -> None:
    """Arrays, the statistics that new items need, and which columns are which."""
    for name, array in arrays.items():
        np.save(folder / name, array)
    statistics = {"collaborative_mean": collaborative.mean, "collaborative_scale": np.array([collaborative.scale], np.float32)}
    statistics |= {"text_mean": text.mean, "text_scale": np.array([text.scale], np.float32)}
    save_file(statistics, folder / STATISTICS_NAME)
    start, stop = len(collaborative.mean), len(collaborative.mean) + len(text.mean)
    write_json(folder / "layout.json", {"collaborative": [0, start], "text": [start, stop]})

"""Stage embed: catalog -> embeddings/.

An item's embedding is its collaborative part (training interactions only; embed.collaborative) beside its text part
(title, category, brand, text); a user's is the collaborative part alone. Every part is standardised with the statistics of the rows that
have training interactions: zero mean in every dimension, unit mean variance over the part, so neither outweighs the
other. An item without training interactions has a collaborative part of zeros, the mean, and its text as any other.

Writes       items.npy, users.npy, user_known.npy, layout.json, standardisation.safetensors, text_encoder/
Guarantees   validation and test interactions influence nothing that is written, but that the SASRec of 'sasrec' stops training by
             its ranking of validation items; the same inputs give the same bytes (sasrec: with one number of threads).
Cost         see collaborative.py, distilled.py and textual.py. Memory: the item table as strings (200 bytes an item), the
             collaborative tables, and CHUNK_ITEMS texts at a time; text vectors go through a file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save_file

from contrec_dist.config import Config
from contrec_dist.data.catalog import HISTORIES_FILE, Histories, load_items
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.embeddings.collaborative import CollaborativeEmbedding, fit_lightgcn
from contrec_dist.embeddings.sequential import fit_sequential
from contrec_dist.embeddings.textual import TextEncoder, join_item_text
from contrec_dist.manifest import Manifest, hash_file, hash_json, run_stage, write_json
from contrec_dist.progress import get_logger, track

ENCODER_FOLDER = "text_encoder"
STATISTICS_NAME = "standardisation.safetensors"
RAW_TEXT_NAME = ".text.npy.tmp"
CHUNK_ITEMS = 65_536


@dataclass(kw_only=True)
class Standardisation:
    """Affine map of one part: per-dimension mean, and one scale that gives the part unit mean variance."""

    mean: np.ndarray
    "(dim,) float32"
    scale: float
    "root of the mean variance; 1 where there is none"

    @classmethod
    def fit(cls, rows: np.ndarray, known: np.ndarray | None = None) -> "Standardisation":
        """Statistics of the rows (n, dim) that `known` (n,) marks, of all without it; of none: the identity."""
        known = np.ones(len(rows), bool) if known is None else known
        count = int(known.sum())
        if count == 0 or rows.shape[1] == 0:
            return cls(mean=np.zeros(rows.shape[1], np.float32), scale=1.0)

        def average(transform: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            chunks = (transform(rows[part][known[part]]) for part in _chunks(len(rows)))
            return sum(chunk.sum(axis=0, dtype=np.float64) for chunk in chunks) / count

        mean = average(lambda chunk: chunk)
        variance = float(average(lambda chunk: (chunk - mean) ** 2).mean())
        return cls(mean=mean.astype(np.float32), scale=float(np.sqrt(variance)) or 1.0)

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Shapes   (n, dim) -> (n, dim) float32"""
        return ((rows - self.mean) / np.float32(self.scale)).astype(np.float32)


def run(config: Config) -> Manifest:
    """Run the stage; see the module."""
    identity, sections = {"text_model": hash_model(config.embed.text_model)}, ("embed",)
    if config.embed.collaborative == "sasrec":
        from contrec_dist.baselines.sasrec.baseline import SECTIONS, settings

        identity, sections = identity | settings(config), ("embed", *SECTIONS)
    return run_stage(
        config, stage="embed", folder="embeddings", sections=sections, inputs=("catalog",), build=_build, extra_identity=identity
    )


def embed_new_items(
    embeddings_folder: Path, titles: Sequence[str], categories: Sequence[str], brands: Sequence[str], texts: Sequence[str]
) -> np.ndarray:
    """Embed items that joined after the stage ran: their text, and the mean (zeros) as the collaborative part.

    Shapes   four sequences of n -> (n, E) float32, the same columns as items.npy
    Errors   ArtifactError when the folder is not a complete output, or has no text part: nothing else is known of a new item;
             ValueError when the lengths differ
    """
    folder = Path(embeddings_folder)
    manifest = Manifest.load(folder)
    if manifest.facts["text_dim"] == 0:
        raise ArtifactError(folder, "embeddings without text (embed.text_dim 0)", "a text part, which is all that new items have")
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
    items, user_known = load_items(config.folder("catalog")), _read_known_users(config.folder("catalog"))
    item_known = items["num_train"].to_numpy() > 0
    distilled = config.embed.collaborative == "sasrec"
    learned = None if distilled else _embed_interactions(config, len(user_known), len(items))
    text = _embed_text(items, config, work_dir)
    text_of = Standardisation.fit(text, item_known)
    if distilled:
        learned = _distil(config, items["num_train"].to_numpy(), text, text_of)
    item_part, user_part = learned.items, learned.users
    width = item_part.shape[1] + text.shape[1]
    if width == 0:
        raise ConfigError("embed", "no collaborative part and text_dim 0", "at least one of the two")
    collaborative_of = Standardisation.fit(item_part, item_known)
    chunks = _join_parts(item_part, text, item_known, collaborative_of, text_of)
    _write_rows(work_dir / "items.npy", (len(items), width), chunks)
    (work_dir / RAW_TEXT_NAME).unlink()
    users = Standardisation.fit(user_part, user_known).apply(user_part)
    arrays = {"users.npy": np.where(user_known[:, None], users, 0).astype(np.float32), "user_known.npy": user_known}
    _save(work_dir, arrays, collaborative_of, text_of)
    shapes = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}
    return {
        "collaborative_dim": item_part.shape[1],
        "text_dim": text.shape[1],
        "training_edges": int(items["num_train"].sum()),
        "items_without_training": int((~item_known).sum()),
        "users_without_training": int((~user_known).sum()),
        "losses": [round(loss, 6) for loss in learned.losses],
        "files": {"items.npy": {"shape": [len(items), width], "dtype": "float32"}, **shapes},
    }


def _read_known_users(folder: Path) -> np.ndarray:
    """Which users have a training interaction. Shapes   (U,) bool"""
    return pl.scan_parquet(folder / HISTORIES_FILE).select(pl.col("num_train") > 0).collect()["num_train"].to_numpy()


def _chunks(num_rows: int) -> list[slice]:
    return [slice(start, start + CHUNK_ITEMS) for start in range(0, num_rows, CHUNK_ITEMS)]


def _join_parts(
    collaborative: np.ndarray,
    text: np.ndarray,
    known: np.ndarray,
    collaborative_of: Standardisation,
    text_of: Standardisation,
) -> Iterator[np.ndarray]:
    """Chunks of the item table: both parts standardised, side by side. Shapes   yields (n, E) float32"""
    for part in _chunks(len(known)):
        learned = np.where(known[part, None], collaborative_of.apply(collaborative[part]), 0).astype(np.float32)
        yield np.concatenate([learned, text_of.apply(text[part])], axis=1)


def _write_rows(path: Path, shape: tuple[int, int], chunks: Iterator[np.ndarray]) -> None:
    """Write chunks one after another as one float32 .npy file."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for chunk in chunks:
            chunk.tofile(file)


def _embed_interactions(config: Config, num_users: int, num_items: int) -> CollaborativeEmbedding:
    """The collaborative parts that need no text, of width 0 where they are switched off."""
    if config.embed.collaborative == "none":
        return CollaborativeEmbedding(
            users=np.zeros((num_users, 0), np.float32), items=np.zeros((num_items, 0), np.float32), losses=[]
        )
    histories = Histories.load(config.folder("catalog"))
    if config.embed.collaborative == "sequential":
        return fit_sequential(histories, num_items, config.embed, config.seed)
    edges = np.stack(histories.training_edges(), axis=1).astype(np.int64)  # (M, 2)
    learned = fit_lightgcn(edges, num_users, num_items, config.embed, config.seed)
    get_logger("embed").info("LightGCN: %d edges, loss %.4f -> %.4f", len(edges), learned.losses[0], learned.losses[-1])
    return learned


def _distil(config: Config, num_train: np.ndarray, text: np.ndarray, text_of: Standardisation) -> CollaborativeEmbedding:
    """The collaborative parts of 'sasrec'. Shapes   num_train (N,) int64, text (N, E) raw"""
    from contrec_dist.embeddings.distilled import fit_distilled

    histories = Histories.load(config.folder("catalog"))
    read = text_of.apply(text) if text.shape[1] and config.embed.sasrec_text else None
    return fit_distilled(histories, num_train, read, config)


class ItemTexts(Sequence):
    """The texts of the catalogue's items, joined when they are asked for."""

    def __init__(self, items: pl.DataFrame):
        self.columns = items.select("title", "category", "brand", "text")

    def __len__(self) -> int:
        return len(self.columns)

    def __iter__(self) -> Iterator[str]:
        return (join_item_text(*row) for row in self.columns.iter_rows())

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [join_item_text(*row) for row in self.columns[place].iter_rows()]
        return join_item_text(*self.columns.row(place))


def _embed_text(items: pl.DataFrame, config: Config, work_dir: Path) -> np.ndarray:
    """Text embeddings of the catalogue, mapped from a file; the encoder is saved. Shapes   -> (N, width) float32"""
    texts = ItemTexts(items)
    encoder = TextEncoder.fit(texts, config.embed, config.seed)
    encoder.save(work_dir / ENCODER_FOLDER)
    parts = _chunks(len(texts))
    tracked = parts
    if len(parts) > 1:
        tracked = track(parts, stage="embed", unit=f"chunks of {CHUNK_ITEMS} texts", total=len(parts))
    _write_rows(work_dir / RAW_TEXT_NAME, (len(texts), encoder.dim), (encoder.encode(texts[part]) for part in tracked))
    return np.load(work_dir / RAW_TEXT_NAME, mmap_mode="r")


def _save(folder: Path, arrays: dict[str, np.ndarray], collaborative: Standardisation, text: Standardisation) -> None:
    """Arrays, the statistics that new items need, and which columns are which."""
    for name, array in arrays.items():
        np.save(folder / name, array)
    statistics = {"collaborative_mean": collaborative.mean, "collaborative_scale": np.array([collaborative.scale], np.float32)}
    statistics |= {"text_mean": text.mean, "text_scale": np.array([text.scale], np.float32)}
    save_file(statistics, folder / STATISTICS_NAME)
    start, stop = len(collaborative.mean), len(collaborative.mean) + len(text.mean)
    write_json(folder / "layout.json", {"collaborative": [0, start], "text": [start, stop]})

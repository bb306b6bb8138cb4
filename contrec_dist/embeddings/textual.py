"""Text embeddings of items, and later of generated reasons (stage embed, score).

Two encoders behind one interface, `TextEncoder`:
  sentences   any sentence-transformers model, named by embed.text_model;
  n-grams     no model at all: hashed character (3-5) and word (1-2) n-grams -> idf -> truncated SVD -> unit length.

Guarantees   a saved encoder embeds new texts exactly as it embedded the catalogue; nothing is pickled; an empty text is
             the zero vector of the n-gram encoder.
Cost         n-grams: about 0.1 ms a title on one core; the SVD, on at most MAX_FIT_TEXTS texts, some seconds. The saved
             components take text_dim * num_hash_features * 4 bytes (32 MiB by default).
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Sequence

import numpy as np
import scipy.sparse
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize

from contrec_dist.config import EmbedConfig
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import write_json
from contrec_dist.progress import track

MAX_FIT_TEXTS = 50_000
CHUNK_TEXTS = 8192
MIN_MODEL_COSINE = 0.999
MODEL_PROBE = "The same words are embedded the same way."
ENCODER_NAME = "encoder.json"
WEIGHTS_NAME = "ngrams.safetensors"
PROBE_NAME = "probe.npy"


def join_item_text(title: str, category: str, brand: str, text: str) -> str:
    """The text that stands for an item: what is known of title, category, brand and further text, in this order."""
    return ". ".join(part.strip() for part in (title, category, brand, text) if part and part.strip())


class TextEncoder(ABC):
    """Texts to vectors; fit or load one with the functions of the class, whichever kind it is."""

    dim: int

    @staticmethod
    def fit(texts: Sequence[str], config: EmbedConfig, seed: int) -> "TextEncoder":
        """The encoder that the config asks for, fitted on the catalogue's texts; with text_dim 0 one of width 0."""
        if config.text_model and config.text_dim:
            return SentenceEncoder(config.text_model, config.batch_texts)
        return NgramEncoder.fit_ngrams(texts, config.text_dim, config.num_hash_features, seed)

    @staticmethod
    def load(folder: Path) -> "TextEncoder":
        """The encoder saved in `folder`.

        Errors   ArtifactError naming the file that is missing or does not fit
        """
        path = Path(folder) / ENCODER_NAME
        if not path.is_file():
            raise ArtifactError(path, "no such file", "the text encoder that stage embed saves")
        settings = json.loads(path.read_text())
        kinds = {"ngrams": NgramEncoder, "sentences": SentenceEncoder}
        if settings.get("kind") not in kinds:
            raise ArtifactError(path, f"kind {settings.get('kind')!r}", f"one of {sorted(kinds)}")
        return kinds[settings["kind"]]._load(Path(folder), settings)

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts, one after the other independent. Shapes   n texts -> (n, dim) float32"""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write all that `load` needs into `folder`, which is made."""


class NgramEncoder(TextEncoder):
    """Hashed n-grams, weighted by how rare they are, projected on the catalogue's main directions.

    Shapes   idf: (F,) float32, components: (F, dim) float32, F = num_hash_features: first half characters, then words
    """

    def __init__(self, idf: np.ndarray, components: np.ndarray):
        self.idf, self.components = idf, components
        self.dim = components.shape[1]
        half = len(idf) // 2
        self._characters = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=half, norm=None, dtype=np.float32)
        self._words = HashingVectorizer(ngram_range=(1, 2), n_features=half, norm=None, dtype=np.float32)

    @classmethod
    def fit_ngrams(cls, texts: Sequence[str], dim: int, num_hash_features: int, seed: int) -> "NgramEncoder":
        """Learn idf and components on at most MAX_FIT_TEXTS texts, drawn by `seed`.

        Directions that fewer texts than `dim` cannot have are zero, so the width is always `dim`.
        Errors   ConfigError when num_hash_features is odd or below 2
        """
        if num_hash_features < 2 or num_hash_features % 2:
            raise ConfigError("embed.num_hash_features", num_hash_features, "an even number, at least 2")
        encoder = cls(np.ones(num_hash_features, np.float32), np.zeros((num_hash_features, dim), np.float32))
        if dim == 0 or len(texts) == 0:
            return encoder
        counts = encoder._count(_sample(texts, seed))
        encoder.idf = _compute_idf(counts)
        encoder.components = _fit_components(encoder._weigh(counts), dim, seed)
        return encoder

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        embedded = np.zeros((len(texts), self.dim), np.float32)
        if self.dim == 0:
            return embedded
        for start in range(0, len(texts), CHUNK_TEXTS):
            counts = self._count(texts[start : start + CHUNK_TEXTS])
            embedded[start : start + CHUNK_TEXTS] = normalize(self._weigh(counts) @ self.components)
        return embedded

    def save(self, folder: Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"idf": self.idf, "components": np.ascontiguousarray(self.components)}, folder / WEIGHTS_NAME)
        write_json(folder / ENCODER_NAME, {"kind": "ngrams", "dim": self.dim, "num_hash_features": len(self.idf)})

    @classmethod
    def _load(cls, folder: Path, settings: dict) -> "NgramEncoder":
        weights = load_file(folder / WEIGHTS_NAME)
        expected = (settings["num_hash_features"], settings["dim"])
        if weights["components"].shape != expected:
            raise ArtifactError(folder / WEIGHTS_NAME, f"components {weights['components'].shape}", str(expected))
        return cls(weights["idf"], weights["components"])

    def _count(self, texts: Sequence[str]) -> scipy.sparse.csr_matrix:
        """(n, F) signed n-gram counts."""
        return scipy.sparse.hstack([self._characters.transform(texts), self._words.transform(texts)], format="csr")

    def _weigh(self, counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        """Counts times idf, with characters and words scaled to unit length each."""
        weighted = counts.multiply(self.idf[None, :]).tocsr()
        half = len(self.idf) // 2
        return scipy.sparse.hstack([normalize(weighted[:, :half]), normalize(weighted[:, half:])], format="csr")


class SentenceEncoder(TextEncoder):
    """A sentence-transformers model. Saved by name, with the embedding of one sentence that tells whether it is the same."""

    def __init__(self, model: str, batch_texts: int):
        from sentence_transformers import SentenceTransformer  # an optional dependency, seconds to import

        self.model, self.batch_texts = model, batch_texts
        self._transformer = SentenceTransformer(model)
        self._transformer.eval()
        self.dim = len(self.encode([MODEL_PROBE])[0])

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        chunks = [list(texts[start : start + self.batch_texts]) for start in range(0, len(texts), self.batch_texts)]
        if not chunks:
            return np.zeros((0, self.dim), np.float32)
        if len(chunks) > 1:
            chunks = track(chunks, stage="embed", unit="batches of texts", total=len(chunks))
        settings = {"batch_size": self.batch_texts, "normalize_embeddings": True, "show_progress_bar": False}
        return np.concatenate([self._transformer.encode(chunk, **settings) for chunk in chunks]).astype(np.float32)

    def save(self, folder: Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / PROBE_NAME, self.encode([MODEL_PROBE])[0])
        settings = {"kind": "sentences", "dim": self.dim, "model": self.model, "batch_texts": self.batch_texts}
        write_json(folder / ENCODER_NAME, settings)

    @classmethod
    def _load(cls, folder: Path, settings: dict) -> "SentenceEncoder":
        encoder, saved = cls(settings["model"], settings["batch_texts"]), np.load(folder / PROBE_NAME)
        now = encoder.encode([MODEL_PROBE])[0]
        if now.shape != saved.shape or float(now @ saved) < MIN_MODEL_COSINE:
            raise ArtifactError(settings["model"], "another embedding of the same sentence", "the model that embedded the items")
        return encoder


def _sample(texts: Sequence[str], seed: int) -> Sequence[str]:
    """At most MAX_FIT_TEXTS texts, in their order."""
    if len(texts) <= MAX_FIT_TEXTS:
        return texts
    rows = np.random.default_rng(seed).choice(len(texts), MAX_FIT_TEXTS, replace=False)
    return [texts[row] for row in np.sort(rows)]


def _compute_idf(counts: scipy.sparse.csr_matrix) -> np.ndarray:
    """log((1 + n) / (1 + texts that have the n-gram)) + 1. Shapes   (n, F) -> (F,) float32"""
    present = np.bincount(counts.indices, minlength=counts.shape[1])
    return (np.log((1 + counts.shape[0]) / (1 + present)) + 1).astype(np.float32)


def _fit_components(weighted: scipy.sparse.csr_matrix, dim: int, seed: int) -> np.ndarray:
    """Main directions by randomised SVD, zero past the rank. Shapes   (n, F) -> (F, dim) float32"""
    rank = min(dim, *weighted.shape)
    svd = TruncatedSVD(rank, n_iter=4, random_state=seed).fit(weighted)
    components = np.zeros((weighted.shape[1], dim), np.float32)
    components[:, :rank] = svd.components_.T
    return components

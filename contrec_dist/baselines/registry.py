"""Every baseline by name, and what a baseline module must have.

    SECTIONS   config sections that are its own (they enter its identity whole), for example ("tiger",)
    INPUTS     folders of the run that it reads beside the catalogue, for example ("embeddings",)
    settings(config) -> dict                           values of other sections that its result depends on
    fit(config, work) -> (Recommender, facts)          trains on training interactions alone; may save what it learned in work
    load_recommender(config, folder) -> Recommender    the finished one of a run; where NAME_transitions is to be
    NEEDS      (if any) baselines that are finished first, whose folders are among INPUTS
"""

from importlib import import_module
from typing import Protocol, Sequence

import numpy as np

from contrec_dist.errors import ConfigError

BASELINES: dict[str, tuple[str, str]] = {
    "popularity": ("contrec_dist.baselines.popularity", "the same most-trained-on items for everybody"),
    "item_knn": ("contrec_dist.baselines.item_knn", "what followed the items met last, in everybody's training histories"),
    "sasrec": ("contrec_dist.baselines.sasrec.baseline", "a causal transformer over item ids, softmax over the catalogue"),
    "sasrec_text": ("contrec_dist.baselines.sasrec.with_text", "the same, an item's text in its vector"),
    "text_knn": ("contrec_dist.baselines.text_knn", "the items whose text is nearest to that of the items met last"),
    "tiger": ("contrec_dist.baselines.tiger.baseline", "semantic ids by an RQ-VAE, a causal LM over them, beam search"),
}
# Their scores are log p(item | history) up to a constant of the user, so that other scores can be added as they are to the model's.
SCORED_BY_LOG_PROBABILITY = ("sasrec", "sasrec_text", "tiger")
TRANSITIONS_SUFFIX = "_transitions"
BASELINES |= {
    name + TRANSITIONS_SUFFIX: ("contrec_dist.baselines.with_transitions", f"{name}, its candidates ordered with the model's transitions")
    for name in SCORED_BY_LOG_PROBABILITY
}


class Recommender(Protocol):
    """What a fitted baseline can do."""

    def recommend(
        self, histories: Sequence[np.ndarray], k: int, users: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items after each history, seen ones not left out; sorted best first, (-1, -inf) past the end.

        Shapes   B histories (H,) int64, whole, oldest first; users (B,) user_idx -> item_idx (B, k) int64, scores (B, k) float32
        """
        ...


def baseline_folder(name: str) -> str:
    """Folder of a baseline inside the run."""
    return f"baselines/{name}"


def load_baseline(name: str):
    """The module of a baseline, or what stands for one.

    Errors   ConfigError naming the known ones, or for transitions added to scores that are no log-probabilities
    """
    plain = name.removesuffix(TRANSITIONS_SUFFIX)
    if name not in BASELINES and plain in BASELINES:
        raise ConfigError("baseline", f"{name}, and the scores of {plain} are no log-probabilities", f"one of {_with_transitions()}")
    if name not in BASELINES:
        raise ConfigError("baseline", name, f"one of {sorted(BASELINES)}")
    module = import_module(BASELINES[name][0])
    return module if name == plain else module.WithTransitions(plain)


def _with_transitions() -> list[str]:
    return [name + TRANSITIONS_SUFFIX for name in SCORED_BY_LOG_PROBABILITY]

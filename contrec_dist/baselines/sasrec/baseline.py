"""SASRec as a baseline of the project: item ids alone. with_text.py is the same with the items' text.

Writes   sasrec.safetensors beside the lists
"""

from pathlib import Path

import numpy as np
from safetensors.torch import load_model, save_model

from contrec_dist.baselines.sasrec.fit import build_model, fit_sasrec, max_history
from contrec_dist.baselines.sasrec.recommender import SasRecRecommender
from contrec_dist.config import Config
from contrec_dist.data.catalog import Histories, load_items

SECTIONS, INPUTS = ("sasrec",), ()
MODEL_NAME = "sasrec.safetensors"


def settings(config: Config) -> dict:
    """What the result depends on outside the section `sasrec`."""
    return {"precision": config.backbone.precision, "max_history": max_history(config)}


def fit(config: Config, work: Path) -> tuple[SasRecRecommender, dict]:
    """Train and save in `work`."""
    return fit_and_save(config, work, None, "sasrec")


def fit_and_save(config: Config, work: Path, text: np.ndarray | None, stage: str) -> tuple[SasRecRecommender, dict]:
    """Train with or without text (N, E) and save the weights; the text itself stays in embeddings/."""
    catalog = config.folder("catalog")
    num_train = load_items(catalog)["num_train"].to_numpy()
    model, learned = fit_sasrec(config, Histories.load(catalog), num_train, text, stage)
    save_model(model, str(work / MODEL_NAME))
    facts = {"training": learned, "num_parameters": sum(one.numel() for one in model.parameters())}
    return SasRecRecommender(model, num_train, config.sasrec.batch_users), facts


def load_recommender(config: Config, folder: Path, text: np.ndarray | None = None) -> SasRecRecommender:
    """The finished baseline of a run. `config` must be the one that it was fitted with."""
    num_train = load_items(config.folder("catalog"))["num_train"].to_numpy()
    model = build_model(config, num_train, text)
    load_model(model, str(Path(folder) / MODEL_NAME))
    return SasRecRecommender(model, num_train, config.sasrec.batch_users)

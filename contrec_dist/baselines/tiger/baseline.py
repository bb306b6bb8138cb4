"""TIGER as a baseline of the project: fit on a run's catalogue and embeddings, recommend to its users.

Writes   semantic_ids.npy (N, L), rq_vae.safetensors, sequence_model.safetensors beside the lists
Source   arXiv 2305.05065; what differs: a decoder-only LM of the model's own backbone instead of an encoder-decoder, every item
         of a history a target in one pass, no user token unless asked for
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.torch import load_model, save_model

from contrec_dist.baselines.tiger import fit as training
from contrec_dist.baselines.tiger.decoder import TigerDecoder
from contrec_dist.baselines.tiger.semantic_ids import SemanticIds
from contrec_dist.baselines.tiger.sequence_model import SequenceModel
from contrec_dist.config import Config
from contrec_dist.data.catalog import Histories, load_items

SECTIONS = ("tiger",)
INPUTS = ("embeddings",)
IDS_NAME, MODEL_NAME, QUANTIZER_NAME = "semantic_ids.npy", "sequence_model.safetensors", "rq_vae.safetensors"


def settings(config: Config) -> dict:
    """What the result depends on outside the section `tiger`."""
    backbone = training.backbone_config(config)
    return {
        "shape": asdict(backbone.shape),
        "precision": backbone.precision,
        "max_history": config.prompt.max_history,
        "num_epochs": training.num_epochs(config),
    }


def fit(config: Config, work: Path) -> tuple[TigerDecoder, dict]:
    """Train both parts and save them in `work`."""
    histories = Histories.load(config.folder("catalog"))
    known = load_items(config.folder("catalog"))["num_train"].to_numpy() > 0
    quantizer, ids, facts = training.fit_semantic_ids(config, known)
    model, learned = training.fit_sequence_model(config, histories, ids)
    np.save(work / IDS_NAME, ids.codes)
    save_model(quantizer, str(work / QUANTIZER_NAME))
    save_model(model, str(work / MODEL_NAME))
    facts |= {"training": learned, "num_parameters": sum(one.numel() for one in model.parameters())}
    return open_decoder(config, model, ids), facts


def load_recommender(config: Config, folder: Path) -> TigerDecoder:
    """The finished baseline of a run, ready to recommend. `config` must be the one that it was fitted with."""
    codes = np.load(Path(folder) / IDS_NAME)
    ids = SemanticIds.from_codes(codes, min(config.tiger.num_codes, count_known(config)))
    model = training.build_sequence_model(config, ids)
    load_model(model, str(Path(folder) / MODEL_NAME))
    return open_decoder(config, model.eval(), ids)


def count_known(config: Config) -> int:
    """Items with training interactions: what the RQ-VAE learned from."""
    return int((load_items(config.folder("catalog"))["num_train"] > 0).sum())


def open_decoder(config: Config, model: SequenceModel, ids: SemanticIds) -> TigerDecoder:
    """A decoder with the beam of the config."""
    tiger = config.tiger
    return TigerDecoder(
        model, ids, max_history=config.prompt.max_history, beam_width=tiger.beam_width, batch_users=tiger.batch_users,
        user_buckets=tiger.user_buckets,
    )  # fmt: skip

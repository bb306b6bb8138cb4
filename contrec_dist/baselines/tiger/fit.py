"""Training of TIGER's two parts: the semantic ids of a catalogue, then the causal LM over its training histories.

Guarantees   a function of catalogue, embeddings, config and seed on one machine with one number of threads.
Cost         one process, on a GPU where torch sees one.
"""

import json

import numpy as np
import torch
from torch import nn

from contrec_dist.baselines.tiger.batches import TokenRows
from contrec_dist.baselines.tiger.rq_vae import RqVae, encode_rows, fit_rq_vae, measure_codes
from contrec_dist.baselines.tiger.semantic_ids import SemanticIds
from contrec_dist.baselines.tiger.sequence_model import SequenceModel
from contrec_dist.config import BackboneConfig, Config, TigerConfig
from contrec_dist.data.catalog import Histories
from contrec_dist.errors import ConfigError
from contrec_dist.progress import get_logger, track
from contrec_dist.training.zero3 import learning_rate_at, parameter_groups


def fit_semantic_ids(config: Config, item_known: np.ndarray) -> tuple[RqVae, SemanticIds, dict]:
    """Train the RQ-VAE on the items that training knows and code the whole catalogue. Shapes   item_known (N,) bool"""
    rows = load_item_embeddings(config)
    model, losses = fit_rq_vae(rows[item_known], config.tiger, config.seed)
    learned = encode_rows(model, rows)
    ids = SemanticIds.from_learned(learned, model.codebooks.shape[1])
    facts = {"rq_vae": losses | measure_codes(model, rows, learned), "semantic_ids": ids.describe()}
    get_logger("tiger").info("semantic ids: %s", json.dumps(facts))
    return model, ids, facts


def load_item_embeddings(config: Config) -> np.ndarray:
    """The part of the item embeddings that tiger.embedding names. Errors   ConfigError where it has no column"""
    folder = config.folder("embeddings")
    start, stop = json.loads((folder / "layout.json").read_text())["text"]
    rows = np.load(folder / "items.npy")
    rows = rows[:, start:stop] if config.tiger.embedding == "text" else rows
    if rows.shape[1] == 0:
        raise ConfigError("tiger.embedding", config.tiger.embedding, "a part that the embeddings of this run have")
    return np.ascontiguousarray(rows, dtype=np.float32)


def backbone_config(config: Config) -> BackboneConfig:
    """The small backbone that TIGER gets: the model's own shape unless tiger.shape says otherwise."""
    return BackboneConfig(shape=config.tiger.shape or config.backbone.shape, precision=config.backbone.precision)


def num_epochs(config: Config) -> int:
    """Epochs of the sequence model."""
    return config.train.num_epochs if config.tiger.num_epochs is None else config.tiger.num_epochs


def build_sequence_model(config: Config, ids: SemanticIds) -> SequenceModel:
    """Untrained, with weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SequenceModel(
            backbone_config(config), ids, user_buckets=config.tiger.user_buckets, dropout=config.tiger.dropout
        )


def fit_sequence_model(config: Config, histories: Histories, ids: SemanticIds) -> tuple[SequenceModel, dict]:
    """Next-token training on every item after a user's first; AdamW, warm-up, cosine to 0. Returns it in evaluation mode."""
    tiger = config.tiger
    rows = TokenRows(
        histories, ids, max_history=config.prompt.max_history, row_tokens=tiger.row_tokens,
        user_buckets=tiger.user_buckets, seed=config.seed,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_sequence_model(config, ids).to(device).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, tiger.weight_decay), lr=tiger.learning_rate, betas=(0.9, 0.98), fused=True
    )
    epochs, losses = num_epochs(config), []
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for epoch in track(range(epochs), stage="tiger", unit="epochs", total=epochs):
            losses.append(_train_epoch(model, optimizer, rows, tiger, epoch, epochs, device))
            get_logger("tiger").info("epoch %d: %.4f nats a token", epoch + 1, losses[-1])
    return model.eval(), {"num_targets": rows.num_targets, "num_epochs": epochs, "loss": [round(one, 6) for one in losses]}


def _train_epoch(model, optimizer, rows: TokenRows, tiger: TigerConfig, epoch: int, epochs: int, device) -> float:
    """One pass; the mean loss of its batches."""
    batches = list(rows.plan(epoch, max(1, tiger.batch_tokens // rows.row_tokens)))
    total = 0.0
    for step, numbers in enumerate(batches):
        progress = (epoch + (step + 1) / len(batches)) / epochs
        rate = learning_rate_at(progress, peak=tiger.learning_rate, warmup_ratio=tiger.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with model.autocast():
            loss = model.loss(rows.build(numbers).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), tiger.clip_norm)
        optimizer.step()
        total += loss.item()
    return total / max(1, len(batches))

"""Training of SASRec: the next item by softmax, over the whole catalogue or over drawn negatives, at every place.

AdamW with warm-up. After every few epochs NDCG@10 of validation users (seen items masked) is measured; the best weights are
kept, and training ends when they stop improving. Test items are never read.

Guarantees   on CPUs a function of catalogue, embeddings, config and seed with one number of threads (launch.threads).
Cost         loss 'full': 6 targets x N x D FLOP an epoch, in bf16 where backbone.precision says so. AdamW passes over the
             whole item table every step. One process, on a GPU where torch sees one.
"""

from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrec_dist.baselines.sasrec.batches import Batch, Windows
from contrec_dist.baselines.sasrec.model import SasRec, autocast
from contrec_dist.baselines.sasrec.recommender import Validation
from contrec_dist.config import Config, SasRecConfig
from contrec_dist.data.catalog import Histories
from contrec_dist.model.losses import catalogue_cross_entropy, sampled_cross_entropy
from contrec_dist.progress import get_logger, track
from contrec_dist.training.zero3 import learning_rate_at, parameter_groups

NO_CANDIDATE = -1e4  # added to a logit: its probability is 0


def max_history(config: Config) -> int:
    """Items that it reads of a history."""
    return config.prompt.max_history if config.sasrec.max_history is None else config.sasrec.max_history


def build_model(config: Config, num_train: np.ndarray, text: np.ndarray | None) -> SasRec:
    """Untrained, with weights drawn from the seed. Shapes   num_train (N,) int64, text (N, E) float32"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        text = None if text is None else torch.from_numpy(text)
        return SasRec(config.sasrec, torch.from_numpy(num_train > 0), max_history(config), text)


def fit_sasrec(
    config: Config, histories: Histories, num_train: np.ndarray, text: np.ndarray | None, stage: str
) -> tuple[SasRec, dict]:
    """Train on training interactions alone. Returns it in evaluation mode, with the weights that validate best."""
    sasrec = config.sasrec
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    windows = Windows(histories, max_history=max_history(config), batch_targets=sasrec.batch_targets, seed=config.seed)
    validation = Validation(histories, sasrec.validation_users, sasrec.batch_users)
    best, log, due = BestWeights(), [], sasrec.validate_every_epochs
    with torch.random.fork_rng(), limited_threads(config.launch.threads):
        model = build_model(config, num_train, text).to(device).train()
        torch.manual_seed(config.seed)
        candidates = model.candidates.cpu().numpy()
        negatives = Negatives(num_train, candidates, sasrec, config.seed) if sasrec.loss == "sampled" else None
        training = Training(model, windows, sasrec, config.backbone.precision, negatives)
        for epoch in track(range(sasrec.num_epochs), stage=stage, unit="epochs", total=sasrec.num_epochs):
            log.append({"loss": round(training.run_epoch(epoch), 6)})
            if validation.num_users and ((epoch + 1) % due == 0 or epoch + 1 == sasrec.num_epochs):
                log[-1]["ndcg@10"] = best.offer(epoch, validation.measure(model), model)
            get_logger(stage).info("epoch %d: %s", epoch + 1, log[-1])
            if best.num_worse >= sasrec.patience:
                break
        best.restore(model)
    facts = {"num_targets": windows.num_targets, "validation_users": validation.num_users, "epochs": log}
    return model.eval(), facts | {"best_epoch": best.epoch + 1 if best.weights else len(log)}


class Training:
    """Optimizer steps of a model."""

    def __init__(self, model: SasRec, windows: Windows, config: SasRecConfig, precision: str, negatives: "Negatives | None"):
        self.model, self.windows, self.config, self.precision, self.negatives = model, windows, config, precision, negatives
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98), fused=True
        )

    def run_epoch(self, epoch: int) -> float:
        """One pass; the mean loss of a target in nats."""
        steps, total = self.windows.plan(epoch), 0.0
        for step, numbers in enumerate(steps):
            rate = self._learning_rate((epoch + (step + 1) / len(steps)) / self.config.num_epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batch = self.windows.build(numbers).to(self.model.device)
            with autocast(self.precision, self.model.device):
                loss = self._sum_losses(batch, (epoch, step))
            self.optimizer.zero_grad(set_to_none=True)
            (loss / len(batch.targets)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
            self.optimizer.step()
            total += loss.item()
        return total / max(1, self.windows.num_targets)

    def _sum_losses(self, batch: Batch, step: tuple[int, int]) -> Tensor:
        if self.negatives is None:
            return sum_full_losses(self.model, batch)
        return sum_sampled_losses(self.model, batch, *self.negatives.draw(step))

    def _learning_rate(self, progress: float) -> float:
        peak, warmup = self.config.learning_rate, self.config.warmup_ratio
        if self.config.schedule == "constant":
            return peak * min(1.0, progress / max(warmup, 1e-9))
        return learning_rate_at(progress, peak=peak, warmup_ratio=warmup)


class Negatives:
    """Items drawn with replacement, p ~ (training interactions + 1) ** negative_power; each once where all are asked for.

    Shapes   num_train (N,) int64; candidates (N,) bool, items that may be drawn
    """

    def __init__(self, num_train: np.ndarray, candidates: np.ndarray, config: SasRecConfig, seed: int):
        self.seed, self.num_candidates = seed, int(candidates.sum())
        self.count = min(config.num_negatives, self.num_candidates)
        weights = (num_train + 1.0) ** (config.negative_power if self.count < self.num_candidates else 0.0) * candidates
        self.share = weights / weights.sum()
        self.cumulative = np.cumsum(self.share)

    def draw(self, step: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of a step (epoch, number): item_idx (C,) int64, log(N p) (C,) float32."""
        if self.count == self.num_candidates:
            items = np.flatnonzero(self.share)
        else:
            draws = np.random.default_rng([self.seed, 1, *step]).random(self.count)
            items = np.searchsorted(self.cumulative, draws * self.cumulative[-1], side="right")
        return torch.from_numpy(items), torch.from_numpy(np.log(self.share[items] * len(self.share)).astype(np.float32))


def sum_full_losses(model: SasRec, batch: Batch) -> Tensor:
    """Cross-entropy of every target against all candidates of the catalogue, summed. -> ()"""
    vectors = model.item_vectors()
    queries = model.read(F.embedding(batch.inputs, vectors), batch.ages, batch.spans)[batch.real]
    bias = torch.where(model.candidates, 0.0, NO_CANDIDATE)
    return catalogue_cross_entropy(queries, vectors, bias, batch.targets)


def sum_sampled_losses(model: SasRec, batch: Batch, negatives: Tensor, log_share: Tensor) -> Tensor:
    """The same against negatives (C,) that all targets share, logits corrected by the log of how often they are drawn.

    Shapes   log_share (C,): log(N p) -> ()
    """
    negatives, log_share = negatives.to(model.device), log_share.to(model.device)
    needed, places = torch.cat([batch.inputs.flatten(), batch.targets, negatives]).unique(return_inverse=True)
    vectors = model.item_vectors(needed)
    read, own, drawn = places.split([batch.inputs.numel(), len(batch.targets), len(negatives)])
    read, own, drawn = (F.embedding(place, vectors) for place in (read.view_as(batch.inputs), own, drawn))
    queries = model.read(read, batch.ages, batch.spans)[batch.real]
    no_bias = queries.new_zeros(len(own))
    return sampled_cross_entropy(
        queries, own, no_bias, batch.targets, drawn, -log_share, negatives, model.num_items
    )  # fmt: skip


class BestWeights:
    """The weights with the best figure so far."""

    def __init__(self):
        self.figure, self.epoch, self.num_worse, self.weights = -1.0, -1, 0, None

    def offer(self, epoch: int, figure: float, model: nn.Module) -> float:
        """Keep a copy where the figure is better; num_worse counts the offers since. Returns the figure, rounded."""
        self.num_worse += 1
        if figure > self.figure:
            self.figure, self.epoch, self.num_worse = figure, epoch, 0
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return round(figure, 6)

    def restore(self, model: nn.Module) -> None:
        """Give the model its best weights back; without a figure it keeps its last."""
        if self.weights is not None:
            model.load_state_dict(self.weights)


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """torch with so many CPU threads inside; 0: as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

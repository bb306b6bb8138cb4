"""A trained SASRec at work: queries of histories, Top-K by exact search, and the figure that training stops by.

All in fp32, whatever training ran in. A user without history gets the most trained-on items.
"""

from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from contrec_dist.baselines.popularity import Popularity
from contrec_dist.baselines.sasrec.batches import pad_newest
from contrec_dist.baselines.sasrec.model import SasRec
from contrec_dist.data.catalog import Histories
from contrec_dist.retrieval.metrics import gains_at
from contrec_dist.retrieval.top_k import empty_result, exact_top_k

CHUNK_SCORES = 2**20  # scores that a validation holds at a time: 4 MiB stay in a core's cache
CHUNK_USERS = 64  # at least, for large catalogues


class SasRecRecommender:
    """The recommender of baselines/registry.py. Shapes   num_train (N,) int64"""

    def __init__(self, model: SasRec, num_train: np.ndarray, batch_users: int):
        self.model, self.batch_users = model.eval(), batch_users
        self.vectors, self.popularity = model.catalogue().cpu().numpy(), Popularity(num_train)

    def recommend(self, histories: Sequence[np.ndarray], k: int, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores are the logits; of users without history the counts of training interactions."""
        scores, items = empty_result(len(histories), k)
        lengths = np.array([len(history) for history in histories])
        known, new = np.flatnonzero(lengths > 0), np.flatnonzero(lengths == 0)
        if known.size:
            queries = read_queries(self.model, self.vectors, [histories[row] for row in known], self.batch_users)
            scores[known], items[known] = exact_top_k(queries, self.vectors, k)
        items[new], scores[new] = self.popularity.recommend([histories[row] for row in new], k, users[new])
        return items, scores


@torch.inference_mode()
def read_queries(model: SasRec, vectors: np.ndarray, histories: Sequence[np.ndarray], batch_users: int) -> np.ndarray:
    """The query after the newest item of every history, none empty. Shapes   vectors (N, D) -> (B, D) float32"""
    table = torch.from_numpy(vectors).to(model.device)
    queries = np.empty((len(histories), table.shape[1]), dtype=np.float32)
    by_length = np.argsort([len(history) for history in histories], kind="stable")  # so that little is padded
    for start in range(0, len(by_length), batch_users):
        rows = by_length[start : start + batch_users]
        padded = pad_newest([histories[row] for row in rows], model.max_history)
        inputs, lengths = (one.to(model.device) for one in padded)
        ages = lengths[:, None] - 1 - torch.arange(inputs.shape[1], device=model.device)
        hidden = model.read(table[inputs], ages.clamp(min=0))  # what stands behind a row's end is seen by none of its places
        queries[rows] = hidden[torch.arange(len(rows), device=model.device), lengths - 1].float().cpu().numpy()
    return queries


class Validation:
    """NDCG@10 of validation users, seen items masked. Users without an item before their target are left out."""

    def __init__(self, histories: Histories, num_users: int, batch_users: int):
        """num_users: most, spread evenly over all that have a target; 0: all."""
        users = histories.users_with("validation")
        users = users[histories.validation_pos[users] > 0]
        if 0 < num_users < len(users):
            users = users[np.arange(num_users) * len(users) // num_users]
        self.batch_users, self.num_users = batch_users, len(users)
        self.targets = torch.from_numpy(histories.targets(users, "validation"))
        self.histories = [histories.history(int(user), int(histories.validation_pos[user])) for user in users]

    def measure(self, model: SasRec) -> float:
        """Of the model as it is now; its mode (training or not) is left as it was."""
        was_training = model.training
        model.eval()
        vectors = model.catalogue()
        queries = torch.from_numpy(read_queries(model, vectors.cpu().numpy(), self.histories, self.batch_users))
        step, ranks = max(CHUNK_USERS, CHUNK_SCORES // len(vectors)), []
        for start in range(0, self.num_users, step):
            rows = slice(start, start + step)
            scores = queries[rows].to(model.device) @ vectors.T
            ranks.append(rank_unseen(scores, self.targets[rows].to(model.device), self.histories[rows]).cpu().numpy())
        model.train(was_training)
        return float(gains_at(np.concatenate(ranks), 10).mean())


def rank_unseen(scores: Tensor, targets: Tensor, histories: Sequence[np.ndarray]) -> Tensor:
    """Rank of every target among the items that its history does not hold, ties by lower item_idx; 0 where it holds it.

    Shapes   scores (B, N), overwritten where seen; targets (B,) -> (B,) int64
    """
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    seen = torch.from_numpy(np.stack([rows, np.concatenate(histories)])).to(scores.device)
    scores[seen[0], seen[1]] = -torch.inf
    own = scores.gather(1, targets[:, None])
    better = (scores > own).sum(1)
    better += ((scores == own) & (torch.arange(scores.shape[1], device=scores.device) < targets[:, None])).sum(1)
    return torch.where(own[:, 0].isneginf(), 0, better + 1)

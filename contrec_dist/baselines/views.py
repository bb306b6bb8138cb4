"""From a baseline's recommender to a user's two lists: without what it has seen ('masked') and with it ('kept').

A list is a function of its user alone, whoever else is asked for beside it.
"""

from dataclasses import dataclass
from typing import Callable, Sequence

import numpy as np
import polars as pl

from contrec_dist.baselines.registry import Recommender
from contrec_dist.retrieval.ranking import combine_scores, search_views
from contrec_dist.retrieval.scored_users import Users
from contrec_dist.retrieval.top_k import empty_result

VIEWS = ("masked", "kept")
CHOICE_CUT = 10  # of the NDCG that choices are made by
SEEN_STEP = 16  # the number of items asked for beyond k grows by this, so that users can be searched together
Lists = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Reranked:
    """A recommender whose best candidates are ordered anew by its score + sum of weight * other score, as the model's hybrid.

    Each view has its own candidates: a list without seen items is chosen from `num_candidates` unseen ones.
    others: by name a weight and (users, item_idx (B, C)) -> (B, C) float32
    """

    plain: Recommender
    num_candidates: int
    others: dict[str, tuple[float, Callable[[Users, np.ndarray], np.ndarray]]]

    def recommend_views(self, histories: Sequence[np.ndarray], users: np.ndarray, k: int) -> Lists:
        """As the function below."""
        candidates = recommend_views(self.plain, histories, users, max(k, self.num_candidates))
        asked, lists = as_users(histories, users), {}
        for view, (scores, items) in candidates.items():
            others = {name: (weight, score(asked, items)) for name, (weight, score) in self.others.items() if weight}
            lists[view] = combine_scores(scores, items, others, k)
        return lists


def recommend_views(recommender: Recommender | Reranked, histories: Sequence[np.ndarray], users: np.ndarray, k: int) -> Lists:
    """{'masked', 'kept'} -> (scores (B, k) float32, item_idx (B, k) int64): without and with what a user has seen.

    Of every user k items and as many as it has seen are asked for, rounded up to steps of SEEN_STEP, whoever else is scored
    beside it: a beam search finds other items when it is wider. Users who need as many are searched together.
    """
    if isinstance(recommender, Reranked):
        return recommender.recommend_views(histories, users, k)
    num_seen = np.array([len(history) for history in histories], dtype=np.int64)

    def search(numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        rows = numbers[:, 0]
        beyond = -(-np.minimum(num_seen[rows], count - k) // SEEN_STEP) * SEEN_STEP
        scores, items = empty_result(len(rows), count)
        for width in np.unique(beyond):
            own = np.flatnonzero(beyond == width)
            found, ranked = recommender.recommend([histories[row] for row in rows[own]], k + int(width), users[rows[own]])[::-1]
            scores[own, : k + width], items[own, : k + width] = found[:, :count], ranked[:, :count]
        return scores, items

    seen, offsets = lay_end_to_end(histories)
    return search_views(search, np.arange(len(users))[:, None], k, seen, offsets, VIEWS)


def as_users(histories: Sequence[np.ndarray], users: np.ndarray) -> Users:
    """The same users as the scores of the retrieval read them. Shapes   B histories (H,) int64, users (B,) user_idx"""
    items, offsets = lay_end_to_end(histories)
    no_ids, no_targets = pl.repeat("", len(users), dtype=pl.String, eager=True), np.full(len(users), -1, dtype=np.int64)
    return Users(user_ids=no_ids, user_idx=users, items=items, offsets=offsets, targets=no_targets)


def lay_end_to_end(histories: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All items and where each history begins. -> (n,) int64, (B + 1,) int64"""
    offsets = np.cumsum([0, *map(len, histories)], dtype=np.int64)
    return np.concatenate([*histories, np.empty(0, np.int64)]).astype(np.int64), offsets

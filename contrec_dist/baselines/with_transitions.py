"""A finished baseline, its candidates ordered anew with the transition score that the model's hybrid has: as fair as can be.

    score(item | history) + rho * t(item | history)        over score.num_candidates candidates a user and view

t and the way it is added are the model's own (retrieval/transitions.py, ranking.combine_scores), and so is the choice: of
score.transition_weights the one with the highest NDCG@10 on validation users, seen items masked. The baseline is not trained
again: its folder is an input.

Writes   transitions/similarity_*.npy beside the lists
Cost     the pairs of the training histories once; where there is a choice, the validation users are searched once more.
         tiger searches with beams as wide as the candidates.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from contrec_dist.baselines.registry import Recommender, baseline_folder, load_baseline
from contrec_dist.baselines.views import CHOICE_CUT, Reranked, as_users, recommend_views
from contrec_dist.config import Config
from contrec_dist.data.catalog import Histories
from contrec_dist.errors import ConfigError, DataError
from contrec_dist.progress import get_logger
from contrec_dist.retrieval import metrics as m
from contrec_dist.retrieval.ranking import combine_scores
from contrec_dist.retrieval.transitions import TransitionScores, fit_transitions

TRANSITIONS = "transitions"


@dataclass
class WithTransitions:
    """What a baseline module has (registry.py), for the baseline `plain`."""

    plain: str

    @cached_property
    def module(self):
        """That baseline's own."""
        return load_baseline(self.plain)

    @property
    def SECTIONS(self) -> tuple[str, ...]:
        return (*self.module.SECTIONS, "item_knn")

    @property
    def INPUTS(self) -> tuple[str, ...]:
        return (*self.module.INPUTS, baseline_folder(self.plain))

    @property
    def NEEDS(self) -> tuple[str, ...]:
        return (self.plain,)

    def settings(self, config: Config) -> dict:
        """What decides the lists beside the baseline and item_knn. Errors   ConfigError where no transition would count"""
        weights = config.score.transition_weights
        if not any(weights):
            raise ConfigError("score.transition_weights", weights, f"a weight above 0, to be added to the scores of {self.plain}")
        own = {"transition_weights": list(weights), "num_candidates": config.score.num_candidates}
        return self.module.settings(config) | own

    def fit(self, config: Config, work: Path) -> tuple[Reranked, dict]:
        """Open the finished baseline, count what followed what, choose the weight."""
        fit_transitions(config, work / TRANSITIONS)
        transitions = TransitionScores.open(work / TRANSITIONS, config.item_knn)
        plain = self.module.load_recommender(config, config.folder(baseline_folder(self.plain)))
        weight, means = choose_weight(config, plain, transitions)
        get_logger(self.plain).info("weight of transitions (rho) %g, chosen on validation", weight)
        facts = {
            "plain": self.plain, "num_candidates": config.score.num_candidates,
            "transition_weight": weight, "transition_weight_ndcg": {str(one): mean for one, mean in means.items()},
        }  # fmt: skip
        return Reranked(plain, config.score.num_candidates, {"transitions": (weight, transitions.scores)}), facts


def choose_weight(config: Config, plain: Recommender, transitions: TransitionScores) -> tuple[float, dict[float, float]]:
    """The weight of the highest NDCG@10 on validation users (seen masked), the smaller one on a tie; and that of every weight.

    Errors   DataError where there is a choice and no validation user
    """
    weights, histories = list(config.score.transition_weights), Histories.load(config.folder("catalog"))
    users = histories.users_with("validation")
    if not len(users) and len(weights) > 1:
        raise DataError("score.transition_weights", f"{weights} and no validation user", "one weight, or users to choose it on")
    totals = dict.fromkeys(weights, 0.0)
    for start in range(0, len(users), config.score.users_per_part):
        asked = users[start : start + config.score.users_per_part]
        for weight, gains in _gains(config, plain, transitions, histories, asked).items():
            totals[weight] += float(gains.sum())
    means = {weight: total / max(1, len(users)) for weight, total in totals.items()}
    return max(weights, key=lambda one: (round(means[one], 6), -one)), means


def _gains(config, plain, transitions, histories: Histories, users: np.ndarray) -> dict[float, np.ndarray]:
    """NDCG@10 of every user by weight. (B,) each"""
    before = [histories.history(int(user), int(histories.validation_pos[user])) for user in users]
    count = max(config.score.k, config.score.num_candidates)
    scores, items = recommend_views(plain, before, users, count)["masked"]
    found, targets = transitions.scores(as_users(before, users), items), histories.targets(users, "validation")
    gains = {}
    for weight in config.score.transition_weights:
        ranked = combine_scores(scores, items, {"transitions": (weight, found)}, CHOICE_CUT)[1]
        gains[weight] = m.gains_at(m.rank_targets(ranked, targets), CHOICE_CUT)
    return gains

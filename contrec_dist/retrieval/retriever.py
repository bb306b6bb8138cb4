"""Candidates of the catalogue for conditions, by the ranking rule of the config. Read in score and by the benchmarks."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Sequence

import numpy as np
import torch

from contrec_dist.config import Config, ScoreConfig
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest
from contrec_dist.model.catalogue_posterior import CataloguePosterior, guide
from contrec_dist.model.diffusion_head import Denoise
from contrec_dist.retrieval.current_index import CurrentIndex, OverlaidRows, SearchesItems, open_current
from contrec_dist.retrieval.likelihood import LikelihoodRanker
from contrec_dist.retrieval.ranking import fuse_samples, search_views, select_seen
from contrec_dist.retrieval.scored_users import Users
from contrec_dist.retrieval.top_k import best_first, in_same_row, unite_rows
from contrec_dist.retrieval.user_views import UserViews

SPACES = {"query": "query", "likelihood": "query", "samples": "latent"}
Found = dict[str, tuple[np.ndarray, np.ndarray]]
"{'masked' | 'kept': (scores (B, C) float32, item_idx (B, C) int64)}: without, and with, the items that a user has seen"


def searched_spaces(config: Config) -> list[str]:
    """Spaces of the index that the ranking rule searches. Raises ArtifactError where the index lacks one."""
    spaces = [SPACES[config.score.rank_by], *(["query"] if _needs_posterior(config) else [])]
    there = Manifest.load(config.folder("index")).config["index"]["spaces"]
    for space in spaces:
        if space not in there:
            wanted = f"index.spaces with '{space}', which score.rank_by={config.score.rank_by} needs"
            raise ArtifactError(config.folder("index"), f"spaces {there}", wanted)
    return spaces


def log_popularity(num_train: np.ndarray) -> np.ndarray:
    """Log of the items' share of the training interactions, one added to each. (N,) -> (N,)"""
    counts = num_train + 1.0
    return np.log(counts / counts.sum())


def _needs_posterior(config: Config) -> bool:
    return config.score.rank_by == "samples" and config.head.kind == "bayes"


@dataclass
class Retriever:
    """Candidates of the catalogue by the ranking rule of the config."""

    score: ScoreConfig
    seed: int
    shards: SearchesItems
    item_latents: np.ndarray | OverlaidRows
    "(N, K, Z) raw, memory-mapped"
    log_prior: np.ndarray
    "(N,) of log_popularity"
    query_shards: SearchesItems | None = None
    "the index of item vectors, where samples are drawn by the closed form and it is not `shards`"

    @classmethod
    def open(cls, config: Config, index: CurrentIndex | None = None) -> "Retriever":
        """`index`: opened in the spaces that searched_spaces names; None: the newest version of the run's."""
        index = index or open_current(config, searched_spaces(config))
        shards, prior = index.spaces[SPACES[config.score.rank_by]], log_popularity(index.items["num_train"].to_numpy())
        query_shards = index.spaces["query"] if _needs_posterior(config) else None
        return cls(config.score, config.seed, shards, index.latents, prior, query_shards)

    @property
    def num_candidates(self) -> int:
        """C: never fewer than are asked for, and no more where nothing re-ranks them."""
        others = self.score.reasoning != "none" or any(self.score.transition_weights) or any(self.score.new_item_bonuses)
        return self.score.k if self.score.rank_by == "query" and not others else max(self.score.num_candidates, self.score.k)

    def find(
        self, views: UserViews, condition: torch.Tensor, users: Users, seed: int, wanted: Sequence[str] = ("masked", "kept")
    ) -> Found:
        """Candidates of every user, best first, in the views wanted."""
        if self.score.rank_by == "samples":
            return self.rank_samples(self.draw_samples(views, condition, seed), users, wanted)
        queries = views.queries(condition).cpu().numpy()
        found = search_views(self.shards.search, queries, self.num_candidates, users.items, users.offsets, wanted)
        by_likelihood = self.score.rank_by == "likelihood" and views.model.head.denoiser is not None
        return self.rescore(views, condition, found, seed) if by_likelihood else found  # bayes: the query is log p itself

    def draw_samples(self, views: UserViews, condition: torch.Tensor, seed: int) -> np.ndarray:
        """Latents of every user. Shapes   condition (B, D) -> (S, B, K * Z) float32"""
        samples = views.model.head.sample(
            condition,
            num_samples=self.score.num_samples,
            num_steps=self.score.num_sampling_steps,
            solver=self.score.solver,
            guidance=self.score.guidance,
            guidance_min_sigma=self.score.guidance_min_sigma,
            guidance_max_sigma=self.score.guidance_max_sigma,
            step_spacing=self.score.step_spacing,
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + seed),
            denoise=self._closed_form(views, condition) if views.model.head.denoiser is None else None,
        )
        return samples.cpu().numpy()

    def rank_samples(self, samples: np.ndarray, users: Users, wanted: Sequence[str]) -> Found:
        """Neighbours of S latents a user, fused; among unseen items alone where seen ones are masked. samples (S, B, K * Z)"""
        count, draws = self.num_candidates, len(samples)
        seen = select_seen(users.items, users.offsets, np.tile(np.arange(len(users)), draws))
        near = search_views(self.shards.search, samples.reshape(draws * len(users), -1), count, *seen, wanted)
        shape = (draws, len(users), count)
        return {
            view: fuse_samples(scores.reshape(shape), item_idx.reshape(shape), count)
            for view, (scores, item_idx) in near.items()
        }

    def _closed_form(self, views: UserViews, condition: torch.Tensor) -> Denoise:
        """The denoiser of `head.kind: bayes`: the posterior over each user's candidates by the query."""
        queries = views.queries(condition).cpu().numpy()
        scores, item_idx = self.query_shards.search(queries, min(self.score.posterior_items, self.query_shards.num_items))
        present = torch.from_numpy(item_idx >= 0)
        item_idx = np.maximum(item_idx, 0)
        logits = guide(torch.from_numpy(scores), torch.from_numpy(self.log_prior[item_idx]).float(), self.score.guidance)
        logits = logits.masked_fill(~present, -torch.inf).to(condition.device)

        @lru_cache(maxsize=1)  # a chunk of users takes all its steps before the next one comes
        def posterior(start: int, stop: int) -> CataloguePosterior:
            latents = torch.from_numpy(self.item_latents[item_idx[start:stop]].astype(np.float32)).to(condition.device)
            latents = views.model.normalise(latents).flatten(2)  # (rows, C, K * Z)
            return CataloguePosterior(latents, logits[start:stop], views.model.head.schedule)

        return lambda rows, x_t, step: posterior(rows.start, rows.stop).predict_x0(x_t, step)

    def rescore(self, views: UserViews, condition: torch.Tensor, found: Found, seed: int) -> Found:
        """The same candidates in the order of the model's likelihood."""
        ranker = LikelihoodRanker(
            views.model, self.item_latents, self.log_prior,
            num_levels=self.score.likelihood_levels, num_draws=self.score.likelihood_draws,
        )  # fmt: skip
        candidates = unite_rows([item_idx for _, item_idx in found.values()])  # the views share most of them
        likelihood = ranker.score(condition, candidates, seed=self.seed * 1_000_003 + seed)
        rescored = {}
        for view, (_, item_idx) in found.items():
            own = np.where(in_same_row(candidates, item_idx), candidates, -1)
            rescored[view] = best_first(likelihood, own, item_idx.shape[1])
        return rescored

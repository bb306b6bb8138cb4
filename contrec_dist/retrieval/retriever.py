"""Candidates of the catalogue for conditions, by the ranking rule of the config. Read in score and by the benchmarks."""

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import polars as pl
import torch

from contrec_dist.config import Config, ScoreConfig
from contrec_dist.errors import ArtifactError
from contrec_dist.retrieval.likelihood import LikelihoodRanker
from contrec_dist.retrieval.ranking import fuse_samples, search_views, select_seen
from contrec_dist.retrieval.scored_users import Users
from contrec_dist.retrieval.top_k import best_first
from contrec_dist.retrieval.user_views import UserViews
from sharding.faiss_shards import FaissShards

SPACES = {"query": "query", "likelihood": "query", "samples": "latent"}
Found = dict[str, tuple[np.ndarray, np.ndarray]]
"{'masked' | 'kept': (scores (B, C) float32, item_idx (B, C) int64)}: without, and with, the items that a user has seen"


@dataclass
class Retriever:
    """Candidates of the catalogue by the ranking rule of the config."""

    score: ScoreConfig
    seed: int
    shards: FaissShards
    item_latents: np.ndarray
    "(N, K, Z) raw, memory-mapped"
    log_prior: np.ndarray
    "(N,) log of the items' share of the training interactions, one added to each"

    @classmethod
    def open(cls, config: Config) -> "Retriever":
        space = SPACES[config.score.rank_by]
        folder = config.folder("index") / space
        if not folder.is_dir():
            raise ArtifactError(folder, "no such index", f"index.spaces with '{space}', which score.rank_by={config.score.rank_by} needs")
        counts = pl.read_parquet(config.folder("catalog") / "items.parquet", columns=["num_train"])["num_train"].to_numpy() + 1.0
        latents = np.load(config.folder("tokens") / "item_latents.npy", mmap_mode="r")
        shards = FaissShards.open(folder, config.index.device)
        return cls(config.score, config.seed, shards, latents, np.log(counts / counts.sum()))

    @property
    def num_candidates(self) -> int:
        """C: what the text similarity re-ranks, and never fewer than are asked for."""
        return max(self.score.num_candidates, self.score.k)

    def find(
        self, views: UserViews, condition: torch.Tensor, users: Users, seed: int, wanted: Sequence[str] = ("masked", "kept")
    ) -> Found:
        """Candidates of every user, best first, in the views wanted."""
        if self.score.rank_by == "samples":
            return self._find_by_samples(views, condition, users, seed, wanted)
        queries = views.queries(condition).cpu().numpy()
        found = search_views(self.shards.search, queries, self.num_candidates, users.items, users.offsets, wanted)
        return self.rescore(views, condition, found, seed) if self.score.rank_by == "likelihood" else found

    def _find_by_samples(
        self, views: UserViews, condition: torch.Tensor, users: Users, seed: int, wanted: Sequence[str]
    ) -> Found:
        """Neighbours of S sampled latents a user, fused; among unseen items alone where seen ones are masked."""
        count, draws = self.num_candidates, self.score.num_samples
        samples = views.model.head.sample(
            condition,
            num_samples=draws,
            num_steps=self.score.num_sampling_steps,
            solver=self.score.solver,
            guidance=self.score.guidance,
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + seed),
        )
        queries = samples.flatten(0, 1).cpu().numpy()  # (S * B, K * Z)
        seen = select_seen(users.items, users.offsets, np.tile(np.arange(len(condition)), draws))
        near = search_views(self.shards.search, queries, count, *seen, wanted)
        shape = (draws, len(condition), count)
        return {
            view: fuse_samples(scores.reshape(shape), item_idx.reshape(shape), count)
            for view, (scores, item_idx) in near.items()
        }

    def rescore(self, views: UserViews, condition: torch.Tensor, found: Found, seed: int) -> Found:
        """The same candidates in the order of the model's likelihood."""
        ranker = LikelihoodRanker(
            views.model, self.item_latents, self.log_prior,
            num_levels=self.score.likelihood_levels, num_draws=self.score.likelihood_draws,
        )  # fmt: skip
        rescored = {}
        for view, (scores, item_idx) in found.items():
            likelihood = ranker.score(condition, item_idx, seed=self.seed * 1_000_003 + seed)
            rescored[view] = best_first(likelihood, item_idx, item_idx.shape[1])
        return rescored

"""The validation probe: HR and NDCG of a fixed set of validation users while training runs, by query and by sampler.

Users    spread evenly over all that have a validation item; seen items masked, no reasoning text, the whole catalogue
         ranked
Model    as it would be exported now: the head's moving average, dropout off. Ranked by the code that scores.
Promise  Training is the same with and without it: nothing of its weights, averages, modes and random states is touched.
         The users are cut into chunks whatever the number of ranks, so the figures do not depend on it either.
Cost     One forward pass a chunk; every rank computes the item vectors, N x (Q + 1) float32, and ranks its own chunks
         by exact search, 2 x users x N x (Q + samples x K x Z) FLOPs shared among the ranks.

The LLM and the item table may be partitioned (ZeRO-3), so running them is a collective: every rank makes the same number
of forward passes. The head's average lies whole on every rank, so what follows the forward pass needs nobody else.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist

from contrec_dist.config import Config
from contrec_dist.data.catalog import load_items
from contrec_dist.data.prompts import PromptTexts
from contrec_dist.model.contrec import ContRec
from contrec_dist.model.diffusion_head import DiffusionHead
from contrec_dist.model.history_reader import HistoryReader
from contrec_dist.retrieval.metrics import gains_at, hits_at, rank_targets
from contrec_dist.retrieval.retriever import Retriever, log_popularity
from contrec_dist.retrieval.scored_users import ScoredUsers, Users
from contrec_dist.retrieval.top_k import Metric, exact_top_k
from contrec_dist.retrieval.user_views import UserViews

CHUNK_USERS = 64
RULES = {"query": "query", "samples": "sampler"}


@dataclass
class ExactSearch:
    """What a Retriever asks of an index, over vectors in memory."""

    vectors: np.ndarray
    metric: Metric

    @property
    def num_items(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return exact_top_k(queries, self.vectors, k, self.metric)


@dataclass
class ProbeModel:
    """What UserViews and Retriever ask of a model once histories are read."""

    head: DiffusionHead
    autocast: Callable
    normalise: Callable


class ValidationProbe:
    """Measures a model that DeepSpeed may have partitioned. All ranks call `measure` together."""

    def __init__(self, config: Config, model: ContRec, texts: PromptTexts, user_latents: np.ndarray | None):
        self.config, self.model = config, model
        self.device = model.latent_mean.device
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self.head = self._empty_head()
        latents = model._catalogue.numpy()  # training may turn them: _open_retrievers
        catalog = config.folder("catalog")
        everybody = ScoredUsers.of_catalog(catalog)
        self.log_prior = log_popularity(load_items(catalog)["num_train"].to_numpy())
        reader = HistoryReader(model, texts, tokenizer=None)  # which writing a text would need
        view = ProbeModel(self.head, model.autocast, model.normalise)
        self.views = UserViews(config, view, reader, latents, user_latents, everybody)
        users = everybody.with_target("validation")
        self.num_users = min(config.monitor.probe_users, len(users))
        self.chunks = self._cut(everybody, users[np.linspace(0, len(users) - 1, self.num_users).astype(np.int64)])

    def measure(self, is_asked_to_stop: Callable[[], bool]) -> dict[str, float] | None:
        """{"num_users", "query_hr@10", "query_ndcg@10", "sampler_hr@10", "sampler_ndcg@10"} on every rank.

        None when `is_asked_to_stop`, a collective that is asked in front of every chunk, says so.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        ranks = {}
        with self._evaluating():
            retrievers = self._open_retrievers()
            for first in range(0, len(self.chunks), world_size):
                if is_asked_to_stop():
                    return None
                number = min(first + rank, len(self.chunks) - 1)  # a rank without a chunk reads the last one too
                chunk = self.chunks[number]
                condition = self.views.read_users(chunk, reasoning=False).condition
                if number == first + rank:
                    ranks[number] = self._rank_chunk(retrievers, condition, chunk, number)
        return self._summarize(ranks)

    def _rank_chunk(self, retrievers: dict, condition: torch.Tensor, users: Users, seed: int) -> dict[str, np.ndarray]:
        """Place of every user's target by each rule, 0 for a miss."""
        places = {}
        for rule, retriever in retrievers.items():
            _, item_idx = retriever.find(self.views, condition, users, seed, ("masked",))["masked"]
            places[rule] = rank_targets(item_idx[:, : self.config.monitor.probe_k], users.targets)
        return places

    def _summarize(self, mine: dict[int, dict[str, np.ndarray]]) -> dict[str, float]:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        by_chunk = {number: places for part in found for number, places in part.items()}
        k, figures = self.config.monitor.probe_k, {"num_users": self.num_users}
        for rule, name in RULES.items():
            places = np.concatenate([by_chunk[number][rule] for number in sorted(by_chunk)])
            figures[f"{name}_hr@{k}"] = float(hits_at(places, k).mean())
            figures[f"{name}_ndcg@{k}"] = float(gains_at(places, k).mean())
        return figures

    def _open_retrievers(self) -> dict[str, Retriever]:
        """Exact search over the item vectors and the latents as they are now. A collective under ZeRO-3."""
        self._copy_head()
        latents = self.model.catalogue(self.device).detach().flatten(1).cpu().numpy()
        searches = {
            "query": ExactSearch(self.model.item_vectors().cpu().numpy(), "inner_product"),
            "samples": ExactSearch(latents, "l2"),
        }
        k = self.config.monitor.probe_k
        score = replace(self.config.score, k=k, num_candidates=max(k, self.config.score.num_candidates))
        self.views.item_latents = latents = self.model.raw_catalogue().numpy()
        return {
            rule: Retriever(replace(score, rank_by=rule), self.config.seed, search, latents, self.log_prior, searches["query"])
            for rule, search in searches.items()
        }

    @torch.no_grad()
    def _copy_head(self) -> None:
        """The weights that an export would take: the moving average, or the head's own where there is none."""
        import deepspeed

        target, average = dict(self.head.named_parameters()), self.model.average
        if average is not None:
            for name, parameter in target.items():
                parameter.copy_(getattr(average, average._buffer_name(name)))
            return
        source = dict(self.model.head.named_parameters())
        with deepspeed.zero.GatheredParameters(list(source.values()), enabled=self.config.zero.stage == 3):
            for name, parameter in target.items():
                parameter.copy_(source[name])

    def _empty_head(self) -> DiffusionHead:
        head = DiffusionHead(
            self.model.head_config, condition_width=self.model.head.norm.normalized_shape[0],
            latent_width=self.model.head.latent_width,
        )  # fmt: skip
        return head.to(self.device).eval().requires_grad_(False)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode for the model, then every module's own mode again."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _cut(self, everybody: ScoredUsers, chosen: np.ndarray) -> list[Users]:
        """Chunks of users of like length, each read in one forward pass."""
        users = everybody.pick("validation", chosen)
        order = np.argsort(np.diff(users.offsets), kind="stable")
        size = min(CHUNK_USERS, self.config.score.batch_users)
        return [_take(users, order[start : start + size]) for start in range(0, len(order), size)]


def _take(users: Users, rows: np.ndarray) -> Users:
    """Some of the users, in the order of `rows`."""
    items, offsets = users.newest(rows, int(np.diff(users.offsets).max()))
    return Users(users.user_ids[rows], users.user_idx[rows], items, offsets, users.targets[rows])

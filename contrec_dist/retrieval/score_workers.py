"""What Ray workers of the score stage do with a range of users. Every part depends on its range and the config alone."""

import resource
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
import polars as pl
import torch

from contrec_dist.config import Config
from contrec_dist.model.export import load_export
from contrec_dist.model.history_reader import Reading
from contrec_dist.retrieval.current_index import open_current
from contrec_dist.retrieval.pairing import Versions
from contrec_dist.retrieval.recommendations import HybridWeights, write_rows
from contrec_dist.retrieval.retriever import Retriever, searched_spaces
from contrec_dist.retrieval.scored_users import ScoredUsers, Users
from contrec_dist.retrieval.text_similarity import TextSimilarity
from contrec_dist.retrieval.transitions import TransitionScores
from contrec_dist.retrieval.user_views import UserViews


def views_of(config: Config, split: str) -> tuple[str, ...]:
    """Lists without seen items ('masked'), with them ('kept'): both where they are judged, else as score.filter_seen says."""
    if split != "next":
        return "masked", "kept"
    return ("masked",) if config.score.filter_seen else ("kept",)


def scoring_device(config: Config) -> torch.device:
    """A GPU where the workers reserve one (ray.gpus_per_worker) and torch sees it, else the CPU."""
    return torch.device("cuda" if config.ray.gpus_per_worker and torch.cuda.is_available() else "cpu")


def peak_memory_bytes() -> int:
    """The most resident memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def own_memory_bytes() -> int:
    """Resident memory that is not of mapped files, now; where the system does not tell (no Linux), all that is resident."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return peak_memory_bytes()


class StepClock:
    """Seconds that a part spends in each of its steps, and the CPU's share of them."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_start = time.process_time()

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] += time.perf_counter() - start

    def facts(self, users: int, rows: int) -> dict:
        """What a part tells the driver; memory is the process's highest so far, and its own now."""
        return {
            "users": users, "rows": rows, "seconds": dict(self.seconds), "cpu_seconds": time.process_time() - self.cpu_start,
            "peak_bytes": peak_memory_bytes(), "own_bytes": own_memory_bytes(),
        }  # fmt: skip


@dataclass
class CandidateFinder:
    """Users of a range -> one row a user: user_idx, user_id, reason, {view}_items, {view}_scores, and as the config asks for
    them {view}_texts, {view}_transitions and {view}_new_items.
    """

    config: Config
    views: UserViews
    retriever: Retriever
    texts: TextSimilarity | None
    transitions: TransitionScores | None
    is_new: np.ndarray | None
    "(N,) bool: training did not see the item; None where that does not count"
    item_ids: pl.Series

    @classmethod
    def open(
        cls, config: Config, users: ScoredUsers, versions: Versions, transitions: Path | None = None
    ) -> "CandidateFinder":
        """`transitions`: the folder of fit_transitions, None where they do not count.

        Errors   ArtifactError when the index no longer keeps the version that the job began with
        """
        torch.set_num_threads(1)
        torch.manual_seed(config.seed)
        index = open_current(config, searched_spaces(config), number=versions.index_number)
        model, tokenizer = load_export(config.folder("model"))
        views = UserViews.open(config, model.to(scoring_device(config)), tokenizer, users, index)
        writes = config.score.reasoning != "none"
        texts = TextSimilarity.open(config.folder("embeddings"), index.embeddings) if writes else None
        followed = TransitionScores.open(transitions, config.item_knn) if transitions else None
        is_new = (index.items["num_train"] == 0).to_numpy() if any(config.score.new_item_bonuses) else None
        return cls(config, views, Retriever.open(config, index), texts, followed, is_new, index.items["item_id"])

    def find(self, split: str, start: int, stop: int, wanted: Sequence[str], clock: StepClock) -> pl.DataFrame:
        with clock.time("histories"):
            users = self.views.users.load(split, start, stop)
        frame = {"user_idx": users.user_idx, "user_id": users.user_ids, "reason": [""] * len(users)}
        if len(users):
            with clock.time("model"):
                reading = self._read(users)
                frame["reason"] = reading.reasons
            with clock.time("search"):
                found = self.retriever.find(self.views, reading.condition, users, seed=start, wanted=wanted)
            for view, (scores, item_idx) in found.items():
                frame |= {f"{view}_items": item_idx, f"{view}_scores": scores}
                if self.texts is not None:
                    with clock.time("texts"):
                        frame[f"{view}_texts"] = self.texts.scores(reading.reasons, item_idx)
                if self.transitions is not None:
                    with clock.time("transitions"):
                        frame[f"{view}_transitions"] = self.transitions.scores(users, item_idx)
                if self.is_new is not None:
                    frame[f"{view}_new_items"] = self.is_new[item_idx].astype(np.float32)
        return pl.DataFrame(frame, schema_overrides={"reason": pl.String})

    def _read(self, users: Users) -> Reading:
        """Conditions of the users, and what the LLM wrote of them; written aside, the text does not change the condition."""
        reading = self.views.read_users(users, reasoning=self.texts is not None)
        if self.config.score.reasoning != "aside":
            return reading
        return replace(reading, condition=self.views.read_users(users, reasoning=False).condition)


class CandidateWriter:
    """Ray worker: a range of users of one split -> their candidates, for the choice of the weights and the second pass."""

    def __init__(self, config: Config, users: ScoredUsers, versions: Versions, transitions: Path | None):
        self.config, self.finder = config, CandidateFinder.open(config, users, versions, transitions)

    def process(self, payload: dict, path: Path) -> dict:
        clock = StepClock()
        wanted = views_of(self.config, payload["split"])
        frame = self.finder.find(payload["split"], payload["start"], payload["stop"], wanted, clock)
        with clock.time("writing"):
            frame.write_parquet(path)
        return clock.facts(len(frame), 0)


class RecommendationWriter:
    """Ray worker: the candidates of a range -> the k best by the weights, as rows of item ids."""

    def __init__(self, config: Config, candidates: Path, weights: HybridWeights, versions: Versions):
        self.candidates = candidates
        item_ids = open_current(config, [], number=versions.index_number).items["item_id"]
        self.settings = {"weights": weights, "k": config.score.k, "item_ids": item_ids, "versions": versions}

    def process(self, payload: dict, *paths: Path) -> dict:
        clock = StepClock()
        with clock.time("writing"):
            frame = pl.read_parquet(self.candidates / payload["candidates"])
            rows = sum(write_rows(frame, view, path, **self.settings) for view, path in zip(payload["views"], paths))
        return clock.facts(0, rows)


class DirectWriter:
    """Ray worker: both at once, where the weights are known before."""

    def __init__(
        self, config: Config, users: ScoredUsers, weights: HybridWeights, versions: Versions, transitions: Path | None
    ):
        self.finder = CandidateFinder.open(config, users, versions, transitions)
        item_ids = self.finder.item_ids
        self.settings = {"weights": weights, "k": config.score.k, "item_ids": item_ids, "versions": versions}

    def process(self, payload: dict, *paths: Path) -> dict:
        clock = StepClock()
        frame = self.finder.find(payload["split"], payload["start"], payload["stop"], payload["views"], clock)
        with clock.time("writing"):
            rows = sum(write_rows(frame, view, path, **self.settings) for view, path in zip(payload["views"], paths))
        return clock.facts(len(frame), rows)

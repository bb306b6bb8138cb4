"""The score stage: batch Top-K for every user, on Ray -> recommendations/.

Two passes of exactly-once parts over fixed user ranges. The first reads histories with the model, lets the LLM write its
reasoning, and retrieves candidates from the FAISS shards; then pi, the weight of the text similarity, is chosen on validation
users; the second re-ranks the candidates and writes

    recommendations/split={validation,test,next}/seen={masked,kept}/part-000000.parquet
        user_id str, rank int64 (from 1), item_id str, score float32, reason str; sorted by user, then rank

Killed and started again, a job gives the same bytes as one that never was.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch

from contrec_dist.config import Config, ScoreConfig
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, run_stage
from contrec_dist.model.export import load_export
from contrec_dist.progress import get_logger
from contrec_dist.retrieval.likelihood import LikelihoodRanker
from contrec_dist.retrieval.ranking import combine_text, fuse_samples, search_unseen, select_seen
from contrec_dist.retrieval.text_similarity import TextSimilarity
from contrec_dist.retrieval.top_k import best_first
from contrec_dist.retrieval.user_views import UserViews
from sharding.faiss_shards import FaissShards
from sharding.partition import part_ranges
from sharding.ray_jobs import Part, ray_session, remove_part_records, run_parts

CANDIDATES = ".candidates"
SEEN_VIEWS = ("masked", "kept")
CHOICE_CUTOFF = 10


def run(config: Config) -> Manifest:
    """Score every user of config.score.splits. Errors   ArtifactError when model, tokens and index do not belong together."""
    return run_stage(
        config,
        stage="score",
        folder="recommendations",
        sections=("score", "prompt"),
        inputs=("catalog", "embeddings", "tokens", "model", "index"),
        build=_build,
    )


def _build(config: Config, work: Path) -> dict:
    check_pairing(config)
    users = pl.scan_parquet(config.folder("catalog") / "users.parquet")
    ranges = part_ranges(users.select(pl.len()).collect().item(), config.score.users_per_part)
    with ray_session(config.ray):
        _retrieve(config, work, ranges)
        choice = choose_text_weight(config, work, ranges)
        get_logger("score").info("text weight pi = %g, chosen on validation", choice["text_weight"])
        rows = _rank(config, work, ranges, choice["text_weight"])
    remove_part_records(work)
    shutil.rmtree(work / CANDIDATES)
    return {**choice, "rows": rows, "k": config.score.k, "rank_by": config.score.rank_by}


def check_pairing(config: Config) -> None:
    """The index must have been built from this model, and the model trained on these tokens and this catalogue.

    Errors   ArtifactError naming both hashes
    """
    manifests = {name: Manifest.load(config.folder(name)) for name in ("catalog", "tokens", "model", "index")}
    for reader, written in (("index", "model"), ("index", "tokens"), ("model", "tokens"), ("model", "catalog")):
        made_from, there = manifests[reader].inputs[written], manifests[written].content_hash
        if made_from != there:
            raise ArtifactError(config.folder(reader), f"made from {written} {made_from[:16]}", f"{written} {there[:16]}")


def scoring_device(config: Config) -> torch.device:
    """A GPU where the workers reserve one (ray.gpus_per_worker) and torch sees it, else the CPU."""
    return torch.device("cuda" if config.ray.gpus_per_worker and torch.cuda.is_available() else "cpu")


class CandidateWriter:
    """Ray worker: a range of users of one split -> their candidates, scores and reasons, one row a user."""

    def __init__(self, config: Config):
        torch.set_num_threads(1)
        torch.manual_seed(config.seed)
        self.config = config
        model, tokenizer = load_export(config.folder("model"))
        self.views = UserViews.open(config, model.to(scoring_device(config)), tokenizer)
        self.retriever = Retriever.open(config)
        self.texts = TextSimilarity.open(config.folder("embeddings"))

    def process(self, payload: dict, path: Path) -> dict:
        split = payload["split"]
        users = self.views.users_with_target(split)
        users = users[(users >= payload["start"]) & (users < payload["stop"])]
        frame = {"user_idx": users}
        if len(users):
            reading = self.views.read(users, split, reasoning=self.config.score.reasoning == "generate")
            seen = self.views.seen_items(users, split)
            found = self.retriever.find(self.views, reading.condition, seen, seed=payload["start"])
            frame["reason"] = reading.reasons
            for view, (scores, item_idx) in found.items():
                texts = self.texts.scores(reading.reasons, item_idx)
                frame |= {f"{view}_items": item_idx, f"{view}_scores": scores, f"{view}_texts": texts}
        pl.DataFrame(frame).write_parquet(path)
        return {"rows": len(users)}


SPACES = {"query": "query", "likelihood": "query", "samples": "latent"}


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
        counts = pl.read_parquet(config.folder("catalog") / "items.parquet")["num_train"].to_numpy() + 1.0
        latents = np.load(config.folder("tokens") / "item_latents.npy", mmap_mode="r")
        shards = FaissShards.open(folder, config.index.device)
        return cls(config.score, config.seed, shards, latents, np.log(counts / counts.sum()))

    def find(
        self, views: UserViews, condition: torch.Tensor, seen: list[np.ndarray], seed: int
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{'masked', 'kept'} -> (scores (B, C) float32, item_idx (B, C) int64), without and with seen items."""
        count = self.score.num_candidates
        flat = np.concatenate(seen).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in seen])]).astype(np.int64)
        if SPACES[self.score.rank_by] == "query":
            queries = views.queries(condition).cpu().numpy()
            kept = self.shards.search(queries, count)
            found = {"masked": search_unseen(self.shards.search, queries, count, flat, offsets), "kept": kept}
            return self.rescore(views, condition, found, seed) if self.score.rank_by == "likelihood" else found
        return self._find_by_samples(views, condition, flat, offsets, seed)

    def _find_by_samples(
        self, views: UserViews, condition: torch.Tensor, flat: np.ndarray, offsets: np.ndarray, seed: int
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """As `find`: neighbours of S sampled latents a user, fused; among unseen items alone where seen ones are masked."""
        count, draws = self.score.num_candidates, self.score.num_samples
        samples = views.model.head.sample(
            condition.repeat(draws, 1),
            num_steps=self.score.num_sampling_steps,
            solver=self.score.solver,
            guidance=self.score.guidance,
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + seed),
        )
        queries = samples.cpu().numpy()  # (S * B, K * Z)
        seen = select_seen(flat, offsets, np.tile(np.arange(len(condition)), draws))
        near = {
            "masked": search_unseen(self.shards.search, queries, count, *seen),
            "kept": self.shards.search(queries, count),
        }
        shape = (draws, len(condition), count)
        return {
            view: fuse_samples(scores.reshape(shape), item_idx.reshape(shape), count)
            for view, (scores, item_idx) in near.items()
        }

    def rescore(self, views: UserViews, condition: torch.Tensor, found: dict, seed: int) -> dict:
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


class RecommendationWriter:
    """Ray worker: candidates of a user range -> the k best by latent score + pi * text similarity, as rows of item ids."""

    def __init__(self, config: Config, candidates: Path, text_weight: float):
        self.score, self.candidates, self.text_weight = config.score, candidates, text_weight
        self.item_ids = pl.read_parquet(config.folder("catalog") / "items.parquet")["item_id"].to_numpy()
        self.user_ids = pl.read_parquet(config.folder("catalog") / "users.parquet")["user_id"].to_numpy()

    def process(self, payload: dict, path: Path) -> dict:
        frame = pl.read_parquet(self.candidates / candidate_name(payload["split"], payload["part"]))
        if len(frame) == 0:
            _empty_recommendations().write_parquet(path)
            return {"rows": 0}
        scores, item_idx = rerank(frame, payload["seen"], self.text_weight, self.score.k)
        present = item_idx >= 0
        row, column = np.nonzero(present)
        recommendations = pl.DataFrame({
            "user_id": self.user_ids[frame["user_idx"].to_numpy()[row]],
            "rank": column.astype(np.int64) + 1,
            "item_id": self.item_ids[item_idx[present]],
            "score": scores[present].astype(np.float32),
            "reason": frame["reason"].to_numpy()[row],
        }, schema=_empty_recommendations().schema)  # fmt: skip
        recommendations.write_parquet(path)
        return {"rows": len(recommendations)}


def rerank(frame: pl.DataFrame, seen: str, text_weight: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Hybrid order of a candidate part. -> scores (B, k), item_idx (B, k)"""
    scores, item_idx, texts = (frame[f"{seen}_{name}"].to_numpy() for name in ("scores", "items", "texts"))
    return combine_text(scores, item_idx, texts, text_weight, k)


def choose_text_weight(config: Config, work: Path, ranges: list[tuple[int, int]]) -> dict:
    """pi of the highest NDCG@10 on validation users (seen masked); the smaller one on a tie.

    Returns {"text_weight": pi, "text_weight_ndcg": {pi: NDCG@10}}; without reasoning, or without validation users, pi = 0.
    """
    if config.score.reasoning == "none" or "validation" not in config.score.splits:
        return {"text_weight": 0.0, "text_weight_ndcg": {}}
    histories = pl.read_parquet(config.folder("catalog") / "histories.parquet").filter(pl.col("validation_pos") >= 0)
    target = dict(histories.select("user_idx", pl.col("items").list.get(pl.col("validation_pos"))).rows())
    gains = {weight: [] for weight in config.score.text_weights}
    for part in range(len(ranges)):
        frame = pl.read_parquet(work / CANDIDATES / candidate_name("validation", part))
        if len(frame) == 0:
            continue
        wanted = np.array([target[user] for user in frame["user_idx"].to_list()])[:, None]
        for weight in gains:
            _, item_idx = rerank(frame, "masked", weight, CHOICE_CUTOFF)
            hit, place = np.nonzero(item_idx == wanted)
            gains[weight].append(np.bincount(hit, 1 / np.log2(place + 2), minlength=len(frame)))
    means = {weight: float(np.concatenate(values).mean()) if values else 0.0 for weight, values in gains.items()}
    best = max(sorted(means), key=lambda weight: (round(means[weight], 6), -weight))
    return {"text_weight": best, "text_weight_ndcg": {str(weight): value for weight, value in means.items()}}


def candidate_name(split: str, part: int) -> str:
    """File of a candidate part."""
    return f"{split}-{part:06d}.parquet"


def _retrieve(config: Config, work: Path, ranges: list[tuple[int, int]]) -> None:
    parts = [
        Part(name=candidate_name(split, part), payload={"split": split, "start": start, "stop": stop})
        for split in config.score.splits
        for part, (start, stop) in enumerate(ranges)
    ]
    run_parts(
        parts, CandidateWriter, {"config": _absolute(config)}, output_folder=work / CANDIDATES, workers=config.ray,
        stage="score", unit="candidate parts",
    )  # fmt: skip


def _rank(config: Config, work: Path, ranges: list[tuple[int, int]], text_weight: float) -> int:
    parts = [
        Part(
            name=f"split={split}/seen={seen}/part-{part:06d}.parquet",
            payload={"split": split, "seen": seen, "part": part, "text_weight": text_weight},
        )
        for split in config.score.splits
        for seen in SEEN_VIEWS
        for part in range(len(ranges))
    ]
    arguments = {
        "config": _absolute(config), "candidates": (work / CANDIDATES).absolute(), "text_weight": text_weight
    }  # fmt: skip
    facts = run_parts(
        parts, RecommendationWriter, arguments, output_folder=work, workers=config.ray, stage="score", unit="parts"
    )
    return sum(one["rows"] for one in facts)


def sampler_curve(config: Config, steps: list[int], num_users: int) -> dict[int, dict]:
    """HR@10 on validation users (seen masked) when one fused set of samples is drawn with so many solver steps.

    Returns {steps: {"hr@10": ...}}; the noise is the same for every number of steps.
    """
    model, tokenizer = load_export(config.folder("model"))
    views = UserViews.open(config, model, tokenizer)
    users = views.users_with_target("validation")
    # Spread over the catalogue of users: sources often list them by age or by item, so the first ones are no sample.
    users = users[np.linspace(0, len(users) - 1, min(num_users, len(users))).astype(np.int64)]
    condition = views.read(users, "validation", reasoning=False).condition
    seen = views.seen_items(users, "validation")
    positions = views.target_positions("validation")[users]
    target = np.array([views.reader.read(int(user)).items[place] for user, place in zip(users, positions)])
    opened = Retriever.open(replace(config, score=replace(config.score, rank_by="samples")))
    curve = {}
    for count in steps:
        retriever = replace(opened, score=replace(opened.score, num_sampling_steps=count))
        _, item_idx = retriever.find(views, condition, seen, seed=0)["masked"]
        curve[count] = {"hr@10": float((item_idx[:, :10] == target[:, None]).any(axis=1).mean())}
    return curve


def _empty_recommendations() -> pl.DataFrame:
    schema = {"user_id": pl.String, "rank": pl.Int64, "item_id": pl.String, "score": pl.Float32, "reason": pl.String}
    return pl.DataFrame(schema=schema)


def _absolute(config: Config) -> Config:
    """A copy whose run folder does not depend on the worker's current folder."""
    return replace(config, run_dir=str(Path(config.run_dir).absolute()))

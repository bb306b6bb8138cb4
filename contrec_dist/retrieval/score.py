"""The score stage: batch Top-K for every user, on Ray -> recommendations/.

Exactly-once parts over fixed user ranges read histories with the model, let the LLM write its reasoning where asked, and
retrieve from the FAISS shards. Where pi, the weight of the text similarity, rho, that of the transition score, or the bonus of
new items is still to be chosen on validation users, the candidates are kept and a second pass re-ranks them; else there is one pass. Written is

    <output>/split={validation,test,next}/seen={masked,kept}/part-000000.parquet     columns: recommendations.py

The output is recommendations/, or a folder of its own where score.users_file or score.histories_file names the users.
Killed and started again, a job gives the same bytes as one that never was.

Cost     memory of driver and workers does not grow with the users of the catalogue: every process reads ranges. Where
         transitions count, the driver reads all training histories once.
"""

import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Iterator

import numpy as np
import polars as pl

from contrec_dist.config import Config
from contrec_dist.errors import ConfigError
from contrec_dist.manifest import MANIFEST_NAME, Manifest, hash_file, run_stage
from contrec_dist.model.export import load_export
from contrec_dist.progress import get_logger
from contrec_dist.retrieval.current_index import current_version, open_current
from contrec_dist.retrieval.pairing import Versions, check_pairing
from contrec_dist.retrieval.recommendations import HybridWeights, rerank
from contrec_dist.retrieval.retriever import Retriever, searched_spaces
from contrec_dist.retrieval.score_workers import (
    CandidateWriter,
    DirectWriter,
    RecommendationWriter,
    peak_memory_bytes,
    views_of,
)
from contrec_dist.retrieval.scored_users import ScoredUsers
from contrec_dist.retrieval.transitions import fit_transitions
from contrec_dist.retrieval.user_views import UserViews
from contrec_dist.retrieval.users_files import NamedUsers, pick_users, read_histories
from sharding.partition import part_ranges
from sharding.ray_jobs import Part, ray_session, remove_part_records, run_parts

CANDIDATES, NAMED_USERS, TRANSITIONS = ".candidates", ".users.parquet", ".transitions"
CHOICE_CUTOFF = 10
Range = tuple[int, int]


def run(config: Config) -> Manifest:
    """Score the users of the config.

    Errors   ArtifactError when catalog, tokens, model and index do not belong together; ConfigError and DataError for files
             of users that cannot be used
    """
    named = config.score.users_file or config.score.histories_file
    if config.score.users_file and config.score.histories_file:
        raise ConfigError("score.histories_file", config.score.histories_file, "nothing where score.users_file is set")
    if config.score.histories_file:  # new users have no targets
        config = replace(config, score=replace(config.score, splits=["next"]))
    if named and not Path(named).is_file():
        raise ConfigError("score.users_file or score.histories_file", named, "a file that exists")
    return run_stage(
        config,
        stage="score",
        folder=output_folder(config),
        sections=("score", "prompt"),
        inputs=("catalog", "embeddings", "tokens", "model", "index"),
        build=_build,
        extra_identity=_identity(config, named),
    )


def _identity(config: Config, named: str) -> dict:
    """What lists depend on besides config and inputs: the users of a file, and the changes to the index since it was built."""
    built = (config.folder("index") / MANIFEST_NAME).is_file()  # else the stage itself says what is missing
    similarity = asdict(config.item_knn) if any(config.score.transition_weights) else {}
    return {
        "users": hash_file(Path(named)) if named else "",
        "index_version": current_version(config)[1] if built else "",
        **({"item_knn": similarity} if similarity else {}),
    }


def output_folder(config: Config) -> str:
    """Where the lists go, relative to the run's folder: users of a file never replace the stage's own output."""
    if config.score.output:
        return str(Path(config.score.output).absolute())
    named = config.score.users_file or config.score.histories_file
    return f"recommendations-{Path(named).name.split('.')[0]}" if named else "recommendations"


def _build(config: Config, work: Path) -> dict:
    config = replace(config, run_dir=str(Path(config.run_dir).absolute()))  # a worker has another current folder
    work = work.absolute()
    versions = check_pairing(config)
    named = name_users(config, work)
    ranges = part_ranges(named.users.count, config.score.users_per_part)
    with ray_session(config.ray), own_search_actors(config, versions):
        job = ScoreJob(config, work, named.users, ranges, versions)
        choice, parts = job.run()
    remove_part_records(work)
    for folder in (CANDIDATES, TRANSITIONS):
        shutil.rmtree(work / folder, ignore_errors=True)
    (work / NAMED_USERS).unlink(missing_ok=True)
    facts = {"model_version": versions.model, "index_version": versions.index, "k": config.score.k, "rank_by": config.score.rank_by}
    return {**choice, **facts, **summarize_parts(parts), **named.facts}


@contextmanager
def own_search_actors(config: Config, versions: Versions) -> Iterator[None]:
    """With index.search=ray, start the actors that all workers ask, and keep them until these are done."""
    if config.index.search != "ray":
        yield
        return
    index = open_current(config, searched_spaces(config), number=versions.index_number)
    try:
        yield
    finally:
        for shards in index.spaces.values():
            shards.close()


def name_users(config: Config, work: Path) -> NamedUsers:
    """The users of the config: those of a file, brought into one form, or all of the catalogue."""
    if config.score.users_file:
        return pick_users(config, work / NAMED_USERS)
    if config.score.histories_file:
        return read_histories(config, work / NAMED_USERS)
    return NamedUsers(ScoredUsers.of_catalog(config.folder("catalog")), {})


@dataclass
class ScoreJob:
    """The Ray parts of one scoring."""

    config: Config
    work: Path
    users: ScoredUsers
    ranges: list[Range]
    versions: Versions

    def run(self) -> tuple[dict, list[dict]]:
        """Make all parts; how the weights were chosen, and the facts of the parts."""
        known, transitions = known_weights(self.config), None
        if any(self.config.score.transition_weights) if known is None else known.transitions:
            transitions = self.work / TRANSITIONS
            fit_transitions(self.config, transitions)
        arguments = {"users": self.users, "versions": self.versions, "transitions": transitions}
        if known is not None:
            parts = self._run_parts(DirectWriter, arguments | {"weights": known}, self._parts(), "parts")
            return describe_choice(known, {}), parts
        candidates = [
            Part(name=candidate_name(split, part), payload={"split": split, "start": start, "stop": stop})
            for split, part, (start, stop) in self._each_range()
        ]
        found = self._run_parts(CandidateWriter, arguments, candidates, "candidate parts", self.work / CANDIDATES)
        weights, choice = choose_weights(self.config, self.work, self.users, self.ranges)
        told = "weights of text (pi) %g and transitions (rho) %g, bonus of new items %g, chosen on validation"
        get_logger("score").info(told, weights.texts, weights.transitions, weights.new_items)
        arguments = {"candidates": self.work / CANDIDATES, "weights": weights, "versions": self.versions}
        parts = self._parts(weights=asdict(weights))
        return choice, found + self._run_parts(RecommendationWriter, arguments, parts, "parts")

    def _parts(self, **more) -> list[Part]:
        """One part a range and split, with a file a view."""
        parts = []
        for split, part, (start, stop) in self._each_range():
            views = views_of(self.config, split)
            payload = {"split": split, "start": start, "stop": stop, "views": list(views), **more}
            payload["candidates"] = candidate_name(split, part)
            files = tuple(f"split={split}/seen={view}/part-{part:06d}.parquet" for view in views)
            parts.append(Part(name=f"{split}-{part:06d}", payload=payload, files=files))
        return parts

    def _each_range(self) -> list[tuple[str, int, Range]]:
        return [(split, part, span) for split in self.config.score.splits for part, span in enumerate(self.ranges)]

    def _run_parts(self, worker, arguments: dict, parts: list[Part], unit: str, folder: Path | None = None) -> list[dict]:
        arguments = {"config": self.config, **arguments}
        folder = folder or self.work
        return run_parts(parts, worker, arguments, output_folder=folder, workers=self.config.ray, stage="score", unit=unit)


def weight_grid(config: Config) -> list[HybridWeights]:
    """Every pair of weights to choose from, at the smallest bonus; no text weight where no text is written."""
    texts = [0.0] if config.score.reasoning == "none" else config.score.text_weights
    return [HybridWeights(*pair, min(config.score.new_item_bonuses)) for pair in product(texts, config.score.transition_weights)]


def known_weights(config: Config) -> HybridWeights | None:
    """The weights where nothing is to be chosen: one of each to choose from, or no validation users to choose on (0, 0, 0)."""
    grid = weight_grid(config)
    if len(grid) == 1 and len(config.score.new_item_bonuses) == 1:
        return grid[0]
    if "validation" in config.score.splits:
        return None
    told = "no validation users to choose among score.%s: none counts"
    names = ("text_weights", "transition_weights", "new_item_bonuses")
    get_logger("score").warning(told, ", score.".join(f"{name} {getattr(config.score, name)}" for name in names))
    return HybridWeights()


def choose_weights(config: Config, work: Path, users: ScoredUsers, ranges: list[Range]) -> tuple[HybridWeights, dict]:
    """The weights of the highest NDCG@10 on validation users (seen masked), the smaller ones on a tie; then the largest bonus of
    new items that costs no more of it than score.new_item_cost; and describe_choice.
    """
    judge = partial(_validation_ndcg, work=work, users=users, ranges=ranges)
    means = judge(weight_grid(config))
    best = max(means, key=lambda one: (round(means[one], 6), -one.texts, -one.transitions))
    with_bonus = [replace(best, new_items=bonus) for bonus in config.score.new_item_bonuses]
    means |= judge([weights for weights in with_bonus if weights not in means])
    enough = (1 - config.score.new_item_cost) * max(means[weights] for weights in with_bonus)
    best = max((weights for weights in with_bonus if means[weights] >= enough), key=lambda one: one.new_items)
    return best, describe_choice(best, means)


def _validation_ndcg(grid: list[HybridWeights], work: Path, users: ScoredUsers, ranges: list[Range]) -> dict[HybridWeights, float]:
    """{weights: mean NDCG@10 of the candidates on validation users, seen masked}."""
    totals, count = dict.fromkeys(grid, 0.0), 0
    for part, (start, stop) in enumerate(ranges):
        frame = pl.read_parquet(work / CANDIDATES / candidate_name("validation", part))
        wanted = users.load("validation", start, stop).targets[:, None]
        count += len(frame)
        for weights in totals if len(frame) else ():
            _, item_idx = rerank(frame, "masked", weights, CHOICE_CUTOFF)
            place = np.nonzero(item_idx == wanted)[1]
            totals[weights] += float((1 / np.log2(place + 2)).sum())
    return {weights: total / max(1, count) for weights, total in totals.items()}


def describe_choice(best: HybridWeights, means: dict[HybridWeights, float]) -> dict:
    """{"text_weight", "transition_weight", "new_item_bonus", and for each of them {weight: NDCG@10}}: of the first two beside the
    best of the other, at the smallest bonus; of the bonus at the best of both.
    """
    plain = min((one.new_items for one in means), default=0.0)
    grid = {one: mean for one, mean in means.items() if one.new_items == plain}
    bonuses = {one: mean for one, mean in means.items() if (one.texts, one.transitions) == (best.texts, best.transitions)}
    return {
        "text_weight": best.texts,
        "text_weight_ndcg": {str(one.texts): mean for one, mean in grid.items() if one.transitions == best.transitions},
        "transition_weight": best.transitions,
        "transition_weight_ndcg": {str(one.transitions): mean for one, mean in grid.items() if one.texts == best.texts},
        "new_item_bonus": best.new_items,
        "new_item_bonus_ndcg": {str(one.new_items): mean for one, mean in bonuses.items()},
    }


def summarize_parts(parts: list[dict]) -> dict:
    """Rows, and what the workers said of their time and memory: seconds a step, over all workers; the highest peak."""
    steps: dict[str, float] = {}
    for one in parts:
        for step, seconds in one["seconds"].items():
            steps[step] = steps.get(step, 0.0) + seconds
    users, total = sum(one["users"] for one in parts), sum(steps.values())
    shares = ", ".join(f"{step} {seconds / total:.0%}" for step, seconds in steps.items()) if total else ""
    get_logger("score").info("%d users, %.0f a second and worker: %s", users, users / max(total, 1e-9), shares)
    return {
        "users": users,
        "rows": sum(one["rows"] for one in parts),
        "worker_seconds": {step: round(seconds, 3) for step, seconds in steps.items()},
        "worker_cpu_seconds": round(sum(one["cpu_seconds"] for one in parts), 3),
        "worker_peak_bytes": max((one["peak_bytes"] for one in parts), default=0),
        "worker_own_bytes": max((one.get("own_bytes", 0) for one in parts), default=0),
        "driver_peak_bytes": peak_memory_bytes(),
    }


def candidate_name(split: str, part: int) -> str:
    """File of a candidate part."""
    return f"{split}-{part:06d}.parquet"


def sampler_curve(config: Config, steps: list[int], num_users: int) -> dict[int, dict]:
    """HR@10 on validation users (seen masked) when one fused set of samples is drawn with so many solver steps.

    Returns {steps: {"hr@10": ...}}; the noise is the same for every number of steps.
    """
    model, tokenizer = load_export(config.folder("model"))
    views = UserViews.open(config, model, tokenizer)
    everyone = views.users.with_target("validation")
    # Spread over the catalogue of users: sources often list them by age or by item, so the first ones are no sample.
    spread = np.linspace(0, len(everyone) - 1, min(num_users, len(everyone))).astype(np.int64)
    users = views.users.pick("validation", everyone[spread])
    condition = views.read_users(users, reasoning=False).condition
    opened = Retriever.open(replace(config, score=replace(config.score, rank_by="samples")))
    curve = {}
    for count in steps:
        retriever = replace(opened, score=replace(opened.score, num_sampling_steps=count))
        _, item_idx = retriever.find(views, condition, users, seed=0, wanted=("masked",))["masked"]
        curve[count] = {"hr@10": float((item_idx[:, :10] == users.targets[:, None]).any(axis=1).mean())}
    return curve

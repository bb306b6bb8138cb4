"""The stage `evaluate`: how good the recommendations are, beside the baselines, as metrics.json and report.html.

One held-out item a user, ranked against the FULL catalogue, no sampled negatives. 'test' and 'validation' are the lists without
seen items, '..._unmasked' the lists that may repeat them; the two protocols are never mixed. A user with a held-out item but no
list is a miss. Baselines see the same histories and are measured by the same functions: popularity and the oracle are worked out
here, and every other one that `contrec baseline` finished for this run's catalogue is taken in from its lists.

Cost: the lists in memory (users * k integers) and, with evaluate.sampler_users, a few samplings of that many users.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import polars as pl

from contrec_dist.baselines.popularity import recommend_popular
from contrec_dist.baselines.registry import BASELINES, baseline_folder
from contrec_dist.baselines.stage import find_finished
from contrec_dist.config import Config
from contrec_dist.data.catalog import Histories, Part, load_items, load_users
from contrec_dist.data.sources.generated import oracle_recommendations
from contrec_dist.embeddings.layout import read_text_part
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import MANIFEST_NAME, Manifest, run_stage, write_atomically, write_json
from contrec_dist.progress import get_logger
from contrec_dist.report.lists import Seen, check_masked, list_matrix, load_lists, seen_items
from contrec_dist.report.page import Evidence, render_page, training_lines
from contrec_dist.report.plots import loss_and_probe_png
from contrec_dist.report.tables import print_table
from contrec_dist.retrieval import metrics as m

METRICS_NAME, PAGE_NAME, CURVE_NAME = "metrics.json", "report.html", "sampler_curve.json"
PROBE_PLOT_NAME = "loss_and_probe.png"
FOLDERS = ("catalog", "embeddings", "tokenizer", "tokens", "model", "index", "recommendations")
HEADLINE_CUT = 10
BLOCKS: dict[str, tuple[Part, Seen]] = {
    "test": ("test", "masked"),
    "validation": ("validation", "masked"),
    "test_unmasked": ("test", "kept"),
    "validation_unmasked": ("validation", "kept"),
}


@dataclass(kw_only=True, slots=True)
class Held:
    """The users of one split with their held-out items and what they had seen.

    Shapes   users, targets (B,) int64; seen_flat (M,), seen_offsets (B + 1,) int64
    """

    users: np.ndarray
    targets: np.ndarray
    seen_flat: np.ndarray
    seen_offsets: np.ndarray

    @classmethod
    def load(cls, histories: Histories, part: Part) -> "Held":
        users = histories.users_with(part)
        flat, offsets = seen_items(histories, users, part)
        targets = histories.targets(users, part).astype(np.int64)
        return cls(users=users, targets=targets, seen_flat=flat, seen_offsets=offsets)


def run(config: Config) -> Manifest:
    """Measure, write the report, and print the headline."""
    manifest = run_stage(
        config,
        stage="evaluate",
        folder="report",
        sections=("evaluate",),
        inputs=(
            "catalog", "embeddings", "tokenizer", "model", "index", "recommendations", *map(baseline_folder, find_finished(config))
        ),
        build=_build,
    )
    print_table(manifest.facts, config.folder("report") / PAGE_NAME)
    return manifest


def _build(config: Config, work: Path) -> dict:
    started = time.monotonic()
    catalog = config.folder("catalog")
    items, users, histories = load_items(catalog), load_users(catalog), Histories.load(catalog)
    held = {part: Held.load(histories, part) for part in ("test", "validation")}
    ks = _cut_offs(config)
    length = _list_length(config, ks)
    frames, lists = _load_blocks(config, users, items, held, length)
    num_train = items["num_train"].to_numpy()
    metrics = {
        "dataset": config.dataset,
        "split": config.split.kind,
        "num_users": len(held["test"].users),
        "num_items": len(items),
    }
    text = read_text_part(config.folder("embeddings"))
    for block, (part, _) in BLOCKS.items():
        metrics[block] = m.summarize_lists(lists[block], held[part].targets, len(items), ks, text)
    baselines = {seen: _baseline_lists(config, users, items, held["test"], length, seen) for seen in ("masked", "kept")}
    for key, seen in (("baselines", "masked"), ("baselines_unmasked", "kept")):
        found = baselines[seen].items()
        metrics[key] = {name: m.summarize_lists(rows, held["test"].targets, len(items), ks, text) for name, rows in found}
    metrics |= _slices_and_intervals(config, lists["test"], held["test"], num_train)
    metrics["baseline_slices"] = {name: _slices(config, rows, held["test"], num_train) for name, rows in baselines["masked"].items()}
    metrics["lead_intervals"] = {name: _lead(config, lists["test"], rows, held["test"]) for name, rows in baselines["masked"].items()}
    curve = _measure_sampler(config, work)
    metrics["seconds"] = _stage_seconds(config) | {"evaluate": round(time.monotonic() - started, 3)}
    metrics["baseline_seconds"] = _baseline_seconds(config)
    write_json(work / METRICS_NAME, metrics)
    evidence = Evidence(
        items=items,
        users=users,
        histories=histories,
        recommended=frames["test"],
        test_users=held["test"].users,
        bucket_rates={name: one["popularity"] for name, one in {"contrec": metrics["slices"], **metrics["baseline_slices"]}.items()},
        sampler_curve=curve,
    )
    write_atomically(work / PAGE_NAME, render_page(config, metrics, evidence).encode())
    lines, probe_lines = training_lines(config)
    if probe_lines:
        write_atomically(work / PROBE_PLOT_NAME, loss_and_probe_png(lines, probe_lines))
    return {key: metrics[key] for key in ("dataset", "test", "test_unmasked", "baselines", "baselines_unmasked")}


def _cut_offs(config: Config) -> list[int]:
    """The cut-offs asked for, rising, and 10, which headlines and baselines are compared at."""
    return sorted({*config.evaluate.ks, HEADLINE_CUT})


def _list_length(config: Config, ks: list[int]) -> int:
    """k of the score stage that wrote the lists. Raises ConfigError where a cut-off goes beyond it."""
    length = Manifest.load(config.folder("recommendations")).config["score"]["k"]
    if ks[-1] > length:
        raise ConfigError("evaluate.ks", f"a cut-off of {ks[-1]}", f"at most score.k, which was {length}")
    return length


def _load_blocks(config, users, items, held, length) -> tuple[dict[str, pl.DataFrame], dict[str, np.ndarray]]:
    """Frames and (B, k) matrices of every block; masked ones are checked to be free of seen items."""
    frames, lists, folder = {}, {}, config.folder("recommendations")
    for block, (part, seen) in BLOCKS.items():
        frames[block] = load_lists(folder, part, seen, users, items)
        lists[block] = list_matrix(frames[block], held[part].users, length)
        absent = int((lists[block][:, 0] < 0).sum())
        if absent:
            get_logger("evaluate").warning("%s: %d users have no list and count as misses", block, absent)
        if seen == "masked":
            check_masked(lists[block], held[part].seen_flat, held[part].seen_offsets, folder / f"split={part}")
    return frames, lists


def _baseline_lists(config, users: pl.DataFrame, items: pl.DataFrame, held: Held, k: int, seen: Seen) -> dict[str, np.ndarray]:
    """Test lists of the baselines that are asked for and of those that are finished, (B, k) each."""
    finished = find_finished(config)
    names = list(dict.fromkeys([*config.evaluate.baselines, *finished]))
    if config.source.kind == "generated" and "oracle" not in names:
        names.append("oracle")
    unknown = [name for name in names if name not in {*WORKED_OUT, *BASELINES}]
    if unknown:
        raise ConfigError("evaluate.baselines", unknown, f"some of {sorted({*WORKED_OUT, *BASELINES})}")
    absent = [name for name in names if name not in {*WORKED_OUT, *finished}]
    if absent:
        raise ArtifactError(config.folder(baseline_folder(absent[0])), "no finished baseline", f"`contrec baseline {absent[0]}` run first")
    return {
        name: _written_lists(config, name, users, items, held, k, seen) if name in finished
        else WORKED_OUT[name](config, items, held, k, seen)
        for name in names
    }  # fmt: skip


def _written_lists(config, name: str, users: pl.DataFrame, items: pl.DataFrame, held: Held, k: int, seen: Seen) -> np.ndarray:
    """What `contrec baseline` wrote, under the checks that the model's lists pass. Errors   ArtifactError for shorter lists"""
    folder = config.folder(baseline_folder(name))
    length = Manifest.load(folder).facts["k"]
    if length < k:
        raise ArtifactError(folder, f"lists of {length}", f"lists of {k}, as the model's: `contrec baseline {name}` run again")
    lists = list_matrix(load_lists(folder, "test", seen, users, items), held.users, k)
    if seen == "masked":
        check_masked(lists, held.seen_flat, held.seen_offsets, folder)
    return lists


def _popularity_lists(config: Config, items: pl.DataFrame, held: Held, k: int, seen: Seen) -> np.ndarray:
    num_train = items["num_train"].to_numpy()
    return recommend_popular(num_train, k, held.seen_flat, held.seen_offsets, mask=seen == "masked")


def _oracle_lists(config: Config, items: pl.DataFrame, held: Held, k: int, seen: Seen) -> np.ndarray:
    """The law of the generated catalogue itself; it never repeats an item, so masking changes nothing."""
    if config.source.kind != "generated":
        raise ConfigError("evaluate.baselines", "oracle", f"another one: kind '{config.source.kind}' has no known law")
    item_ids = items["item_id"]
    seen_ids = item_ids.gather(held.seen_flat).to_list()
    spans = zip(held.seen_offsets[:-1], held.seen_offsets[1:])
    best = oracle_recommendations(config, [seen_ids[start:stop] for start, stop in spans], k, among=item_ids.to_list())
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    lists = np.full((len(best), k), -1, dtype=np.int64)
    for row, recommended in enumerate(best):
        lists[row, : len(recommended)] = [row_of[item_id] for item_id in recommended]
    return lists


WORKED_OUT: dict[str, Callable[[Config, pl.DataFrame, Held, int, Seen], np.ndarray]] = {
    "popularity": _popularity_lists,
    "oracle": _oracle_lists,
}


def _slices_and_intervals(config: Config, lists: np.ndarray, held: Held, num_train: np.ndarray) -> dict:
    values = _user_values(lists, held)
    intervals = {name: list(m.bootstrap_interval(row, config.seed)) for name, row in values.items()}
    return {"slices": _slices(config, lists, held, num_train), "intervals": intervals | {"level": 0.95}}


def _user_values(lists: np.ndarray, held: Held) -> dict[str, np.ndarray]:
    """Every user's hit and gain. (B,) each"""
    ranks = m.rank_targets(lists, held.targets)
    return {f"hr@{HEADLINE_CUT}": m.hits_at(ranks, HEADLINE_CUT), f"ndcg@{HEADLINE_CUT}": m.gains_at(ranks, HEADLINE_CUT)}


def _slices(config: Config, lists: np.ndarray, held: Held, num_train: np.ndarray) -> dict:
    """Rates by popularity of the target, and of targets that training never saw."""
    ranks = m.rank_targets(lists, held.targets)
    return {
        "popularity": m.slice_by_popularity(ranks, held.targets, num_train, config.evaluate.num_popularity_buckets),
        "cold_start": m.slice_cold_start(ranks, held.targets, num_train),
    }


def _lead(config: Config, lists: np.ndarray, others: np.ndarray, held: Held) -> dict[str, list[float]]:
    """95% intervals of the model's figure less a baseline's, over the same users."""
    model, baseline = (_user_values(one, held) for one in (lists, others))
    return {name: list(m.bootstrap_interval(model[name] - baseline[name], config.seed)) for name in model}


def user_leads(config: Config) -> dict[str, pl.DataFrame]:
    """The model's figures less those of every finished baseline, user by user: test, seen items masked.

    Returns a baseline's frame: user_id, and hr@10 and ndcg@10 float64, of users in order of user_idx
    """
    catalog = config.folder("catalog")
    items, users = load_items(catalog), load_users(catalog)
    held = Held.load(Histories.load(catalog), "test")
    length = _list_length(config, _cut_offs(config))
    own = list_matrix(load_lists(config.folder("recommendations"), "test", "masked", users, items), held.users, length)
    model, leads = _user_values(own, held), {}
    for name in find_finished(config):
        baseline = _user_values(_written_lists(config, name, users, items, held, length, "masked"), held)
        columns = {key: model[key].astype(np.float64) - baseline[key] for key in model}
        leads[name] = pl.DataFrame({"user_id": users["user_id"].gather(held.users), **columns})
    return leads


def _measure_sampler(config: Config, work: Path) -> dict[int, dict]:
    """HR@10 against sampler steps, also written as sampler_curve.json; nothing when evaluate.sampler_users is 0."""
    if config.evaluate.sampler_users == 0:
        return {}
    from contrec_dist.retrieval.score import sampler_curve  # loads torch and the model, which the rest does not need

    curve = sampler_curve(config, list(config.evaluate.sampler_steps), config.evaluate.sampler_users)
    write_json(work / CURVE_NAME, curve)
    return curve


def _stage_seconds(config: Config) -> dict[str, float]:
    """Seconds of every stage before this one, by stage, from the manifests."""
    seconds = {}
    for folder in FOLDERS:
        if not (config.folder(folder) / MANIFEST_NAME).is_file():
            get_logger("evaluate").warning("no manifest in %s: its seconds are left out", config.folder(folder))
            continue
        manifest = Manifest.load(config.folder(folder))
        seconds[manifest.stage] = manifest.seconds
    return seconds


def _baseline_seconds(config: Config) -> dict[str, dict[str, float]]:
    """Seconds of every finished baseline: of its fit, and of the lists of every split."""
    found = {name: Manifest.load(config.folder(baseline_folder(name))).facts.get("seconds") for name in find_finished(config)}
    return {name: seconds for name, seconds in found.items() if seconds}

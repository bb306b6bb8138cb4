"""A baseline as a stage: fit it, let it recommend to the users that the score stage scores, and write the same lists.

    baselines/NAME/split={validation,test,next}/seen={masked,kept}/part-000000.parquet, columns as retrieval/recommendations.py
    baselines/NAME/manifest.json   facts: what the fit says, HR@10 and NDCG@10 on validation users, and seconds: of the fit (that
                                   of a fit taken over as it was), and of the lists of every split

What was trained is kept where only the lists change (splits, k): the facts hold the identity of the fit, as `fit_identity`.
The stage `evaluate` takes in every finished baseline of the run and judges it as it judges the model.
"""

import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from contrec_dist.baselines.registry import BASELINES, Recommender, baseline_folder, load_baseline
from contrec_dist.baselines.views import CHOICE_CUT, VIEWS, recommend_views
from contrec_dist.config import Config
from contrec_dist.data.catalog import Histories, load_items, load_users
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import MANIFEST_NAME, Manifest, run_stage, stage_identity
from contrec_dist.progress import get_logger, track
from contrec_dist.retrieval import metrics as m
from contrec_dist.retrieval.pairing import Versions
from contrec_dist.retrieval.recommendations import SCHEMA, list_rows
from sharding.partition import part_ranges


def run_baseline(config: Config, name: str) -> Manifest:
    """Fit one baseline and write its lists, and first those that it needs; what is complete is skipped.

    Errors   ConfigError for an unknown name
    """
    module = load_baseline(name)
    settings = module.settings(config)
    for needed in getattr(module, "NEEDS", ()):
        run_baseline(config, needed)
    lists = {"k": config.score.k, "splits": list(config.score.splits), "users_per_part": config.score.users_per_part}
    inputs = ("catalog", *module.INPUTS)
    return run_stage(
        config,
        stage=name,
        folder=baseline_folder(name),
        sections=module.SECTIONS,
        inputs=inputs,
        build=partial(_build, name, stage_identity(config, module.SECTIONS, inputs, settings)[0]),
        extra_identity=lists | settings,
    )


def find_finished(config: Config) -> list[str]:
    """Baselines whose test lists are complete and made from this run's folders, by name; others are named in the log.

    Errors   ArtifactError for such another one where evaluate.baselines asks for it
    """
    finished = []
    for name in sorted(BASELINES):
        folder = config.folder(baseline_folder(name))
        if not (folder / MANIFEST_NAME).is_file():
            continue
        fault = _find_fault(config, Manifest.load(folder))
        if fault and name in config.evaluate.baselines:
            raise ArtifactError(folder, fault, f"`contrec baseline {name}` run again")
        if fault:
            get_logger("evaluate").warning("%s is left out: it holds %s", folder, fault)
        else:
            finished.append(name)
    return finished


def _find_fault(config: Config, manifest: Manifest) -> str:
    """Why a baseline's lists cannot be compared with this run's; empty where they can."""
    for folder, made_from in manifest.inputs.items():
        there = (config.folder(folder) / MANIFEST_NAME).is_file()
        if not there or Manifest.load(config.folder(folder)).content_hash != made_from:
            return f"lists made from another {folder}"
    return "" if "test" in manifest.facts["splits"] else f"lists of {manifest.facts['splits']} alone"


def _build(name: str, fit_identity: str, config: Config, work: Path) -> dict:
    started = time.monotonic()
    taken = _take_over(name, fit_identity, config, work)
    recommender, facts = taken or load_baseline(name).fit(config, work)
    seconds = {} if taken else {"fit": round(time.monotonic() - started, 3)}
    if "fit" in facts.get("seconds", {}):  # of a fit taken over; one of an earlier version does not say
        seconds["fit"] = facts["seconds"]["fit"]
    catalog = config.folder("catalog")
    histories, item_ids = Histories.load(catalog), load_items(catalog)["item_id"]
    user_ids = load_users(catalog)["user_id"]
    for split in config.score.splits:
        started = time.monotonic()
        positions = histories.lengths if split == "next" else histories.positions(split)
        ranges = part_ranges(histories.num_users, config.score.users_per_part)
        hits = [
            _write_part(work, name, recommender, histories, positions, split, part, span, user_ids, item_ids, config.score.k)
            for part, span in track(enumerate(ranges), stage=name, unit=f"{split} parts", total=len(ranges))
        ]
        seconds[split] = round(time.monotonic() - started, 3)
        if split == "validation":
            facts["validation"] = _summarize(hits, config.score.k)
    return facts | {"fit_identity": fit_identity, "k": config.score.k, "splits": list(config.score.splits), "seconds": seconds}


def _take_over(name: str, fit_identity: str, config: Config, work: Path) -> tuple[Recommender, dict] | None:
    """What the finished folder holds of the same fit, copied into `work`: the recommender and its facts; None without such."""
    folder, module = config.folder(baseline_folder(name)), load_baseline(name)
    if not hasattr(module, "load_recommender") or not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = Manifest.load(folder)
        if manifest.facts.get("fit_identity") != fit_identity:
            return None
        manifest.check_files(folder, deep=True)
    except ArtifactError as error:
        get_logger(name).warning("fitted again: %s", error)
        return None
    for file in manifest.files:
        if not file.startswith("split="):
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, work / file)
    get_logger(name).info("only the lists changed: what was fitted is taken over")
    return module.load_recommender(config, work), {key: value for key, value in manifest.facts.items() if key != "validation"}


def _write_part(work, name, recommender, histories, positions, split, part, span, user_ids, item_ids, k) -> dict[str, np.ndarray]:
    """Write both views of a range of users; the ranks of their held-out items by view (none for split 'next')."""
    users = span[0] + np.flatnonzero(positions[span[0] : span[1]] >= 0)
    before = [histories.history(int(user), int(positions[user])) for user in users]
    frame = pl.DataFrame({"user_id": user_ids.gather(users), "reason": [""] * len(users)}, schema_overrides={"reason": pl.String})
    ranks = {}
    for view, (scores, items) in recommend_views(recommender, before, users, k).items():
        path = work / f"split={split}" / f"seen={view}" / f"part-{part:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = list_rows(frame, scores, items, item_ids, Versions(model=name, index="", index_number=0)) if len(users) else pl.DataFrame(schema=SCHEMA)
        rows.write_parquet(path)
        if split != "next":
            ranks[view] = m.rank_targets(items, histories.targets(users, split))
    return ranks


def _summarize(parts: list[dict[str, np.ndarray]], k: int) -> dict:
    """HR and NDCG at 10 (at k, where lists are shorter) of the validation users, by view."""
    cut, summary = min(CHOICE_CUT, k), {"num_users": sum(len(part["masked"]) for part in parts)}
    for view in VIEWS if summary["num_users"] else ():
        ranks = np.concatenate([part[view] for part in parts])
        summary[view] = {f"hr@{cut}": float(m.hits_at(ranks, cut).mean()), f"ndcg@{cut}": float(m.gains_at(ranks, cut).mean())}
    return summary

"""A run under several seeds: mean and spread of the test figures of the model and of every baseline, and of the model's lead.

The spread is the sample standard deviation over seeds: what another training of the same recipe would change. The intervals are
over users: what other users would. Of the lead over a baseline they are those of every user's mean over seeds.

    <run_dir>/seeds/seeds.json, seeds.md
"""

import json
from pathlib import Path
from typing import Mapping, Sequence

import numpy as np
import polars as pl

from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import write_atomically, write_json
from contrec_dist.report.evaluate import METRICS_NAME, user_leads
from contrec_dist.report.tables import metric_label
from contrec_dist.retrieval.metrics import bootstrap_interval

SEEDS_FOLDER, JSON_NAME, MARKDOWN_NAME = "seeds", "seeds.json", "seeds.md"
MODEL = "contrec"
VIEWS = {"masked": ("test", "baselines"), "kept": ("test_unmasked", "baselines_unmasked")}
SHOWN = ("hr@10", "ndcg@10")


def read_metrics(runs: Mapping[int, Config]) -> dict[int, dict]:
    """metrics.json of every seed. Errors   ArtifactError where a run has none"""
    metrics = {}
    for seed, config in runs.items():
        path = config.folder("report") / METRICS_NAME
        if not path.is_file():
            raise ArtifactError(path, "nothing", "a finished evaluation")
        metrics[seed] = json.loads(path.read_text())
    return metrics


def pair_users(runs: Mapping[int, Config]) -> dict[str, dict[str, dict]]:
    """How far the model is above the baselines that every seed has, users paired: test, seen items masked.

    Returns {baseline: {metric: {"mean", "low", "high"}}}: every user's lead is its mean over seeds, and the 95% bootstrap interval is
    over users. Errors   ArtifactError where the seeds' runs are not of the same users
    """
    leads = {seed: user_leads(config) for seed, config in runs.items()}
    first = next(iter(leads.values()))
    return {name: _pair(runs, [one[name] for one in leads.values()]) for name in first if all(name in one for one in leads.values())}


def _pair(runs: Mapping[int, Config], frames: list[pl.DataFrame]) -> dict[str, dict]:
    for config, frame in zip(runs.values(), frames):
        if not frame["user_id"].equals(frames[0]["user_id"]):
            raise ArtifactError(config.folder("catalog"), "other test users", "those of the other seeds' runs")
    paired = {}
    for key in SHOWN:
        values = np.mean([frame[key].to_numpy() for frame in frames], axis=0)
        low, high = bootstrap_interval(values, seed=0)
        paired[key] = {"mean": float(values.mean()), "low": low, "high": high}
    return paired


def summarize_seeds(metrics: Mapping[int, dict]) -> dict:
    """Figures over seeds.

    Returns {"seeds", "views": {view: {name: {metric: {"mean", "std", "values"}}}}, "lead": {view: {baseline: {metric: ...}}}}; a lead
    is the model's figure over the baseline's, less 1, seed by seed. Recommenders that not every seed has are left out.
    """
    seeds = sorted(metrics)
    views, lead = {}, {}
    for view, (own, others) in VIEWS.items():
        by_seed = [{MODEL: metrics[seed][own], **metrics[seed][others]} for seed in seeds]
        names = [name for name in by_seed[0] if all(name in one for one in by_seed)]
        views[view] = {
            name: {key: _spread([one[name][key] for one in by_seed]) for key in by_seed[0][name] if all(key in one[name] for one in by_seed)}
            for name in names
        }
        lead[view] = {name: _leads(views[view][MODEL], views[view][name]) for name in names if name != MODEL}
    return {"seeds": seeds, "views": views, "lead": lead}


def write_summary(summary: dict, folder: Path, title: str) -> None:
    """seeds.json and seeds.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JSON_NAME, {"title": title, **summary})
    write_atomically(folder / MARKDOWN_NAME, render_markdown(summary, title).encode())


def render_markdown(summary: dict, title: str) -> str:
    """A line a recommender: mean ± standard deviation, and how far the model is above it."""
    heads = [f"{metric_label(key)} {view}" for view in VIEWS for key in SHOWN]
    heads = ["", *heads, *(f"contrec above it, {metric_label(key)} masked" for key in SHOWN)]
    lines = [f"# {title}", "", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name in summary["views"]["masked"]:
        cells = [_show(summary["views"][view][name][key], ".4f") for view in VIEWS for key in SHOWN]
        lead = summary["lead"]["masked"].get(name)
        cells += [_show(lead[key], "+.1%") if lead and key in lead else "–" for key in SHOWN]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    told = f"Test users, full catalogue, seeds {', '.join(map(str, summary['seeds']))}: mean ± sample standard deviation over seeds."
    lines += ["", told]
    if summary.get("paired"):
        lines += ["", "contrec less the baseline, seen items masked, mean over seeds of every user, with 95% bootstrap intervals over users:", ""]
        lines += [f"- {name}: " + ", ".join(map(_show_pair, SHOWN, [figures[key] for key in SHOWN])) for name, figures in summary["paired"].items()]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> dict:
    """Standard deviation null for one seed."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "values": [float(value) for value in values]}


def _leads(own: dict, other: dict) -> dict:
    pairs = {key: (own[key]["values"], other[key]["values"]) for key in SHOWN if key in own and key in other}
    return {key: _spread([a / b - 1 for a, b in zip(*both)]) for key, both in pairs.items() if all(both[1])}


def _show_pair(key: str, figure: dict) -> str:
    return f"{metric_label(key)} {figure['mean']:+.4f} [{figure['low']:+.4f}, {figure['high']:+.4f}]"


def _show(figure: dict, form: str) -> str:
    mean = f"{figure['mean']:{form}}"
    return mean if figure["std"] is None else f"{mean} ± {figure['std']:{form.lstrip('+')}}"

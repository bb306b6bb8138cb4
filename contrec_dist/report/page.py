"""report.html: one self-contained page from the metrics and what lies in the run's folder."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np
import polars as pl
from markupsafe import Markup

from contrec_dist.config import Config
from contrec_dist.data.catalog import Histories
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest
from contrec_dist.report import plots
from contrec_dist.report.tables import format_metric, metric_label, metric_rows

TEMPLATE_NAME = "report.html.j2"
NUM_EXAMPLES = 6  # users shown with their lists
HISTORY_SHOWN = 6  # newest items of their histories
LIST_SHOWN = 10  # recommendations
STAGE_ORDER = ("prepare", "embed", "tokenize", "precompute", "train", "index", "score", "evaluate")


@dataclass(kw_only=True, slots=True)
class Evidence:
    """What the page shows beyond metrics.json.

    `recommended` holds the masked test lists [user_idx, rank, item_idx, reason]; `bucket_rates` the popularity slices of
    the model and the baselines; `sampler_curve` is empty when it was not measured.
    """

    items: pl.DataFrame
    users: pl.DataFrame
    histories: Histories
    recommended: pl.DataFrame
    test_users: np.ndarray
    bucket_rates: dict[str, list[dict]]
    sampler_curve: dict[int, dict]


def render_page(config: Config, metrics: dict, evidence: Evidence) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"metric": format_metric, "label": metric_label}
    probes = _read_json(config.folder("tokenizer") / "probes.json")
    template = resources.files("contrec_dist.report").joinpath(TEMPLATE_NAME).read_text()
    return environment.from_string(template).render(
        run=config.name,
        metrics=metrics,
        tables=_tables(metrics),
        tiles=_tiles(metrics),
        plots={name: Markup(svg) for name, svg in _draw_plots(config, metrics, evidence, probes).items()},
        probes=_probe_rows(probes),
        examples=_examples(evidence),
        sampler_users=config.evaluate.sampler_users,
    )


def _tables(metrics: dict) -> list[dict]:
    tables = [
        ("Test, seen items masked", metric_rows(metrics, "test", "baselines")),
        ("Test, seen items kept", metric_rows(metrics, "test_unmasked", "baselines_unmasked")),
    ]
    validation = [
        {"name": name, "values": {key: metrics[block][key] for key in tables[0][1][0]["values"]}, "best": set()}
        for name, block in (("contrec, masked", "validation"), ("contrec, kept", "validation_unmasked"))
    ]
    return [{"title": title, "rows": rows} for title, rows in (*tables, ("Validation", validation))]


def _tiles(metrics: dict) -> list[dict]:
    """The headline figures with their intervals, and what popularity and the bound reach."""
    tiles = []
    for key in ("hr@10", "ndcg@10"):
        low, high = metrics["intervals"][key]
        beside = [f"{name} {format_metric(found[key])}" for name, found in sorted(metrics["baselines"].items())]
        note = f"95% interval {format_metric(low)} to {format_metric(high)}"
        tiles.append({"label": metric_label(key), "value": format_metric(metrics["test"][key]), "notes": [note, *beside]})
    return tiles


def _draw_plots(config: Config, metrics: dict, evidence: Evidence, probes: dict) -> dict[str, str]:
    """name -> SVG; a plot whose figures a run does not have is left out of the page."""
    drawn = {"buckets": plots.plot_buckets(evidence.bucket_rates)}
    lines, probe_lines = training_lines(config)
    if lines:
        drawn["losses"] = plots.plot_losses(lines)
    if probe_lines:
        drawn["probe"] = plots.plot_loss_and_probe(lines, probe_lines)
    if probes["latent_spectrum"]:
        drawn["spectrum"] = plots.plot_spectrum(probes["latent_spectrum"])
    if evidence.sampler_curve:
        drawn["sampler"] = plots.plot_sampler_curve(evidence.sampler_curve)
    seconds = metrics["seconds"]
    names = sorted(seconds, key=lambda name: STAGE_ORDER.index(name) if name in STAGE_ORDER else len(STAGE_ORDER))
    drawn["seconds"] = plots.plot_seconds({name: seconds[name] for name in names})
    return drawn


def training_lines(config: Config) -> tuple[list[dict], list[dict]]:
    """Lines of the losses and of the validation probe; the latter lie with the checkpoints, if anywhere."""
    identity = Manifest.load(config.folder("model")).identity
    probe = config.folder("checkpoints") / identity[:12] / "probe.jsonl"
    return _read_lines(config.folder("model") / "metrics.jsonl"), _read_lines(probe)


def _probe_rows(probes: dict) -> list[dict]:
    """What every tokenizer kept, one row a method: {"method", "bits", "error", "overlap", "rank", "collisions"} as text."""
    shown = {
        "bits": ("bits", ",.0f"),
        "error": ("relative_mse", ".3f"),
        "overlap": ("neighbour_overlap", ".3f"),
        "rank": ("effective_rank", ".1f"),
        "collisions": ("collision_rate", ".4f"),
    }
    rows = []
    for record in probes["methods"]:
        figures = {name: (record[key], form) for name, (key, form) in shown.items()}
        texts = {name: "–" if value is None else format(value, form) for name, (value, form) in figures.items()}
        rows.append({"method": record["method"], **texts})
    return rows


def _examples(evidence: Evidence) -> list[dict]:
    """Users spread evenly over those with a test item and a list: newest history, held-out item, first recommendations."""
    with_list = np.intersect1d(evidence.test_users, evidence.recommended["user_idx"].to_numpy())
    chosen = with_list[np.unique(np.linspace(0, len(with_list) - 1, NUM_EXAMPLES).astype(np.int64))] if len(with_list) else []
    names = _item_names(evidence.items)
    return [_example(evidence, int(user), names) for user in chosen]


def _example(evidence: Evidence, user: int, names: list[str]) -> dict:
    position = int(evidence.histories.test_pos[user])
    seen, target = evidence.histories.history(user, position), int(evidence.histories.history(user)[position])
    rows = evidence.recommended.filter((pl.col("user_idx") == user) & (pl.col("rank") <= LIST_SHOWN)).sort("rank")
    reasons = rows["reason"].fill_null("").to_list()
    common = reasons[0] if len(set(reasons)) == 1 else ""  # one reason for the whole list is said once
    return {
        "user_id": evidence.users["user_id"][user],
        "num_seen": len(seen),
        "history": [names[item] for item in seen[-HISTORY_SHOWN:]],
        "target": names[target],
        "reason": common,
        "listed": [
            {"title": names[item], "reason": "" if common else reason, "hit": item == target}
            for item, reason in zip(rows["item_idx"], reasons)
        ],
    }


def _item_names(items: pl.DataFrame) -> list[str]:
    """Titles, and ids where an item has none."""
    return [title or item_id for title, item_id in zip(items["title"], items["item_id"])]


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ArtifactError(path, "no such file", "what its stage writes")
    return json.loads(path.read_text())


def _read_lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line]
    except ValueError as error:
        raise ArtifactError(path, f"a broken line ({error})", "one JSON value a line") from None

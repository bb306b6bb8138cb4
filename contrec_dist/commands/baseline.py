"""`contrec baseline NAME --config FILE [key=value ...]`: fit a baseline and write its recommendations beside the model's.

NAME_transitions is a finished NAME, fitted first where it is not, with the transition score that the model's hybrid has.
"""

import argparse

from contrec_dist.baselines.registry import BASELINES
from contrec_dist.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    summaries = "; ".join(f"{name}: {summary}" for name, (_, summary) in sorted(BASELINES.items()))
    parser.add_argument("name", metavar="NAME", help=summaries)


def run(config: Config, parsed: argparse.Namespace) -> int:
    """Exit code 0. Prints the folder and what the baseline reaches on validation users."""
    from rich.console import Console

    from contrec_dist.baselines.stage import run_baseline
    from contrec_dist.report.tables import format_metric

    manifest = run_baseline(config, parsed.name)
    console = Console()
    for view in ("masked", "kept"):
        figures = manifest.facts.get("validation", {}).get(view, {})
        shown = ", ".join(f"{name.upper()} {format_metric(value)}" for name, value in sorted(figures.items()))
        if shown:
            console.print(f"validation, seen {view}: {shown}", soft_wrap=True, highlight=False)
    if "transition_weight" in manifest.facts:
        tried = ", ".join(f"{one} {format_metric(figure)}" for one, figure in manifest.facts["transition_weight_ndcg"].items())
        shown = f"weight of the transitions: {manifest.facts['transition_weight']:g} (validation NDCG@10 by weight: {tried})"
        console.print(shown, soft_wrap=True, highlight=False)
    seconds = manifest.facts.get("seconds", {})  # a folder of an earlier version has none
    if seconds:
        shown = ", ".join(f"{what} {one:,.1f}" for what, one in seconds.items())
        console.print(f"seconds: {shown}", soft_wrap=True, highlight=False)
    console.print(f"{parsed.name}: {config.folder(manifest.folder)}", soft_wrap=True, highlight=False)
    return 0

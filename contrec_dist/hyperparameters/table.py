"""What a search found: trials.md and best.yaml in its folder, and the table on the terminal, best trials first."""

from pathlib import Path
from typing import Sequence

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contrec_dist.hyperparameters.trials import GOAL, best_record
from contrec_dist.manifest import write_atomically
from contrec_dist.report.tables import format_metric, metric_label

MARKDOWN_NAME, BEST_NAME = "trials.md", "best.yaml"
FIGURES = (GOAL, GOAL.replace("ndcg", "hr"))
SHOWN_TRIALS = 10
"trials on the terminal, the best; trials.md has all"


def write_findings(records: Sequence[dict], folder: Path, title: str) -> None:
    """trials.md; best.yaml where a trial came to its end, a file for --config."""
    heads, lines = _heads(records), [_cells(record) for record in _ranked(records)]
    table = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *lines)]
    told = "Validation users, full catalogue, seen items masked. The first trial, 0, has the config's own values."
    errors = [f"- trial {record['number']} failed: {record['error']}" for record in records if "error" in record]
    write_atomically(folder / MARKDOWN_NAME, ("\n".join([f"# {title}", "", *table, "", told, "", *errors]).rstrip() + "\n").encode())
    best = best_record(records)
    if best:
        head = f"# {title}: trial {best['number']} of {len(records)}, validation {metric_label(GOAL)} {format_metric(best[GOAL])}\n"
        write_atomically(folder / BEST_NAME, (head + _as_yaml(best["values"])).encode())


def print_findings(records: Sequence[dict], folder: Path, title: str, console: Console | None = None) -> None:
    """The best trials, each by what it changes of the config, and where the rest and the best settings lie."""
    table = Table(title=title, title_justify="left")
    for head in ("trial", *(metric_label(name) for name in FIGURES), "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("changed")
    for record in _ranked(records)[:SHOWN_TRIALS]:
        cells = [*_figures(record), _changes(record, records[0])]
        table.add_row(*cells, style="bold" if record is best_record(records) else None)
    console = console or Console()
    console.print(table)
    if len(records) > SHOWN_TRIALS:
        console.print(f"and {len(records) - SHOWN_TRIALS} more", markup=False, highlight=False)
    if best_record(records):
        console.print(f"best settings: {folder / BEST_NAME}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"table: {folder / MARKDOWN_NAME}", soft_wrap=True, markup=False, highlight=False)


def _ranked(records: Sequence[dict]) -> list[dict]:
    """Best first, failures last."""
    return sorted(records, key=lambda record: (-record.get(GOAL, -1.0), record["number"]))


def _heads(records: Sequence[dict]) -> list[str]:
    return ["trial", *(metric_label(name) for name in FIGURES), "seconds", *(records[0]["values"] if records else ())]


def _cells(record: dict) -> list[str]:
    return [*_figures(record), *map(str, record["values"].values())]


def _figures(record: dict) -> list[str]:
    figures = ["failed" if "error" in record else format_metric(record.get(name)) for name in FIGURES]
    return [str(record["number"]), *figures, f"{record['seconds']:,.0f}"]


def _changes(record: dict, first: dict) -> str:
    changed = [f"{key}={value}" for key, value in record["values"].items() if value != first["values"][key]]
    return escape(", ".join(changed)) or "nothing: the config as it is"


def _as_yaml(values: dict[str, object]) -> str:
    nested = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(nested, key, value)
    return OmegaConf.to_yaml(nested)

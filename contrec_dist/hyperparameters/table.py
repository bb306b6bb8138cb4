"""What a search found: trials.md and best.yaml in its folder, and the table on the terminal, best trials first."""

from pathlib import Path
from typing import Sequence

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from contrec_dist.hyperparameters.trials import GOAL, best_record
from contrec_dist.manifest import write_atomically
from contrec_dist.report.tables import format_metric, metric_label

MARKDOWN_NAME, BEST_NAME = "trials.md", "best.yaml"
FIGURES = (GOAL, GOAL.replace("ndcg", "hr"))


def write_findings(records: Sequence[dict], folder: Path, title: str) -> None:
    """trials.md; best.yaml where a trial came to its end, a file for --config."""
    heads, lines = _heads(records), [_cells(record, records) for record in _ranked(records)]
    table = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *lines)]
    told = "Validation users, full catalogue, seen items masked. The first trial, 0, has the config's own values."
    errors = [f"- trial {record['number']} failed: {record['error']}" for record in records if "error" in record]
    write_atomically(folder / MARKDOWN_NAME, ("\n".join([f"# {title}", "", *table, "", told, "", *errors]).rstrip() + "\n").encode())
    best = best_record(records)
    if best:
        head = f"# {title}: trial {best['number']} of {len(records)}, validation {metric_label(GOAL)} {format_metric(best[GOAL])}\n"
        write_atomically(folder / BEST_NAME, (head + _as_yaml(best["values"])).encode())


def print_findings(records: Sequence[dict], folder: Path, title: str, console: Console | None = None) -> None:
    """The trials, and where the best settings lie."""
    table = Table(title=title, title_justify="left")
    for head in _heads(records):
        table.add_column(head, justify="right")
    for record in _ranked(records):
        table.add_row(*_cells(record, records), style="bold" if record is best_record(records) else None)
    console = console or Console()
    console.print(table)
    if best_record(records):
        console.print(f"best settings: {folder / BEST_NAME}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"table: {folder / MARKDOWN_NAME}", soft_wrap=True, markup=False, highlight=False)


def _ranked(records: Sequence[dict]) -> list[dict]:
    """Best first, failures last."""
    return sorted(records, key=lambda record: (-record.get(GOAL, -1.0), record["number"]))


def _heads(records: Sequence[dict]) -> list[str]:
    keys = list(records[0]["values"]) if records else []
    return ["trial", *(metric_label(name) for name in FIGURES), *keys, "seconds"]


def _cells(record: dict, records: Sequence[dict]) -> list[str]:
    figures = ["failed" if "error" in record else format_metric(record.get(name)) for name in FIGURES]
    return [str(record["number"]), *figures, *map(str, record["values"].values()), f"{record['seconds']:,.0f}"]


def _as_yaml(values: dict[str, object]) -> str:
    nested = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(nested, key, value)
    return OmegaConf.to_yaml(nested)

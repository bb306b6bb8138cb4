"""The table of an ablation: JSON for programs, Markdown for people, rich for the terminal."""

from pathlib import Path
from typing import Sequence

from rich.console import Console
from rich.table import Table

from contrec_dist.ablation.figures import DONE, FAILED, LEVEL, TIMED
from contrec_dist.ablation.rows import BASE_ROW
from contrec_dist.manifest import write_atomically, write_json
from contrec_dist.report.tables import format_metric, metric_label

JSON_NAME, MARKDOWN_NAME = "ablation.json", "ablation.md"
PLAIN = {"soft_wrap": True, "markup": False, "highlight": False}
FIGURES = ("hr@10", "ndcg@10", "diversity@10")
NO_FIGURE = "–"
LEGEND = (
    f"Seen items masked, full catalogue. In brackets {LEVEL:.0%} bootstrap intervals over users; differences to the base are "
    "paired. Diversity: mean of 1 - cosine of the texts of a list's first ten, pair by pair. Seconds in parentheses: built by another "
    "row or the base's run. Of a stage that was resumed the last part counts."
)


def write_tables(records: Sequence[dict], folder: Path, *, title: str) -> None:
    """ablation.json and ablation.md."""
    write_json(folder / JSON_NAME, {"title": title, "seen": "masked", "level": LEVEL, "rows": list(records)})
    write_atomically(folder / MARKDOWN_NAME, render_markdown(records, title).encode())


def render_markdown(records: Sequence[dict], title: str) -> str:
    """The table with a line a row, and under it what each row changes."""
    heads = ["row", *_heads(records)]
    lines = [f"# {title}", "", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join(_cells(record, records)) + " |" for record in records]
    return "\n".join([*lines, "", LEGEND, "", *map(_describe_row, records)]) + "\n"


def print_records(records: Sequence[dict], folder: Path, *, title: str, console: Console | None = None) -> None:
    """The same table on the terminal, and where the files lie."""
    table = Table(title=title, title_justify="left")
    for head in ["row", *_heads(records)]:
        table.add_column(head, justify="left" if head == "row" else "right")
    for record in records:
        table.add_row(*_cells(record, records), style="bold" if record["row"] == BASE_ROW else None)
    console = console or Console()
    console.print(table)
    for record in records:
        if record["status"] == FAILED:
            console.print(f"{record['row']} failed: {record['error']}", style="red", **PLAIN)
    console.print(f"table: {folder / MARKDOWN_NAME}", **PLAIN)


def _parts(records: Sequence[dict]) -> list[str]:
    """Splits that the records have figures of."""
    return [part for part in ("validation", "test") if part == "validation" or any(part in record for record in records)]


def _figures(records: Sequence[dict]) -> list[str]:
    """Figures that at least one record has."""
    return [name for name in FIGURES if any(name in record.get("validation", {}) for record in records)]


def _heads(records: Sequence[dict]) -> list[str]:
    figures = [head for part in _parts(records) for name in _figures(records) for head in (f"{metric_label(name)} {part}", "to base")]
    return ["ranked by", *figures, *(f"{stage} s" for stage in TIMED)]


def _cells(record: dict, records: Sequence[dict]) -> list[str]:
    """Texts of a line; a row without figures says its status where the first would stand."""
    width = len(_heads(records)) - 1
    if record["status"] != DONE:
        return [record["row"], record["rank_by"], record["status"], *[NO_FIGURE] * (width - 1)]
    cells = [record["row"], record["rank_by"]]
    for part in _parts(records):
        for name in _figures(records):
            if name not in record[part]:
                cells += [NO_FIGURE, NO_FIGURE]
                continue
            figure = record[part][name]
            cells += [f"{format_metric(figure['value'])} {_interval(figure)}", _difference(record, figure["difference"])]
    for stage, folder in TIMED.items():
        seconds = f"{record['seconds'][stage]:,.0f}"
        cells.append(f"({seconds})" if folder in record["taken_over"] else seconds)
    return cells


def _difference(record: dict, difference: dict | None) -> str:
    if difference is None or record["row"] == BASE_ROW:
        return NO_FIGURE
    return f"{difference['value']:+.4f} {_interval(difference, '+.4f')}"


def _interval(figure: dict, form: str = ".4f") -> str:
    return f"[{figure['low']:{form}}, {figure['high']:{form}}]"


def _describe_row(record: dict) -> str:
    """A line of Markdown: what a row changes, and its error."""
    change = ", ".join(f"`{key}={value}`" for key, value in record["change"].items())
    error = f" Failed: {record['error']}" if record["status"] == FAILED else ""
    return f"- **{record['row']}**: {record['about']}" + (f" ({change})" if change else "") + error

"""The tables of the report, as rows for the page and as a rich table for the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

HEADLINES = ("hr@10", "ndcg@10")


def format_metric(value: float | None) -> str:
    """Four digits after the point; a dash where there is no figure."""
    return "–" if value is None else f"{value:.4f}"


def metric_label(key: str) -> str:
    """How a metric is headed: 'hr@10' -> 'HR@10'."""
    name, at, cut = key.partition("@")
    return (name.upper() if name in ("hr", "ndcg", "mrr") else name.capitalize()) + at + cut


def metric_rows(metrics: dict, block: str, baselines: str) -> list[dict]:
    """One row a recommender: {"name", "values": {metric: figure}, "best": metrics in which it leads the learned ones}.

    The oracle is a bound, not a competitor: it is listed last and never leads.
    """
    named = {"contrec": metrics[block]} | {name: found for name, found in sorted(metrics[baselines].items())}
    names = sorted(named, key=lambda name: (name == "oracle", name != "contrec", name))
    rivals = [named[name] for name in names if name != "oracle"]
    rows = []
    for name in names:
        values = {key: named[name][key] for key in sort_metrics(named[name])}
        best = {key for key in values if name != "oracle" and is_better(key, values[key], [rival[key] for rival in rivals])}
        rows.append({"name": name, "values": values, "best": best})
    return rows


def is_better(key: str, value: float, others: list[float]) -> bool:
    """Whether a figure is the best of its column; of Gini less is better."""
    return value == (min(others) if key.startswith("gini") else max(others))


def sort_metrics(values: dict) -> list[str]:
    """Metric names in reading order: hr by cut-off, ndcg by cut-off, mrr, coverage, gini, diversity."""
    names = ("hr", "ndcg", "mrr", "coverage", "gini", "diversity")
    return sorted(values, key=lambda key: (names.index(key.partition("@")[0]), int(key.partition("@")[2] or 0)))


def print_table(metrics: dict, report_path: Path, console: Console | None = None) -> None:
    """Print HR@10 and NDCG@10 of contrec and the baselines, seen items masked and kept, and where the report lies."""
    table = Table(title=f"{metrics['dataset']}: test users, full catalogue", title_justify="left")
    table.add_column("")
    for protocol in ("seen masked", "seen kept"):
        for key in HEADLINES:
            table.add_column(f"{metric_label(key)}\n{protocol}", justify="right")
    masked = metric_rows(metrics, "test", "baselines")
    kept = {row["name"]: row for row in metric_rows(metrics, "test_unmasked", "baselines_unmasked")}
    for row in masked:
        figures = [values[key] for values in (row["values"], kept[row["name"]]["values"]) for key in HEADLINES]
        table.add_row(row["name"], *map(format_metric, figures))
    console = console or Console()
    console.print(table)
    console.print(f"report: {report_path}", soft_wrap=True, markup=False, highlight=False)

"""Logs that name the stage and the rank, and progress that reads well on a terminal and in a job log.

On a terminal a bar; elsewhere one line every 30 s with done/total, rate, ETA and what the caller has to say.
"""

import logging
import os
import sys
import time
from typing import Callable, Iterable, Iterator, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 30.0
Item = TypeVar("Item")


def get_logger(stage: str) -> logging.Logger:
    """Logger of a stage; lines read `HH:MM:SS stage [rank r] message` on stderr."""
    root = logging.getLogger("contrec")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(name)s{_rank_tag()} %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False
    return root.getChild(stage)


def _rank_tag() -> str:
    return f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""


def track(
    items: Iterable[Item], *, stage: str, unit: str, total: int, done: int = 0, describe: Callable[[], str] = str
) -> Iterator[Item]:
    """Yield `items`, showing progress in `unit`s; `done` of `total` were complete before.

    `describe()` gives figures of the moment (empty: none) for the bar and the lines.
    """
    if sys.stderr.isatty():
        yield from _track_bar(items, stage, unit, total, done, describe)
    else:
        yield from _track_lines(items, stage, unit, total, done, describe)


def _track_bar(items, stage, unit, total, done, describe):
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(f"{stage} [{unit}]", total=total, completed=done, figures="")
        for item in items:
            yield item
            progress.update(task, advance=1, figures=describe())


def _track_lines(items, stage, unit, total, done, describe):
    log, start, last, before = get_logger(stage), time.monotonic(), time.monotonic(), done
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS:
            rate = (done - before) / (now - start)
            figures = describe()
            log.info(
                "%d/%d %s, %.2f/s, ETA %.0f s%s", done, total, unit, rate, (total - done) / rate, figures and f", {figures}"
            )
            last = now

"""Figures of a run as JSON lines, one optimizer step a line, in the folder of its checkpoints.

    metrics.jsonl      losses; copied into model/, so a function of config and inputs alone
    throughput.jsonl   how fast it went: differs from run to run
    probe.jsonl        validation probes: there when the config's `monitor` section asks for them

A resumed run first drops the lines of steps that its checkpoint does not hold: they will be written again.
"""

import json
from pathlib import Path

from contrec_dist.manifest import write_atomically

METRICS_NAME, THROUGHPUT_NAME, PROBE_NAME = "metrics.jsonl", "throughput.jsonl", "probe.jsonl"


def append_line(path: Path, line: dict) -> None:
    """Add one line, which has a "step"."""
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def trim_lines(path: Path, last_step: int) -> None:
    """Keep the lines up to and with `last_step`."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if _line_step(line) <= last_step]
        write_atomically(path, "".join(line + "\n" for line in lines).encode())


def last_step(path: Path) -> int:
    """Step of the last line, -1 where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else -1


def _line_step(line: str) -> float:
    """Step of a line; one that a kill cut short counts as never written."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")

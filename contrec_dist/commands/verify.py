"""`contrec verify --config FILE [--folder NAME] [--quick]`: every file of a run against what was written down of it."""

import argparse

from contrec_dist.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which folders, and how thoroughly."""
    parser.add_argument(
        "--folder", action="append", default=[], metavar="NAME",
        help="only this folder of the run, as tokens, baselines/tiger, checkpoints or index_live; may be repeated",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="presence and size alone; nothing is hashed or fetched")


def run(config: Config, parsed: argparse.Namespace) -> int:
    """A line a good folder, a line a broken file. Exit code 0 when all is good, else 1."""
    from contrec_dist.verify import verify_run

    num_faults = 0
    for finding in verify_run(config, parsed.folder, quick=parsed.quick):
        for fault in finding.faults:
            print(f"{finding.folder}: BROKEN: {fault}", flush=True)
        if finding.num_files and not finding.faults:
            print(f"{finding.folder}: ok: {finding.num_files} files, {finding.num_bytes:,} bytes", flush=True)
        for note in finding.notes:
            print(f"{finding.folder}: note: {note}", flush=True)
        num_faults += len(finding.faults)
    print(f"{num_faults} faults" if num_faults else "all is good")
    return 1 if num_faults else 0

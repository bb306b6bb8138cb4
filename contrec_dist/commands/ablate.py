"""`contrec ablate --config FILE [--rows base,no_mask] [key=value ...]`: one change at a time, each judged against the base.

Every row of --configs is a run of its own in run_dir/ablation, made by the pipeline's own stages: a finished stage is
skipped, a killed training resumes, and what does not differ from the base's run, or from another row's, is taken over.
Rows are compared on validation users; --test adds the test users, so that nobody need look at them before the choice is made.
"""

import argparse
from pathlib import Path

from contrec_dist.config import Config

DEFAULT_CONFIGS = Path("configs/ablation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows, from where, and whether the test users are looked at."""
    parser.add_argument("--rows", default="", metavar="NAMES", help="rows to run, separated by commas (default: all)")
    parser.add_argument(
        "--configs", type=Path, default=DEFAULT_CONFIGS, metavar="FOLDER", help=f"their files (default: {DEFAULT_CONFIGS})"
    )
    parser.add_argument("--test", action="store_true", help="add the figures on test users")


def run(config: Config, parsed: argparse.Namespace) -> int:
    """Exit code 0, or 1 where a row failed; the others are run all the same. Prints the table.

    Errors   ConfigError for rows that cannot be read, before any is run; StageStopped when one was asked to stop
    """
    from contrec_dist.ablation.rows import ABLATION_FOLDER, load_rows, pick_rows
    from contrec_dist.ablation.run import run_rows
    from contrec_dist.ablation.table import print_records
    from contrec_dist.manifest import lock_folder

    rows = load_rows(parsed.configs, parsed.config, parsed.overrides)
    chosen = pick_rows(rows, parsed.rows)
    title = f"{config.dataset}: ablation, one change at a time"
    with lock_folder(config, ABLATION_FOLDER):
        records, errors = run_rows(config, rows, chosen, with_test=parsed.test, title=title)
    print_records(records, config.folder(ABLATION_FOLDER), title=title)
    return 1 if errors else 0

"""`contrec tune NAME --config FILE [--trials 20] [--space FILE] [key=value ...]`: settings tried one after another on validation users.

NAME is `contrec`, the model, or a baseline, so that all can be given the same number of trials. The space is a YAML file of lists,
configs/tuning/NAME.yaml by default; trial 0 is the config as it is. Test items are not read.
"""

import argparse
from pathlib import Path

from contrec_dist.config import Config
from contrec_dist.errors import ConfigError

SPACES = Path("configs/tuning")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is tuned, over what, how long."""
    parser.add_argument("name", metavar="NAME", help="contrec, or a baseline")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="settings that are tried, the config's own among them (default: 20)")
    parser.add_argument("--space", type=Path, metavar="FILE", help=f"what may be chosen (default: {SPACES}/NAME.yaml)")


def run(config: Config, parsed: argparse.Namespace) -> int:
    """Exit code 0, or 1 where no trial came to its end. Prints the table.

    Errors   ConfigError for a name, a space or a number that cannot be used, before anything runs; those of run_search
    """
    from contrec_dist.hyperparameters.space import load_space
    from contrec_dist.hyperparameters.table import print_findings, write_findings
    from contrec_dist.hyperparameters.trials import Search, best_record, check_name, run_search, tuning_folder
    from contrec_dist.manifest import lock_folder

    check_name(parsed.name)
    if parsed.trials < 1:
        raise ConfigError("--trials", parsed.trials, "at least 1")
    space = load_space(parsed.space or SPACES / f"{parsed.name}.yaml", parsed.config, parsed.overrides)
    search = Search(name=parsed.name, space=space, files=parsed.config, overrides=parsed.overrides)
    title = f"{config.dataset}: {parsed.name} tuned"
    with lock_folder(config, tuning_folder(parsed.name)):
        records = run_search(search, parsed.trials, lambda done: write_findings(done, search.folder, title))
    print_findings(records, search.folder, title)
    return 0 if best_record(records) else 1

"""`contrec index replay --config FILE`: make the changes of an index again on the one that was built in its place."""

import argparse

from contrec_dist.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(config: Config, parsed: argparse.Namespace) -> int:
    """Exit code 0, whether or not there was something to do."""
    from contrec_dist.manifest import lock_folder
    from contrec_dist.retrieval.current_index import LIVE_FOLDER
    from contrec_dist.retrieval.replay import replay_changes

    with lock_folder(config, LIVE_FOLDER):
        replay_changes(config)
    return 0

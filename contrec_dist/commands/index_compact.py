"""`contrec index compact --config FILE`: write segments again without the rows that left."""

import argparse

from contrec_dist.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all", action="store_true", help="every segment with a removed row, and all that joined as one"
    )


def run(config: Config, parsed: argparse.Namespace) -> int:
    """Exit code 0, whether or not there was something to do."""
    from contrec_dist.manifest import lock_folder
    from contrec_dist.retrieval.current_index import LIVE_FOLDER
    from contrec_dist.retrieval.live_index import LiveIndex

    with lock_folder(config, LIVE_FOLDER):
        LiveIndex.open(config).compact(everything=parsed.all)
    return 0

"""`contrec index add --items FILE --config FILE`: new items join the index, encoded with the trained model."""

import argparse
from pathlib import Path

from contrec_dist.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--items", type=Path, required=True, help="CSV, Parquet or JSON Lines by the source's column names"
    )


def run(config: Config, parsed: argparse.Namespace) -> int:
    """Exit code 0.

    Errors   DataError naming every wrong row, or every id that is in the index; nothing is changed then
    """
    from contrec_dist.manifest import lock_folder
    from contrec_dist.retrieval.current_index import LIVE_FOLDER
    from contrec_dist.retrieval.live_index import LiveIndex
    from contrec_dist.retrieval.new_items import read_new_items

    with lock_folder(config, LIVE_FOLDER):
        LiveIndex.open(config).add(read_new_items(config, parsed.items))
    return 0

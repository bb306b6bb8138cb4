"""`contrec index remove --items FILE --config FILE`: items leave the index; no search returns them again."""

import argparse
from pathlib import Path

from contrec_dist.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--items", type=Path, required=True, help="file with the column of item ids, as the source names it"
    )
    parser.add_argument("--missing_ok", action="store_true", help="leave out ids that are not in the index")


def run(config: Config, parsed: argparse.Namespace) -> int:
    """Exit code 0.

    Errors   DataError naming every wrong row, or every id that is not in the index; nothing is changed then
    """
    from contrec_dist.manifest import lock_folder
    from contrec_dist.retrieval.current_index import LIVE_FOLDER
    from contrec_dist.retrieval.live_index import LiveIndex
    from contrec_dist.retrieval.new_items import read_item_ids

    with lock_folder(config, LIVE_FOLDER):
        LiveIndex.open(config).remove(read_item_ids(config, parsed.items), missing_ok=parsed.missing_ok)
    return 0

"""`contrec export --config FILE --output FOLDER [--merge]`: the trained model as a folder of its own (model/standalone.py)."""

import argparse
from pathlib import Path

from contrec_dist.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it goes, and whether adapters are merged."""
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--merge", action="store_true", help="add LoRA adapters into the base: whole weights, no adapter")


def run(config: Config, parsed: argparse.Namespace) -> int:
    """Write the folder. Errors   ArtifactError naming what is missing, in the way or different."""
    from contrec_dist.model.standalone import write_standalone
    from contrec_dist.progress import get_logger

    write_standalone(config.folder("model"), parsed.output, merge=parsed.merge)
    get_logger("export").info("ContRec.from_pretrained loads it: %s", parsed.output)
    return 0

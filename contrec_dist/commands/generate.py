"""`contrec generate --output FOLDER`: a catalogue of any size, and the config.yaml that runs the pipeline on it."""

import argparse
from pathlib import Path

from rich.console import Console

from contrec_dist.data.sources.streamed_settings import StreamSettings

NEEDS_CONFIG = False
SETTINGS = StreamSettings.__dataclass_fields__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--output, and one argument a setting."""
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a folder that does not exist yet")
    for name, field in SETTINGS.items():
        meaning = f"{field.metadata['meaning']} (default {field.default})"
        parser.add_argument(f"--{name}", type=field.type, default=field.default, help=meaning)


def run(config: None, parsed: argparse.Namespace) -> int:
    """Write the catalogue and say how to run it."""
    from contrec_dist.data.generate import write_catalogue

    path = write_catalogue(StreamSettings(**{name: getattr(parsed, name) for name in SETTINGS}), parsed.output)
    Console().print(f"contrec pipeline --config {path}", soft_wrap=True)
    return 0

"""One reader a format; `read_source` and `source_files` choose by config.source.kind.

Every reader module holds two functions: `source_files(config) -> {config key: path}`, which fails when a file is
missing, and `read(config) -> RawLogs`. A reader keeps every row it was given: it names what is wrong with a row and
leaves the judgement to contrec_dist/data/interactions.py.
"""

from pathlib import Path

from contrec_dist.config import Config
from contrec_dist.data.sources import amazon, generated, hetrec_lastfm, movielens, table
from contrec_dist.data.sources.raw import RawLogs

READERS = {
    "table": table,
    "movielens": movielens,
    "amazon": amazon,
    "hetrec_lastfm": hetrec_lastfm,
    "generated": generated,
}


def read_source(config: Config) -> RawLogs:
    """Read the raw logs that config.source names."""
    return READERS[config.source.kind].read(config)


def source_files(config: Config) -> dict[str, Path]:
    """The files that config.source names, by the config key that names each.

    Errors   ConfigError naming the key and the path of a file that is missing.
    """
    return READERS[config.source.kind].source_files(config)

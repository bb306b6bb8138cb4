"""MovieLens in its .dat form (100K's successors 1M and 10M): ratings.dat and movies.dat, `::` between fields.

Titles are latin-1 in 1M and UTF-8 in 10M; both are read. Genres become category alternatives. The later releases
(20M and on) are CSV: use kind 'table'.
"""

from pathlib import Path

from contrec_dist.config import Config
from contrec_dist.data.sources.raw import RawLogs
from contrec_dist.data.sources.text_files import find_file, read_separated


def source_files(config: Config) -> dict[str, Path]:
    """ratings.dat and movies.dat in source.path."""
    return {name: find_file(config, "source.path", name) for name in ("ratings.dat", "movies.dat")}


def read(config: Config) -> RawLogs:
    """Read ratings and movies; times are unix seconds."""
    files = source_files(config)
    ratings = read_separated(files["ratings.dat"], ["user_id", "item_id", "rating", "time"], separator="::")
    movies = read_separated(files["movies.dat"], ["item_id", "title", "category"], separator="::")
    return RawLogs(interactions=ratings, items=movies, time_unit="s")

"""HetRec 2011 LastFM: user_taggedartists-timestamps.dat and artists.dat, tab separated with a header.

An interaction is the FIRST-LISTED tag row of each (user, artist), as the published splits of this set have it; that is
not always the pair's earliest tag. The further rows of a pair are counted. Times are milliseconds, most of them the
first of a month. Tags are no item text here: users gave them after the interaction that is to be predicted.
"""

from pathlib import Path

import polars as pl

from contrec_dist.config import Config
from contrec_dist.data.sources.raw import RawLogs
from contrec_dist.data.sources.text_files import find_file, read_separated

TAGS_FILE = "user_taggedartists-timestamps.dat"
ARTISTS_FILE = "artists.dat"


def source_files(config: Config) -> dict[str, Path]:
    """Both files in source.path."""
    return {name: find_file(config, "source.path", name) for name in (TAGS_FILE, ARTISTS_FILE)}


def read(config: Config) -> RawLogs:
    """Read tag rows and artists; of the rows of one (user, artist) the first one stays."""
    files = source_files(config)
    tags = read_separated(files[TAGS_FILE], ["user_id", "item_id", "tag", "time"], separator="\t", header=True)
    num_rows = len(tags.frame)
    # A faulty row has no pair to speak of: all of them stay, to be counted as wrong.
    first = pl.struct("user_id", "item_id").is_first_distinct() | pl.col("fault").is_not_null()
    tags.frame = tags.frame.filter(first).drop("tag")
    artists = read_separated(
        files[ARTISTS_FILE], ["item_id", "title", "url", "picture"], separator="\t", header=True, num_required=2
    )
    artists.frame = artists.frame.drop("url", "picture")
    artists.frame = artists.frame.with_columns(category=pl.lit(""), brand=pl.lit(""), text=pl.lit(""))
    dropped = {"further tag row of the same user and artist": num_rows - len(tags.frame)}
    return RawLogs(interactions=tags, items=artists, time_unit="ms", dropped=dropped)

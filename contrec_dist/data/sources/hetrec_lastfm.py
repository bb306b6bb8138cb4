"""HetRec 2011 LastFM: user_taggedartists-timestamps.dat and artists.dat, tab separated with a header.

An interaction is the FIRST-LISTED tag row of each (user, artist), as the published splits of this set have it; that is
not always the pair's earliest tag. The further rows of a pair are counted. Times are milliseconds, most of them the
first of a month. Tags are no item text here: users gave them after the interaction that is to be predicted.
"""

from pathlib import Path

from contrec_dist.config import Config
from contrec_dist.data.sources.raw import RawLogs
from contrec_dist.data.sources.text_files import find_file, read_separated

TAGS_FILE = "user_taggedartists-timestamps.dat"
ARTISTS_FILE = "artists.dat"


def source_files(config: Config) -> dict[str, Path]:
    """Both files in source.path."""
    return {name: find_file(config, "source.path", name) for name in (TAGS_FILE, ARTISTS_FILE)}


def read(config: Config) -> RawLogs:
    """Read tag rows and artists."""
    files = source_files(config)
    tags = read_separated(files[TAGS_FILE], ["user_id", "item_id", "tag", "time"], separator="\t", header=True)
    columns = ["item_id", "title", "url", "picture"]
    artists = read_separated(files[ARTISTS_FILE], columns, separator="\t", header=True, num_required=2)
    return RawLogs(
        interactions=tags, items=artists, time_unit="ms", further_rows="further tag row of the same user and artist"
    )

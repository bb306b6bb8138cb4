"""Writes a catalogue of production size as files that the `table` source reads (command generate).

Writes       items.parquet [item_id, title, category, brand, text]; interactions/NNNNNN.parquet [user_id, item_id,
             timestamp (unix seconds), rating], USERS_PER_FILE users a file, user after user in time order; config.yaml
Guarantees   rows are a function of the settings (data/sources/streamed_law.py); users_per_file decides only where a
             file ends; the folder gets its name when it is complete; an existing one is never touched.
Cost         Memory of one file's users and one row group of items, whatever the size: 280 MB at the default. A million
             items, and users with 12 interactions each: about a minute on one core.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet
import yaml

from contrec_dist.config import SourceConfig
from contrec_dist.data.sources.streamed_law import StreamedLaw
from contrec_dist.data.sources.streamed_settings import StreamSettings
from contrec_dist.data.sources.streamed_titles import item_frame, item_ids, user_ids
from contrec_dist.errors import ArtifactError
from contrec_dist.progress import track
from sharding.partition import part_ranges

ITEMS_NAME, INTERACTIONS_NAME, CONFIG_NAME = "items.parquet", "interactions", "config.yaml"
ITEMS_PER_ROW_GROUP = 65_536
USERS_PER_FILE = 65_536
LARGE_NODES = 200_000
LARGE_ITEMS = 100_000


def write_catalogue(settings: StreamSettings, folder: Path, *, users_per_file: int = USERS_PER_FILE) -> Path:
    """Write items, interactions and config.yaml into `folder`; returns the path of config.yaml.

    Errors   ArtifactError when `folder` exists
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise ArtifactError(folder, "a file or folder that exists", "a name that is free")
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # of an earlier attempt that was killed
    (work / INTERACTIONS_NAME).mkdir(parents=True)
    law = StreamedLaw(settings)
    write_items(law, work / ITEMS_NAME)
    write_interactions(law, work / INTERACTIONS_NAME, users_per_file)
    (work / CONFIG_NAME).write_text(show_config(settings, folder))
    os.rename(work, folder)
    return folder / CONFIG_NAME


def write_items(law: StreamedLaw, path: Path) -> None:
    """All items in one file, a row group at a time (polars writes whole frames only, so pyarrow writes)."""
    ranges = part_ranges(law.settings.num_items, ITEMS_PER_ROW_GROUP)
    tracked = track(ranges, stage="generate", unit="item groups", total=len(ranges))
    frames = (item_frame(law, start, stop) for start, stop in tracked)
    first = next(frames).to_arrow()
    with pyarrow.parquet.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for frame in frames:
            writer.write_table(frame.to_arrow())


def write_interactions(law: StreamedLaw, folder: Path, users_per_file: int) -> None:
    """All interactions, a file a range of users."""
    ranges = part_ranges(law.settings.num_users, users_per_file)
    tracked = track(ranges, stage="generate", unit=f"files of {users_per_file} users", total=len(ranges))
    for number, (start, stop) in enumerate(tracked):
        interaction_frame(law, start, stop).write_parquet(folder / f"{number:06d}.parquet", compression="zstd")


def interaction_frame(law: StreamedLaw, start: int, stop: int) -> pl.DataFrame:
    """[user_id, item_id, timestamp, rating] of the users start..stop."""
    lengths, items = law.draw_histories(start, stop)
    users = np.repeat(np.arange(start, stop), lengths)
    steps = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return pl.DataFrame({
        "user_id": user_ids(np.arange(start, stop)).gather(users - start),
        "item_id": item_ids(items),
        "timestamp": law.draw_times(start, lengths, steps, users),
        "rating": law.draw_ratings(users, steps),
    })  # fmt: skip


def show_config(settings: StreamSettings, folder: Path) -> str:
    """The YAML that runs the pipeline on what is written; large catalogues get the settings that grow with the data."""
    source = {
        "kind": "table", "path": str(folder), "interactions_file": INTERACTIONS_NAME, "items_file": ITEMS_NAME,
        "rating_column": "rating", "min_item_interactions": 1, "keep_unseen_items": True,
        "min_user_interactions": min(settings.min_history, SourceConfig().min_user_interactions),
    }  # fmt: skip
    config: dict = {"name": folder.name, "seed": settings.seed, "source": source}
    if settings.num_items + settings.num_users > LARGE_NODES:
        config["embed"] = {"collaborative": "none"}  # LightGCN carries every node along every edge at every step
    if settings.num_items > LARGE_ITEMS:
        config["loss"] = {"num_negatives": 4096}  # the whole catalogue as one softmax no longer fits a step
    asked = " ".join(f"--{name} {getattr(settings, name)}" for name in settings.__dataclass_fields__)
    return f"# contrec generate {asked}\n" + yaml.safe_dump(config, sort_keys=False)

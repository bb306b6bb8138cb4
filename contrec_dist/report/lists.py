"""Recommendation lists as arrays: read from the score stage's Parquet, with everything that could be wrong checked.

    recommendations/split=test|validation/seen=masked|kept/part-*.parquet
    user_id str, rank int64 from 1, item_id str, score float32, reason str
"""

from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from contrec_dist.data.catalog import Histories, Part
from contrec_dist.errors import ArtifactError

Seen = Literal["masked", "kept"]
COLUMNS = ("user_id", "rank", "item_id", "score", "reason")


def load_lists(folder: Path, part: Part, seen: Seen, users: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """All lists of one split, one row a recommendation: [user_idx, rank, item_idx, reason].

    Errors   ArtifactError naming the folder: nothing there, other columns, an unknown user or item, a rank below 1 or
             repeated, an item twice in a list.
    """
    path = Path(folder) / f"split={part}" / f"seen={seen}"
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise ArtifactError(path, "no Parquet files", "the lists of this split, written by the score stage")
    frame = pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in files])
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise ArtifactError(path, f"columns {frame.columns}", f"columns {list(COLUMNS)}")
    frame = frame.join(users.select("user_id", "user_idx"), on="user_id", how="left", maintain_order="left")
    frame = frame.join(items.select("item_id", "item_idx"), on="item_id", how="left", maintain_order="left")
    for name in ("user", "item"):
        unknown = frame.filter(pl.col(f"{name}_idx").is_null())[f"{name}_id"]
        if len(unknown):
            got = f"{len(unknown)} rows whose {name} is not in the catalogue, the first is '{unknown[0]}'"
            raise ArtifactError(path, got, "lists of this catalogue")
    frame = frame.select("user_idx", "rank", "item_idx", "reason")
    _check_places(frame, path)
    return frame


def list_matrix(frame: pl.DataFrame, users: np.ndarray, k: int) -> np.ndarray:
    """The first k of every given user's list, -1 past the end and for users without one.

    Shapes   users (B,) rising int64 -> (B, k) int64
    """
    wanted = frame.filter(pl.col("user_idx").is_in(pl.Series(users).implode()) & (pl.col("rank") <= k))
    matrix = np.full((len(users), k), -1, dtype=np.int64)
    rows = np.searchsorted(users, wanted["user_idx"].to_numpy())
    matrix[rows, wanted["rank"].to_numpy() - 1] = wanted["item_idx"].to_numpy()
    return matrix


def seen_items(histories: Histories, users: np.ndarray, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """What every user had seen before the target, flat, with offsets.

    Shapes   users (B,) -> seen (M,) int64, offsets (B + 1,) int64
    """
    lengths = histories.positions(part)[users]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    places = np.arange(offsets[-1]) + np.repeat(histories.offsets[users] - offsets[:-1], lengths)
    return histories.items[places].astype(np.int64), offsets


def check_masked(lists: np.ndarray, seen_flat: np.ndarray, seen_offsets: np.ndarray, where: Path) -> None:
    """Raise ArtifactError when a list that should be free of seen items holds one."""
    stride = int(max(lists.max(initial=0), seen_flat.max(initial=0))) + 1
    rows = np.arange(len(lists), dtype=np.int64)
    seen_keys = np.repeat(rows, np.diff(seen_offsets)) * stride + seen_flat
    wrong = np.isin(rows[:, None] * stride + lists, seen_keys) & (lists >= 0)
    if wrong.any():
        raise ArtifactError(where, f"{int(wrong.sum())} recommendations that the user had seen", "none of them")


def _check_places(frame: pl.DataFrame, path: Path) -> None:
    if len(frame) and frame["rank"].min() < 1:
        raise ArtifactError(path, f"rank {frame['rank'].min()}", "ranks from 1")
    for name in ("rank", "item_idx"):
        repeated = frame.select(pl.struct("user_idx", name).is_duplicated()).to_series()
        if repeated.any():
            user = frame.filter(repeated)["user_idx"][0]
            raise ArtifactError(path, f"a repeated {name} in the list of user_idx {user}", f"every {name} once a user")

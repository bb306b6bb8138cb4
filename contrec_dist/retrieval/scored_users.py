"""Who is scored: one row a user in Parquet, read range by range, so that no process ever holds all users.

The catalogue's own users stand in two files that the prepare stage wrote. A subset of them, and users that training never
saw, are brought into the same form, in one file (users_files.py).

    histories   user_idx (-1: unknown to training), items, num_train, validation_pos, test_pos
    user ids    user_id, in the same order of rows

Cost     a range is decoded from its row groups alone: about 10 us a user with 12 items.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from contrec_dist.data.catalog import HISTORIES_FILE, USERS_FILE
from contrec_dist.data.split import NO_TARGET

COLUMNS = ("user_idx", "items", "num_train", "validation_pos", "test_pos")


@dataclass(frozen=True)
class Users:
    """Some users of one split: what stands before the target, oldest first, and the target where there is one.

    Shapes   user_ids (B,) text, user_idx (B,) int64 (-1: unknown to training), items (n,) int64, offsets (B + 1,) int64,
             targets (B,) int64 (-1: none)
    """

    user_ids: pl.Series
    user_idx: np.ndarray
    items: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.user_idx)

    def newest(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The newest `count` items of some rows, laid end to end, with their offsets."""
        ends = self.offsets[rows + 1]
        lengths = np.minimum(ends - self.offsets[rows], count)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.arange(offsets[-1]) + np.repeat(ends - lengths - offsets[:-1], lengths)
        return self.items[places], offsets


@dataclass(frozen=True)
class ScoredUsers:
    """Where the users lie."""

    histories: Path
    user_ids: Path

    @classmethod
    def of_catalog(cls, catalog: Path) -> "ScoredUsers":
        """Every user of the catalogue, in its order."""
        return cls(Path(catalog) / HISTORIES_FILE, Path(catalog) / USERS_FILE)

    @property
    def count(self) -> int:
        """U, users of the files."""
        return pl.scan_parquet(self.histories).select(pl.len()).collect().item()

    def load(self, split: str, start: int, stop: int) -> Users:
        """Those of rows start .. stop - 1 that the split asks about."""
        frame = pl.scan_parquet(self.histories).select(COLUMNS).slice(start, stop - start).collect()
        ids = pl.scan_parquet(self.user_ids).select("user_id").slice(start, stop - start).collect()
        frame = frame.with_columns(ids["user_id"])
        return _cut(frame.filter(pl.Series(target_positions(frame, split) >= 0)), split)

    def pick(self, split: str, rows: np.ndarray) -> Users:
        """Users by row number, in the order given; those without a target are cut where training ends."""
        read = lambda path, columns: pl.scan_parquet(path).select(columns).with_row_index("row")  # noqa: E731
        wanted = pl.LazyFrame({"row": np.asarray(rows, dtype=np.uint32)})
        pieces = [read(self.histories, COLUMNS), read(self.user_ids, ["user_id"])]
        for piece in pieces:
            wanted = wanted.join(piece, on="row", how="left", maintain_order="left")
        return _cut(wanted.collect(), split)

    def with_target(self, split: str) -> np.ndarray:
        """Row numbers of the users that the split asks about. (n,) int64"""
        frame = pl.scan_parquet(self.histories).select("items", "validation_pos", "test_pos").collect()
        return np.flatnonzero(target_positions(frame, split) >= 0)


def target_positions(frame: pl.DataFrame, split: str) -> np.ndarray:
    """Place of the target in each user's items, -1 for none; for 'next' the place after the last. (B,) int64"""
    if split == "next":
        return frame["items"].list.len().to_numpy().astype(np.int64)
    return frame[f"{split}_pos"].to_numpy()


def _cut(frame: pl.DataFrame, split: str) -> Users:
    """Histories up to the target, or up to the end of training where there is none."""
    lengths = frame["items"].list.len().to_numpy().astype(np.int64)
    whole = frame["items"].filter(pl.Series(lengths > 0, dtype=pl.Boolean)).explode().to_numpy()
    before = np.cumsum(lengths) - lengths
    positions = target_positions(frame, split)
    ends = np.where(positions == NO_TARGET, frame["num_train"].to_numpy(), positions)
    kept = np.arange(len(whole)) < np.repeat(before + ends, lengths)
    targets = np.full(len(frame), -1, dtype=np.int64)
    named = (positions >= 0) & (positions < lengths)
    targets[named] = whole[(before + positions)[named]]
    return Users(
        user_ids=frame["user_id"],
        user_idx=frame["user_idx"].to_numpy(),
        items=whole[kept].astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(ends)]).astype(np.int64),
        targets=targets,
    )

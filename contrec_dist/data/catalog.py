"""Reading the catalogue that the prepare stage wrote: items, users, histories.

Item and user numbers are row numbers: row i of items.parquet is item_idx i.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from contrec_dist.data.split import NO_TARGET
from contrec_dist.errors import ArtifactError

ITEMS_FILE, USERS_FILE, HISTORIES_FILE = "items.parquet", "users.parquet", "histories.parquet"
Part = Literal["validation", "test"]


def load_items(folder: Path) -> pl.DataFrame:
    """[item_idx, item_id, title, category, brand, text, num_train], row i is item i."""
    return _load_numbered(folder, ITEMS_FILE, "item_idx")


def load_users(folder: Path) -> pl.DataFrame:
    """[user_idx, user_id], row u is user u."""
    return _load_numbered(folder, USERS_FILE, "user_idx")


def load_histories(folder: Path) -> pl.DataFrame:
    """[user_idx, items, timestamps, num_train, validation_pos, test_pos], row u is user u."""
    return _load_numbered(folder, HISTORIES_FILE, "user_idx")


def _load_numbered(folder: Path, name: str, number: str) -> pl.DataFrame:
    path = Path(folder) / name
    if not path.is_file():
        raise ArtifactError(path, "no such file", "the complete output of the prepare stage; run that stage first")
    frame = pl.read_parquet(path)
    if not (frame[number].to_numpy() == np.arange(len(frame))).all():
        raise ArtifactError(path, f"{number} that differs from the row number", "0, 1, 2, ...")
    return frame


@dataclass(kw_only=True, slots=True, frozen=True)
class Histories:
    """All histories as flat arrays; user u's items are items[offsets[u]:offsets[u + 1]] in the user's order.

    Shapes   offsets: (U + 1,) int64; items, timestamps: (M,) int64; num_train, validation_pos, test_pos: (U,) int64
    Units    timestamps: unix seconds, 0 where unknown
    """

    offsets: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    num_train: np.ndarray
    validation_pos: np.ndarray
    test_pos: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "Histories":
        """Read a catalogue folder."""
        return cls.from_frame(load_histories(folder))

    @classmethod
    def from_frame(cls, frame: pl.DataFrame) -> "Histories":
        """From load_histories' frame."""
        lengths = frame["items"].list.len().to_numpy().astype(np.int64)
        return cls(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items=frame["items"].explode().to_numpy(),
            timestamps=frame["timestamps"].explode().to_numpy(),
            num_train=frame["num_train"].to_numpy(),
            validation_pos=frame["validation_pos"].to_numpy(),
            test_pos=frame["test_pos"].to_numpy(),
        )

    @property
    def num_users(self) -> int:
        return len(self.num_train)

    @property
    def lengths(self) -> np.ndarray:
        """(U,) int64: items of every whole history."""
        return np.diff(self.offsets)

    def history(self, user: int, position: int | None = None) -> np.ndarray:
        """The items in front of `position` (the whole history when None): what a target there may be predicted from."""
        whole = self.items[self.offsets[user] : self.offsets[user + 1]]
        return whole if position is None else whole[:position]

    def training_items(self, user: int) -> np.ndarray:
        """The items that training may see."""
        return self.history(user, int(self.num_train[user]))

    def positions(self, part: Part) -> np.ndarray:
        """(U,) int64: target positions of a part, -1 where a user has none."""
        return self.validation_pos if part == "validation" else self.test_pos

    def users_with(self, part: Part) -> np.ndarray:
        """Users that have a target in this part, ascending."""
        return np.flatnonzero(self.positions(part) != NO_TARGET)

    def targets(self, users: np.ndarray, part: Part) -> np.ndarray:
        """(len(users),) int64: target items. Every user must have one (see users_with)."""
        return self.items[self.offsets[users] + self.positions(part)[users]]

    def training_edges(self) -> tuple[np.ndarray, np.ndarray]:
        """(user_idx, item_idx) of training interactions alone, user after user; repeats stay.

        Shapes   both (sum of num_train,) int64
        """
        users = np.repeat(np.arange(self.num_users), self.lengths)
        place = np.arange(len(self.items)) - self.offsets[users]
        train = place < self.num_train[users]
        return users[train], self.items[train]

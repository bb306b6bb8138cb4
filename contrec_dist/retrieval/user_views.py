"""Users as the scoring sees them: the history before a target, read by the model, turned into queries or samples."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from contrec_dist.config import Config
from contrec_dist.data.prompts import PromptTexts
from contrec_dist.model.contrec import ContRec
from contrec_dist.model.history_reader import History, HistoryReader, Reading
from sharding.token_reader import TokenReader


@dataclass
class UserViews:
    """Histories of every user for the splits 'validation', 'test' and 'next' (everything seen so far)."""

    config: Config
    model: ContRec
    reader: TokenReader
    history_reader: HistoryReader
    user_latents: np.ndarray | None

    @classmethod
    def open(cls, config: Config, model: ContRec, tokenizer) -> "UserViews":
        from contrec_dist.training.train import load_user_latents

        items = pl.read_parquet(config.folder("catalog") / "items.parquet")
        texts = PromptTexts(items, tokenizer, config.prompt)
        reader = TokenReader(config.folder("tokens"))
        return cls(config, model, reader, HistoryReader(model, texts, tokenizer), load_user_latents(config))

    @property
    def num_users(self) -> int:
        return self.reader.num_samples

    def target_positions(self, split: str) -> np.ndarray:
        """Place of the target in each user's items, -1 for none; for 'next' the place after the last. (U,)"""
        if split == "next":
            return self.reader.num_items.astype(np.int64)
        return {"validation": self.reader.validation_pos, "test": self.reader.test_pos}[split]

    def users_with_target(self, split: str) -> np.ndarray:
        """Users that the split asks about. (n,) int64"""
        return np.nonzero(self.target_positions(split) >= 0)[0]

    def seen_items(self, users: np.ndarray, split: str) -> list[np.ndarray]:
        """Every item that each user met before the target."""
        ends = self._ends(users, split)
        return [self.reader.read(int(user)).items[:end].astype(np.int64) for user, end in zip(users, ends)]

    def read(self, users: np.ndarray, split: str, *, reasoning: bool) -> Reading:
        """Conditions and reasons of the users, in their order; batches hold users of like length."""
        ends = self._ends(users, split)
        lengths = np.minimum(ends, self.config.prompt.max_history)
        order = np.argsort(lengths, kind="stable")
        condition, reasons = None, [""] * len(users)
        for start in range(0, len(users), self.config.score.batch_users):
            rows = order[start : start + self.config.score.batch_users]
            reading = self.history_reader.read([self._history(users[row], ends[row]) for row in rows], reasoning=reasoning)
            if condition is None:
                condition = reading.condition.new_zeros(len(users), reading.condition.shape[1])
            condition[torch.from_numpy(rows)] = reading.condition
            for row, reason in zip(rows, reading.reasons):
                reasons[row] = reason
        return Reading(condition, reasons)

    @torch.no_grad()
    def queries(self, condition: Tensor) -> Tensor:
        """Queries with a last 1 that meets the items' bias: (n, D) -> (n, Q + 1) float32."""
        with self.model.autocast(condition.device):
            query = self.model.head.query(condition).float()
        return torch.cat([query, query.new_ones(len(query), 1)], dim=1)

    def _ends(self, users: np.ndarray, split: str) -> np.ndarray:
        """History lengths; users without a target are read up to what training saw."""
        positions = self.target_positions(split)[users]
        return np.where(positions >= 0, positions, self.reader.num_train[users])

    def _history(self, user: int, end: int) -> History:
        sample = self.reader.read(int(user))
        newest = slice(max(0, int(end) - self.config.prompt.max_history), int(end))
        own = None
        if self.user_latents is not None:
            own = self.user_latents[user]
        return History(sample.items[newest].astype(np.int64), sample.latents[newest].astype(np.float32), own)

"""Users as the scoring sees them: the history before a target, read by the model, turned into queries."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contrec_dist.config import Config
from contrec_dist.data.catalog import load_items
from contrec_dist.data.latents import item_latents_path
from contrec_dist.data.prompts import PromptTexts
from contrec_dist.model.contrec import ContRec
from contrec_dist.model.history_reader import HistoryBatch, HistoryReader, Reading
from contrec_dist.retrieval.current_index import CurrentIndex, OverlaidRows
from contrec_dist.retrieval.scored_users import ScoredUsers, Users
from contrec_dist.retrieval.steady_reader import SteadyReader, fill_rows


@dataclass
class UserViews:
    """Histories for the splits 'validation', 'test' and 'next' (everything seen so far), and what the model makes of them."""

    config: Config
    model: ContRec
    history_reader: HistoryReader
    item_latents: np.ndarray | OverlaidRows
    "(N, K, Z) raw; may be memory-mapped"
    user_latents: np.ndarray | None
    "(U, K, Z), of the catalogue's users"
    users: ScoredUsers

    @classmethod
    def open(
        cls, config: Config, model: ContRec, tokenizer, users: ScoredUsers | None = None, index: CurrentIndex | None = None
    ) -> "UserViews":
        """`users`: who is read; None: the catalogue's own. `index`: whose items histories may hold; None: the catalogue's."""
        from contrec_dist.training.train import load_user_latents

        items = load_items(config.folder("catalog")) if index is None else index.items
        latents = index.latents if index else np.load(item_latents_path(config), mmap_mode="r")
        reader = SteadyReader(model, PromptTexts(items, tokenizer, config.prompt), tokenizer)
        users = users or ScoredUsers.of_catalog(config.folder("catalog"))
        return cls(config, model, reader, latents, load_user_latents(config), users)

    @property
    def num_users(self) -> int:
        return self.users.count

    def read(self, users: np.ndarray, split: str, *, reasoning: bool) -> Reading:
        """Conditions and reasons of users by their number, in their order."""
        return self.read_users(self.users.pick(split, users), reasoning=reasoning)

    def read_users(self, users: Users, *, reasoning: bool) -> Reading:
        """Conditions and reasons, in the users' order; batches hold users of like length."""
        lengths = np.minimum(np.diff(users.offsets), self.config.prompt.max_history)
        order = np.argsort(lengths, kind="stable")
        width = self.model.head.norm.normalized_shape[0]
        condition = torch.zeros(len(users), width, device=self.history_reader.device)
        reasons = [""] * len(users)
        for start in range(0, len(users), self.config.score.batch_users):
            rows = order[start : start + self.config.score.batch_users]
            reading = self.history_reader.read(self._histories(users, rows), reasoning=reasoning)
            condition[torch.from_numpy(rows)] = reading.condition
            if reasoning:
                for row, reason in zip(rows, reading.reasons):
                    reasons[row] = reason
        return Reading(condition, reasons)

    @torch.no_grad()
    def queries(self, condition: Tensor) -> Tensor:
        """Queries with a last 1 that meets the items' bias: (n, D) -> (n, Q + 1) float32."""
        with self.model.autocast(condition.device):
            query = self.model.head.query(fill_rows(condition)).float()[: len(condition)]
        return torch.cat([query, query.new_ones(len(query), 1)], dim=1)

    def _histories(self, users: Users, rows: np.ndarray) -> HistoryBatch:
        items, offsets = users.newest(rows, self.config.prompt.max_history)
        # The token shards, from which training read, hold half precision.
        latents = self.item_latents[items].astype(np.float16).astype(np.float32)
        own = None
        if self.user_latents is not None:
            known = users.user_idx[rows]
            own = np.where((known >= 0)[:, None, None], self.user_latents[np.maximum(known, 0)], np.float32(0.0))
        return HistoryBatch(items, offsets, latents, own)

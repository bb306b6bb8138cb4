"""Packed training batches: which samples of an epoch share a row, and the tensors of a micro-batch.

Rows hold several users one after another; the mask lets a position see only its own user's earlier positions, so packing
changes no result and padding stays small. An epoch's plan is a function of (seed, epoch) alone; see sharding/partition.
"""

from dataclasses import dataclass

import numpy as np
import torch

from contrec_dist.config import Config
from contrec_dist.data.packed_batch import PackedBatch
from contrec_dist.data.prompts import LEANING_ITEMS, PromptTexts, SampleLayout, input_title_lengths, lay_out
from contrec_dist.errors import ConfigError
from sharding.partition import cut_windows, pack_rows, shuffle_windows
from sharding.token_reader import TokenReader


@dataclass(frozen=True)
class EpochPlan:
    """Samples of an epoch and the rows that hold them.

    `user`, `start`, `stop`: sample i trains items[start + 1 : stop] of its user; `term`, `brand`: its response (term -1: none);
    `rows`: sample numbers of each row, in training order; `num_positions`: positions in use.
    """

    user: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    term: np.ndarray
    brand: np.ndarray
    rows: list[np.ndarray]
    num_positions: int

    def padding_ratio(self, row_tokens: int) -> float:
        """Share of positions that hold nothing."""
        return 1.0 - self.num_positions / (len(self.rows) * row_tokens)


class TrainingRows:
    """Plans epochs over the training views of a token folder, and builds the tensors of rows."""

    def __init__(self, config: Config, reader: TokenReader, texts: PromptTexts, user_latents: np.ndarray | None):
        self.config, self.reader, self.texts, self.user_latents = config, reader, texts, user_latents
        self.num_user_tokens = reader.num_item_tokens if user_latents is not None else 0
        self.sample_user, self.sample_start, self.sample_stop = cut_windows(
            reader.num_train, config.prompt.max_history
        )
        self._sample_shard = reader.shard[self.sample_user]

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch. Errors   ConfigError when a sample does not fit train.row_tokens."""
        train = self.config.train
        rng = np.random.default_rng([self.config.seed, epoch, 1])
        term, brand = self._draw_responses(rng)
        lengths = self._sample_lengths(term, brand)
        if len(lengths) and lengths.max() > train.row_tokens:
            raise ConfigError("train.row_tokens", train.row_tokens, f"at least {lengths.max()}, the longest sample")
        rows: list[np.ndarray] = []
        for shards in shuffle_windows(self.reader.num_shards, train.shuffle_shards, self.config.seed, epoch):
            samples = rng.permutation(self._samples_of(shards))
            packed = [samples[row] for row in pack_rows(lengths[samples], train.row_tokens)]
            rows.extend(packed[place] for place in rng.permutation(len(packed)))
        return EpochPlan(
            self.sample_user, self.sample_start, self.sample_stop, term, brand, rows, int(lengths.sum())
        )

    def _samples_of(self, shards: np.ndarray) -> np.ndarray:
        """Samples of some shards, in order; samples are sorted by user, hence by shard."""
        first, end = np.searchsorted(self._sample_shard, np.sort(shards)), np.searchsorted(self._sample_shard, np.sort(shards) + 1)
        return np.concatenate([np.arange(*span) for span in zip(first, end)])

    def build(self, plan: EpochPlan, row_numbers: np.ndarray, num_rows: int) -> PackedBatch:
        """Tensors of the given rows of a plan, filled up with empty rows to num_rows."""
        builder = _BatchBuilder(num_rows, self.config.train.row_tokens, self.reader, self.num_user_tokens)
        for place, row in enumerate(row_numbers):
            for sample in plan.rows[row]:
                self._add_sample(builder, plan, place, int(sample))
        return builder.finish()

    def _add_sample(self, builder: "_BatchBuilder", plan: EpochPlan, place: int, sample: int) -> None:
        user, start, stop = int(plan.user[sample]), int(plan.start[sample]), int(plan.stop[sample])
        tokens = self.reader.read(user)
        term, brand = int(plan.term[sample]), int(plan.brand[sample])
        layout = lay_out(
            self.texts,
            tokens.items[start : stop - 1],
            num_item_tokens=self.reader.num_item_tokens,
            num_user_tokens=self.num_user_tokens,
            response=self.texts.response_tokens(term, brand) if term >= 0 else np.zeros(0, np.int64),
            with_final_marker=True,
        )
        user_latents = self.user_latents[user] if self.user_latents is not None else None
        builder.add(place, layout, tokens.items[start:stop], tokens.latents[start:stop], user_latents)

    def _draw_responses(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Leaning of every sample's history, -1 where the response is dropped."""
        term, brand = self._leanings
        dropped = rng.random(len(term)) < self.config.prompt.response_drop
        return np.where(dropped, -1, term), np.where(dropped, -1, brand)

    @property
    def _leanings(self) -> tuple[np.ndarray, np.ndarray]:
        if not hasattr(self, "_cached_leanings"):
            recent = np.full((len(self.sample_user), LEANING_ITEMS), -1, dtype=np.int64)
            for sample, (user, start, stop) in enumerate(zip(self.sample_user, self.sample_start, self.sample_stop)):
                newest = self.reader.read(int(user)).items[start : stop - 1][-LEANING_ITEMS:]
                recent[sample, LEANING_ITEMS - len(newest) :] = newest
            self._cached_leanings = self.texts.leaning(recent)
        return self._cached_leanings

    def _sample_lengths(self, term: np.ndarray, brand: np.ndarray) -> np.ndarray:
        """Length of every sample, equal to what lay_out makes of it."""
        num_inputs = self.sample_stop - self.sample_start - 1
        length = len(self.texts.instruction) + self.num_user_tokens + 1
        length = length + num_inputs * (1 + self.reader.num_item_tokens)
        return length + self._title_lengths() + self.texts.response_lengths(term, brand)

    def _title_lengths(self) -> np.ndarray:
        """Title tokens of every sample. (samples,)"""
        if not hasattr(self, "_cached_title_lengths"):
            total = np.zeros(len(self.sample_user), dtype=np.int64)
            if self.config.prompt.titled_items != 0:
                for sample, (user, start, stop) in enumerate(
                    zip(self.sample_user, self.sample_start, self.sample_stop)
                ):
                    inputs = self.reader.read(int(user)).items[start : stop - 1]
                    total[sample] = input_title_lengths(self.texts, inputs).sum()
            self._cached_title_lengths = total
        return self._cached_title_lengths


class _BatchBuilder:
    """Collects the samples of a micro-batch and joins them into tensors."""

    def __init__(self, num_rows: int, row_tokens: int, reader: TokenReader, num_user_tokens: int):
        self.row_tokens, self.num_user_tokens = row_tokens, num_user_tokens
        self.shape_of_latents = (reader.num_item_tokens, reader.latent_dim)
        self.tokens = np.zeros((num_rows, row_tokens), dtype=np.int64)
        self.segments = np.zeros((num_rows, row_tokens), dtype=np.int64)
        self.places = np.zeros((num_rows, row_tokens), dtype=np.int64)
        self.filled = np.zeros(num_rows, dtype=np.int64)
        self.parts: dict[str, list[np.ndarray]] = {
            name: []
            for name in (
                "slots", "item_idx", "latents", "markers", "targets", "target_idx", "target_latents", "user_slots",
                "user_latents", "text_positions", "text_labels",
            )
        }

    def add(
        self, row: int, layout: SampleLayout, items: np.ndarray, latents: np.ndarray, user_latents: np.ndarray | None
    ) -> None:
        """Append a sample to a row; `items` and `latents` are those of the history and, last, of the final target."""
        start = int(self.filled[row])
        span = slice(start, start + layout.length)
        self.tokens[row, span] = layout.tokens
        self.segments[row, span] = self.segments[row, start - 1] + 1 if start else 1
        self.places[row, span] = np.arange(layout.length)
        self.filled[row] += layout.length
        base = row * self.row_tokens + start
        add = lambda name, value: self.parts[name].append(value)  # noqa: E731
        add("slots", base + layout.slots)
        add("item_idx", items[:-1])
        add("latents", latents[:-1])
        add("markers", base + layout.markers)
        add("targets", base + layout.markers[1:])
        add("target_idx", items[1:])
        add("target_latents", latents[1:])
        add("text_positions", base + layout.response_start - 1 + np.arange(len(layout.response)))
        add("text_labels", layout.response)
        if user_latents is not None:
            add("user_slots", base + layout.user_slots[None])
            add("user_latents", user_latents[None])

    def finish(self) -> PackedBatch:
        num_tokens, latent_dim = self.shape_of_latents
        empty = {
            "slots": (0, num_tokens), "latents": (0, num_tokens, latent_dim), "user_slots": (0, self.num_user_tokens),
            "target_latents": (0, num_tokens, latent_dim), "user_latents": (0, num_tokens, latent_dim),
        }  # fmt: skip
        joined = {}
        for name, arrays in self.parts.items():
            kind = np.float32 if name.endswith("latents") else np.int64
            array = np.concatenate(arrays) if arrays else np.zeros(empty.get(name, (0,)))
            joined[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=kind))
        whole = {name: torch.from_numpy(getattr(self, name)) for name in ("tokens", "segments", "places")}
        return PackedBatch(**whole, **joined)

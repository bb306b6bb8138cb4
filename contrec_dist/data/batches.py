"""Packed training batches: which samples of an epoch share a row, and the tensors of a micro-batch.

Rows hold several users one after another; the mask lets a position see only its own user's earlier positions, so packing
changes no result and padding stays small. An epoch's plan is a function of (seed, epoch) and the shards that are left out;
see sharding/partition. It is made from the catalogue's histories and the index: no shard is read before its rows are.

Where shards.max_bad_shards allows it, a sample whose bytes are not what was written leaves padding in its row. That depends
on the sample alone, so it is the same on any number of ranks and after a resume.
"""

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import polars as pl
import torch

from contrec_dist.config import Config
from contrec_dist.data.catalog import HISTORIES_FILE
from contrec_dist.data.packed_batch import PackedBatch
from contrec_dist.data.prompts import LEANING_ITEMS, PromptTexts, Ragged
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.progress import get_logger
from sharding.partition import cut_windows, pack_rows, shuffle_windows
from sharding.token_reader import TokenReader
from sharding.token_writer import shard_name

HISTORIES_CHUNK, LEANING_CHUNK = 65536, 65536


@dataclass(frozen=True)
class EpochPlan:
    """Samples of an epoch and the rows that hold them.

    `user`, `start`, `stop`: sample i trains items[start + 1 : stop] of its user (train.targets=last: the last of
    them); `term`, `brand`: its response (term -1: none);
    `rows`: sample numbers of each row, in training order; `num_positions`: positions in use.
    """

    user: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    term: np.ndarray
    brand: np.ndarray
    rows: list[np.ndarray]
    num_positions: int

    @property
    def num_samples(self) -> int:
        """Samples in the rows; those of shards that are left out are in none."""
        return sum(map(len, self.rows))

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
        self.sample_shard = reader.shard[self.sample_user]
        self.left_out: frozenset[int] = frozenset()
        "shards whose samples are in no plan"
        self._bad: set[int] = set()
        self._responses: dict[tuple[int, int], np.ndarray] = {}
        self._title_lengths: np.ndarray | None = None

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
            samples = rng.permutation(self._samples_of([shard for shard in shards if shard not in self.left_out]))
            packed = [samples[row] for row in pack_rows(lengths[samples], train.row_tokens)]
            rows.extend(packed[place] for place in rng.permutation(len(packed)))
        num_positions = int(lengths[np.concatenate([np.zeros(0, np.int64), *rows])].sum())
        return EpochPlan(self.sample_user, self.sample_start, self.sample_stop, term, brand, rows, num_positions)

    def _samples_of(self, shards: Sequence[int]) -> np.ndarray:
        """Samples of some shards, in order; samples are sorted by user, hence by shard."""
        ordered = np.sort(np.asarray(shards, dtype=np.int64))
        spans = zip(np.searchsorted(self.sample_shard, ordered), np.searchsorted(self.sample_shard, ordered + 1))
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(*span) for span in spans)])

    def build(self, plan: EpochPlan, row_numbers: np.ndarray, num_rows: int) -> PackedBatch:
        """Tensors of the given rows of a plan, filled up with empty rows to num_rows.

        Errors   ArtifactError naming shard and sample where one is not what was written and shards.max_bad_shards is 0;
                 else the sample is missing, and its shard is in the batch's skipped_shards
        Cost     Whole arrays at a time: what is left of Python is one read a sample, which is most of it.
        """
        samples = [plan.rows[row] for row in row_numbers]
        row_of_sample = np.repeat(np.arange(len(samples)), [len(one) for one in samples])
        chosen = np.concatenate([*samples, np.zeros(0, np.int64)])
        contents, is_read = self._read_windows(plan, chosen)
        batch = _join(
            contents, row_of_sample[is_read], self.texts, num_rows, self.config.train.row_tokens, self.num_user_tokens,
            last_only=self.config.train.targets == "last",
        )  # fmt: skip
        batch.skipped_shards = torch.from_numpy(self.sample_shard[chosen[~is_read]])
        return batch

    def _read_windows(self, plan: EpochPlan, samples: np.ndarray) -> tuple["SampleContents", np.ndarray]:
        """What the samples hold, end to end in their order, and which of them could be read."""
        users, starts, stops = plan.user[samples], plan.start[samples], plan.stop[samples]
        shape = (0, self.reader.num_item_tokens, self.reader.latent_dim)
        items, latents = [np.zeros(0, np.int64)], [np.zeros(shape, np.float32)]
        is_read = np.ones(len(samples), dtype=bool)
        for place, (user, start, stop) in enumerate(zip(users.tolist(), starts.tolist(), stops.tolist())):
            try:
                tokens = self.reader.read(user)
            except ArtifactError as error:
                self._skip(user, error)
                is_read[place] = False
                continue
            items.append(tokens.items[start:stop])
            latents.append(tokens.latents[start:stop])
        samples, users, starts, stops = samples[is_read], users[is_read], starts[is_read], stops[is_read]
        leanings = zip(plan.term[samples].tolist(), plan.brand[samples].tolist())
        responses = [self._response(term, brand) for term, brand in leanings]
        if self.user_latents is not None:
            user_latents = self.user_latents[users].astype(np.float32)
        else:
            user_latents = np.zeros(shape, np.float32)
        return SampleContents(
            items=np.concatenate(items).astype(np.int64),
            latents=np.concatenate(latents, dtype=np.float32),
            num_items=stops - starts,
            responses=Ragged.from_arrays(responses),
            user_latents=user_latents,
        ), is_read

    def _skip(self, user: int, error: ArtifactError) -> None:
        """Let a sample go, and say so once a shard; whether there are too many by now, all ranks decide together."""
        if not self.config.shards.max_bad_shards:
            raise error
        shard = int(self.reader.shard[user])
        if shard not in self._bad:
            get_logger("train").warning("samples of %s are skipped: %s", shard_name(shard), error)
        self._bad.add(shard)

    def _response(self, term: int, brand: int) -> np.ndarray:
        """Token numbers of a sample's response, empty where it is dropped; one array a pair, kept."""
        if (term, brand) not in self._responses:
            response = self.texts.response_tokens(term, brand) if term >= 0 else np.zeros(0, np.int64)
            self._responses[term, brand] = response
        return self._responses[term, brand]

    def _draw_responses(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Leaning of every sample's history, -1 where the response is dropped."""
        term, brand = self._leanings
        dropped = rng.random(len(term)) < self.config.prompt.response_drop
        return np.where(dropped, -1, term), np.where(dropped, -1, brand)

    @property
    def _leanings(self) -> tuple[np.ndarray, np.ndarray]:
        """Term and brand that every sample's history leans to. (samples,), (samples,)"""
        self._read_histories()
        return self._leaning_term, self._leaning_brand

    def _sample_lengths(self, term: np.ndarray, brand: np.ndarray) -> np.ndarray:
        """Length of every sample, equal to what lay_out makes of it."""
        self._read_histories()
        num_inputs = self.sample_stop - self.sample_start - 1
        item, response = self.texts.item_layout(self.reader.num_item_tokens), self.texts.response_lengths(term, brand)
        length = len(self.texts.instruction) + self.num_user_tokens + num_inputs * item.size
        return length + self._title_lengths + response + item.count_final_markers(response)

    def _read_histories(self) -> None:
        """Leanings and title lengths of all samples, from the items alone, once.

        Cost     The histories of some ten thousand users in memory at a time; a million users take some seconds
        """
        if self._title_lengths is not None:
            return
        count = len(self.sample_user)
        term, brand, titles = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64)
        for first_user in range(0, self.reader.num_samples, HISTORIES_CHUNK):
            items, offsets = self._load_histories(first_user, first_user + HISTORIES_CHUNK)
            first, end = np.searchsorted(self.sample_user, [first_user, first_user + HISTORIES_CHUNK])
            own = offsets[self.sample_user[first:end] - first_user]
            for begin in range(first, end, LEANING_CHUNK):
                part = slice(begin, min(begin + LEANING_CHUNK, end))
                base = own[part.start - first : part.stop - first]
                starts, stops = base + self.sample_start[part], base + self.sample_stop[part] - 1  # of the inputs
                term[part], brand[part] = self.texts.leaning(_newest(items, starts, stops, LEANING_ITEMS))
                titles[part] = self._count_title_tokens(items, starts, stops)
        self._leaning_term, self._leaning_brand, self._title_lengths = term, brand, titles

    def _load_histories(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Whole histories of users start .. stop - 1 end to end. -> items (M,) int64, offsets (users + 1,) int64"""
        path = self.config.folder("catalog") / HISTORIES_FILE
        histories = pl.scan_parquet(path).select("items").slice(start, stop - start).collect()["items"]
        lengths = histories.list.len().to_numpy().astype(np.int64)
        if not np.array_equal(lengths, self.reader.num_items[start:stop]):
            raise ArtifactError(path, f"other histories than {self.reader.folder}", "the catalogue that it was made from")
        items = histories.filter(histories.list.len() > 0).explode().to_numpy()
        return items.astype(np.int64), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def _count_title_tokens(self, items: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Title tokens of the inputs items[start:stop] of every sample. (n,), (n,) -> (n,)"""
        titled = self.config.prompt.titled_items
        if titled == 0:
            return np.zeros(len(starts), np.int64)
        if titled > 0:
            starts = np.maximum(starts, stops - titled)
        total = np.concatenate([[0], np.cumsum(self.texts.titles.lengths(items))])
        return total[stops] - total[starts]


@dataclass(frozen=True, kw_only=True)
class SampleContents:
    """What some samples hold, end to end: `num_items` each of `items` and `latents`, the last one only as a target.

    Shapes   items (W,) int64, latents (W, K, Z) float32, num_items (S,), user_latents (S or 0, K, Z) float32
    """

    items: np.ndarray
    latents: np.ndarray
    num_items: np.ndarray
    responses: Ragged
    user_latents: np.ndarray


def _newest(items: np.ndarray, starts: np.ndarray, stops: np.ndarray, width: int) -> np.ndarray:
    """The last `width` of items[start:stop] for every pair, -1 in front where there are fewer. -> (n, width) int64"""
    place = stops[:, None] + np.arange(-width, 0)
    there = place >= starts[:, None]
    return np.where(there, items[np.where(there, place, 0)], -1)


def _join(
    contents: SampleContents, row_of_sample: np.ndarray, texts: PromptTexts, num_rows: int, row_tokens: int,
    num_user_tokens: int, *, last_only: bool,
) -> PackedBatch:
    """Lay the samples out side by side in their rows; every sample as prompts.lay_out places it."""
    item = texts.item_layout(contents.latents.shape[1])
    sample, place = np.repeat(np.arange(len(row_of_sample)), contents.num_items), _count_up(contents.num_items)
    is_input = place < contents.num_items[sample] - 1
    is_target = (place > 0) & ~(is_input & last_only)
    inputs, owner = contents.items[is_input], sample[is_input]
    title_lengths = _title_lengths(texts, inputs, place[is_input], contents.num_items[owner] - 1)
    sizes = item.size + title_lengths
    head = len(texts.instruction) + num_user_tokens
    response_lengths = np.diff(contents.responses.offsets)
    num_final = item.count_final_markers(response_lengths)
    lengths = head + np.bincount(owner, sizes, minlength=len(row_of_sample)).astype(np.int64) + response_lengths + num_final
    bases = row_of_sample * row_tokens + _sum_before(lengths, row_of_sample)  # first position of each sample
    starts = bases[owner] + head + _sum_before(sizes, owner)  # of each input
    ends = bases + lengths
    response = _spans(ends - num_final - response_lengths, response_lengths)
    titles = texts.titles.flat[_spans(texts.titles.offsets[inputs], title_lengths)]
    used = _spans(bases, lengths)
    whole = {name: np.zeros(num_rows * row_tokens, dtype=np.int64) for name in ("tokens", "segments", "places")}
    whole["tokens"][bases[:, None] + np.arange(len(texts.instruction))] = texts.instruction
    whole["tokens"][_spans(starts + item.size, title_lengths)] = titles
    whole["tokens"][response] = contents.responses.flat
    whole["segments"][used] = np.repeat(_sum_before(np.ones_like(lengths), row_of_sample) + 1, lengths)
    whole["places"][used] = _count_up(lengths)
    conditions = np.empty(len(sample), dtype=np.int64)
    conditions[is_input], conditions[~is_input] = item.conditions(starts), ends - 1
    user_slots = bases[:, None] + len(texts.instruction) + np.arange(num_user_tokens)
    parts = {
        "slots": item.slots(starts),
        "item_idx": inputs,
        "latents": contents.latents[is_input],
        "markers": np.concatenate([item.markers(starts), ends[num_final > 0] - 1]),
        "targets": conditions[is_target],
        "target_idx": contents.items[is_target],
        "target_latents": contents.latents[is_target],
        "text_positions": response - 1,
        "text_labels": contents.responses.flat,
        "user_slots": user_slots[: len(contents.user_latents)],
        "user_latents": contents.user_latents,
    }
    parts |= {name: values.reshape(num_rows, row_tokens) for name, values in whole.items()}
    return PackedBatch(**{name: torch.from_numpy(values) for name, values in parts.items()})


def _title_lengths(texts: PromptTexts, inputs: np.ndarray, place: np.ndarray, num_inputs: np.ndarray) -> np.ndarray:
    """Title tokens written out after each input, as prompts.input_title_lengths has it for one sample."""
    lengths = texts.titles.lengths(inputs)
    titled = texts.config.titled_items
    return lengths if titled < 0 else np.where(place >= num_inputs - titled, lengths, 0)


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, .., start + length - 1 for each pair, end to end."""
    return np.repeat(starts, lengths) + _count_up(lengths)


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, .., length - 1 for each length, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _sum_before(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Sum of the values in front of each one inside its group; groups stand side by side."""
    before = np.cumsum(values) - values
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return before - np.repeat(before[first], np.diff(np.append(first, len(group))))

"""Shards that a training does without: what shards.max_bad_shards allows, agreed on by all ranks.

Before the first step every rank looks at its share of the shards (where they lie behind a URL, it fetches them) and all
ranks hear what was found: the plans of every epoch leave out the samples of those shards. What turns out bad later changes
no plan: its samples leave padding in their rows, so data order, steps and resumes stay what they were.
Both sets are part of the training position that a checkpoint holds; more than max_bad_shards together end the run.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from contrec_dist.config import Config
from contrec_dist.data.batches import TrainingRows
from contrec_dist.data.packed_batch import PackedBatch
from contrec_dist.errors import ArtifactError
from contrec_dist.progress import get_logger
from contrec_dist.training.checkpoint_files import TrainingPosition
from sharding.shard_files import ShardFiles
from sharding.token_writer import shard_name

CHECK_THREADS = 4


class BadShards:
    """The books on bad shards. All ranks call every method together."""

    def __init__(self, config: Config, rows: TrainingRows, device: torch.device):
        self.allowed, self.rows, self.device = config.shards.max_bad_shards, rows, device

    def agree(self, position: TrainingPosition, *, is_resumed: bool, beat: Callable[[str], None]) -> TrainingPosition:
        """Look at all shards and leave out the bad ones; a resumed run keeps to what it left out, so that its plans stay.

        Errors   ArtifactError naming every bad shard, the same on all ranks, where there are more than allowed or none is good
        """
        found = self._look(beat) if self.allowed else {}
        left_out = position.left_out_shards if is_resumed else tuple(sorted(found))
        position = replace(position, left_out_shards=left_out, bad_shards=merge(position.bad_shards, found, left_out))
        if dist.get_rank() == 0:
            for error in found.values():
                get_logger("train").warning("bad shard: %s", error)
        self._refuse_too_many(position, found)
        self.rows.left_out = frozenset(left_out)
        if left_out and dist.get_rank() == 0:
            get_logger("train").warning(
                "%d of %d bad shards allowed: no epoch has the %d samples of %s",
                len(left_out) + len(position.bad_shards), self.allowed, self.count_left_out(), _name(left_out),
            )  # fmt: skip
        return position

    def count_skipped(self, position: TrainingPosition, batches: Sequence[PackedBatch]) -> TrainingPosition:
        """Take down the samples that no rank could read for this step.

        Errors   ArtifactError naming the shards, the same on all ranks, where these are more than allowed by now
        """
        if not self.allowed:  # a bad one has raised already
            return position
        mine = torch.cat([batch.skipped_shards for batch in batches])
        total = torch.tensor([len(mine)], device=self.device)
        dist.all_reduce(total)
        if not total:
            return position
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine.unique().tolist())
        bad = merge(position.bad_shards, {shard for part in gathered for shard in part}, position.left_out_shards)
        position = replace(position, bad_shards=bad, skipped_samples=position.skipped_samples + int(total))
        self._refuse_too_many(position, {})
        return position

    def count_left_out(self) -> int:
        """Samples an epoch that are in no plan."""
        return sum(int((self.rows.sample_shard == shard).sum()) for shard in self.rows.left_out)

    def facts(self, position: TrainingPosition) -> dict:
        """For the manifest."""
        return {
            "left_out_shards": [shard_name(shard) for shard in position.left_out_shards],
            "left_out_samples_an_epoch": self.count_left_out(),
            "bad_shards": [shard_name(shard) for shard in position.bad_shards],
            "skipped_samples": position.skipped_samples,
        }

    def _look(self, beat: Callable[[str], None]) -> dict[int, str]:
        reader, rank, world_size = self.rows.reader, dist.get_rank(), dist.get_world_size()
        found = [None] * world_size
        dist.all_gather_object(found, find_bad_shards(reader.shards, range(rank, reader.num_shards, world_size), beat))
        return dict(sorted(pair for part in found for pair in part.items()))

    def _refuse_too_many(self, position: TrainingPosition, errors: dict[int, str]) -> None:
        bad = sorted({*position.left_out_shards, *position.bad_shards})
        if len(bad) <= self.allowed and (not bad or len(bad) < self.rows.reader.num_shards):
            return
        reasons = "; ".join(errors[shard] for shard in bad if shard in errors) or "the log says why"
        got = f"{len(bad)} of {self.rows.reader.num_shards} shards bad: {_name(bad)} ({reasons})"
        raise ArtifactError(self.rows.reader.folder, got, f"at most shards.max_bad_shards={self.allowed}, and a good one")


def find_bad_shards(shards: ShardFiles, numbers: Iterable[int], beat: Callable[[str], None] = str) -> dict[int, str]:
    """Those that are missing or not of their size (when they are fetched: not of their content), and what is wrong."""

    def look(shard: int) -> tuple[int, str]:
        try:
            shards.check(shard)
        except ArtifactError as error:
            return shard, str(error)
        beat(f"{shard_name(shard)} looked at")
        return shard, ""

    with ThreadPoolExecutor(CHECK_THREADS) as threads:
        return {shard: error for shard, error in threads.map(look, numbers) if error}


def merge(known: Sequence[int], found: Iterable[int], left_out: Sequence[int]) -> tuple[int, ...]:
    """Bad shards whose samples are in the plans, rising."""
    return tuple(sorted({*known, *found} - {*left_out}))


def _name(shards: Iterable[int]) -> str:
    return ", ".join(map(shard_name, shards))

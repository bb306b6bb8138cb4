"""Which piece of data lies where: pure integers, no files, no tensors, no processes.

The order of training data is a function of (seed, epoch, step) alone. Ranks take slices of a global order, so 1, 2 or 8
ranks see the same batches, and a resumed run continues where it stopped on any number of ranks.
"""

from bisect import bisect_right

import numpy as np


def shuffle_windows(num_shards: int, shards_per_window: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Permute the shards and cut them into windows; samples mix inside a window only.

    Returns arrays of shard numbers, each of at most `shards_per_window`; together they hold every shard once.
    """
    order = np.random.default_rng([seed, epoch, 0]).permutation(num_shards)
    return [order[start : start + shards_per_window] for start in range(0, num_shards, shards_per_window)]


def pack_rows(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best-fit decreasing: put samples into rows of `capacity` positions, leaving little of a row empty.

    Returns, a row, the positions in `lengths` of its samples; every sample appears once. Among samples of equal length the
    earlier one goes first, so a shuffled input gives shuffled company.
    Units    lengths and capacity in token positions
    Errors   ValueError when a sample is longer than a row
    Cost     O(samples * log(distinct lengths)), about 2 us a sample
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a sample of {lengths.max()} positions does not fit a row of {capacity}")
    order = np.argsort(lengths, kind="stable")[::-1]
    waiting: dict[int, list[int]] = {}
    for sample in order:
        waiting.setdefault(int(lengths[sample]), []).append(int(sample))
    available = sorted(waiting)
    rows = []
    while available:
        row, room = [], capacity
        while available:
            place = bisect_right(available, room) - 1
            if place < 0:
                break
            length = available[place]
            row.append(waiting[length].pop())
            room -= length
            if not waiting[length]:
                available.pop(place)
        rows.append(np.array(row, dtype=np.int64))
    return rows


def count_steps(num_rows: int, global_batch_rows: int) -> int:
    """Optimizer steps of an epoch; the last global batch is filled up with empty rows."""
    return -(-num_rows // global_batch_rows)


def rank_micro_batches(
    step: int, *, num_rows: int, global_batch_rows: int, micro_batch_rows: int, rank: int, world_size: int
) -> list[tuple[int, np.ndarray]]:
    """A rank's micro-batches of one optimizer step: (number of the micro-batch in the global batch, row numbers).

    The global batch is cut into micro-batches, whose composition does not depend on the number of ranks; rank r takes every
    world_size-th. Rows past the end of the epoch are left out, so the last arrays may be short or empty, but every rank
    gets the same number of micro-batches (collectives need equal counts).
    Errors   ValueError when global_batch_rows is no multiple of micro_batch_rows * world_size
    """
    if global_batch_rows % (micro_batch_rows * world_size):
        raise ValueError(
            f"global_batch_rows={global_batch_rows} is no multiple of micro_batch_rows * ranks = "
            f"{micro_batch_rows} * {world_size}"
        )
    micro_batches = []
    for number in range(rank, global_batch_rows // micro_batch_rows, world_size):
        start = step * global_batch_rows + number * micro_batch_rows
        micro_batches.append((number, np.arange(min(start, num_rows), min(start + micro_batch_rows, num_rows))))
    return micro_batches


def cut_windows(num_items: np.ndarray, max_targets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut long histories into windows so that every item after a user's first is a target exactly once.

    A window [start, stop) has items[start] as its first input and items[start + 1 : stop] as its targets; windows end at the
    newest item and reach back, so the newest targets have the longest histories. Users with fewer than two items have none.
    Shapes   num_items (U,) -> user (W,), start (W,), stop (W,)
    """
    num_targets = np.maximum(np.asarray(num_items, dtype=np.int64) - 1, 0)
    num_windows = -(-num_targets // max_targets)
    user = np.repeat(np.arange(len(num_targets)), num_windows)
    first = np.cumsum(num_windows) - num_windows
    place = np.arange(len(user)) - first[user]  # 0 is the newest window
    stop = num_targets[user] + 1 - place * max_targets
    start = np.maximum(stop - 1 - max_targets, 0)
    return user, start, stop


def part_ranges(total: int, per_part: int) -> list[tuple[int, int]]:
    """[start, stop) ranges of fixed size that cover range(total)."""
    return [(start, min(start + per_part, total)) for start in range(0, total, per_part)]

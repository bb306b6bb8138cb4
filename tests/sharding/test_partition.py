"""sharding/partition.py: who reads what, on grids of ranks, batches and lengths."""

from itertools import chain

import numpy as np
import pytest

from sharding.partition import (
    count_steps,
    cut_windows,
    pack_rows,
    part_ranges,
    rank_micro_batches,
    shuffle_windows,
)

RANKS = (1, 2, 3, 4, 8)


def global_batch(step, world_size, *, num_rows, global_rows, micro_rows):
    """All ranks' micro-batches of a step, in the order of their numbers."""
    parts = [
        rank_micro_batches(
            step, num_rows=num_rows, global_batch_rows=global_rows, micro_batch_rows=micro_rows, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1, "ranks must run equally many collectives"
    return sorted(chain(*parts), key=lambda part: part[0])


@pytest.mark.parametrize("num_rows", [0, 1, 23, 24, 25, 100])
@pytest.mark.parametrize("micro_rows", [1, 2, 4])
@pytest.mark.parametrize("world_size", RANKS)
def test_the_ranks_together_hold_the_same_global_batch_whatever_their_number(world_size, micro_rows, num_rows):
    global_rows = 24 * micro_rows
    sizes = {"num_rows": num_rows, "global_rows": global_rows, "micro_rows": micro_rows}
    every_row = []
    for step in range(count_steps(num_rows, global_rows)):
        together, alone = global_batch(step, world_size, **sizes), global_batch(step, 1, **sizes)
        assert [number for number, _ in together] == list(range(24))
        for (number, rows), (_, expected) in zip(together, alone):
            assert np.array_equal(rows, expected), f"micro-batch {number} depends on the number of ranks"
        every_row += np.concatenate([rows for _, rows in together]).tolist()
    assert every_row == list(range(num_rows))


def test_micro_batches_that_do_not_divide_evenly_are_refused_with_the_equation():
    with pytest.raises(ValueError, match=r"global_batch_rows=8.*3 \* 2"):
        rank_micro_batches(0, num_rows=9, global_batch_rows=8, micro_batch_rows=3, rank=0, world_size=2)


@pytest.mark.parametrize(("num_rows", "steps"), [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2)])
def test_steps_of_an_epoch_cover_the_rows(num_rows, steps):
    assert count_steps(num_rows, 8) == steps


@pytest.mark.parametrize("num_shards", [0, 1, 7, 64])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_every_shard_is_in_exactly_one_window(num_shards, window):
    windows = shuffle_windows(num_shards, window, seed=0, epoch=2)
    assert sorted(chain(*[one.tolist() for one in windows])) == list(range(num_shards))
    assert all(len(one) <= window for one in windows) and len(windows) == -(-num_shards // window)


def test_windows_are_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate(shuffle_windows(50, 4, seed, epoch)).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def random_lengths(count, capacity, seed=0):
    draw = np.random.default_rng(seed)
    return np.minimum(1 + draw.exponential(capacity / 4, count).astype(np.int64), capacity)


@pytest.mark.parametrize("count", [0, 1, 5, 300])
@pytest.mark.parametrize("capacity", [1, 10, 64, 1000])
def test_packing_holds_every_sample_once_and_no_row_overflows(count, capacity):
    lengths = random_lengths(count, capacity)
    rows = pack_rows(lengths, capacity)
    assert sorted(chain(*[row.tolist() for row in rows])) == list(range(count))
    assert all(lengths[row].sum() <= capacity and len(row) for row in rows)


def test_packing_leaves_little_empty():
    lengths = random_lengths(2000, 256)
    rows = pack_rows(lengths, 256)
    assert 1 - lengths.sum() / (len(rows) * 256) < 0.02


def test_a_sample_that_fills_a_row_stands_alone_and_a_longer_one_is_refused():
    assert [row.tolist() for row in pack_rows(np.array([3, 8, 5]), 8)] == [[1], [2, 0]]
    with pytest.raises(ValueError, match="9 positions.*row of 8"):
        pack_rows(np.array([3, 9]), 8)


def test_among_equal_lengths_the_earlier_sample_goes_first():
    assert [row.tolist() for row in pack_rows(np.full(5, 4), 8)] == [[0, 1], [2, 3], [4]]


def test_packing_does_not_modify_its_input():
    lengths = random_lengths(50, 20)
    before = lengths.copy()
    pack_rows(lengths, 20)
    assert np.array_equal(lengths, before)


@pytest.mark.parametrize("max_targets", [1, 2, 5, 100])
def test_windows_make_every_item_after_the_first_a_target_exactly_once(max_targets):
    num_items = np.array([0, 1, 2, 3, 6, 7, 11, 0, 40])
    user, start, stop = cut_windows(num_items, max_targets)
    targets = [(u, place) for u, a, b in zip(user, start, stop) for place in range(a + 1, b)]
    assert sorted(targets) == [(u, place) for u, n in enumerate(num_items) for place in range(1, n)]
    assert ((stop - start - 1 <= max_targets) & (stop - start >= 2) & (start >= 0)).all()
    assert (np.diff(user) >= 0).all()


def test_the_newest_window_is_the_longest():
    """7 targets by 3: the newest hold 3, 3 and the oldest the rest."""
    user, start, stop = cut_windows(np.array([8]), 3)
    assert list(zip(user, start, stop)) == [(0, 4, 8), (0, 1, 5), (0, 0, 2)]


@pytest.mark.parametrize("total", [0, 1, 9, 10, 11])
def test_part_ranges_cover_the_whole_once(total):
    ranges = part_ranges(total, 5)
    assert [n for start, stop in ranges for n in range(start, stop)] == list(range(total))
    assert all(0 < stop - start <= 5 for start, stop in ranges)

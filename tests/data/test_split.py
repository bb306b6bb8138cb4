"""Where histories are cut, by hand and against a slow reference."""

import numpy as np
import pytest

from contrec_dist.config import SplitConfig
from contrec_dist.data.split import draw_cold_items, fill_times, hold_out, leave_one_out, split_by_time, split_histories, time_cuts
from contrec_dist.errors import ConfigError, DataError


def test_leave_one_out_by_hand():
    split = leave_one_out(np.array([1, 2, 3, 6]))
    assert split.num_train.tolist() == [1, 2, 1, 4]
    assert split.validation_pos.tolist() == [-1, -1, 1, 4]
    assert split.test_pos.tolist() == [-1, -1, 2, 5]


def test_time_split_by_hand():
    # Ten times 0..9, cuts at 8 (validation) and 9 (test).
    lengths = np.array([4, 3, 2, 1])
    times = np.array([0, 1, 8, 9, 2, 3, 4, 5, 6, 7])
    split = split_by_time(lengths, times, 0.1, 0.1)
    assert time_cuts(times, 0.1, 0.1) == (8, 9)
    assert split.num_train.tolist() == [2, 3, 2, 1]
    assert split.validation_pos.tolist() == [2, -1, -1, -1]
    assert split.test_pos.tolist() == [3, -1, -1, -1]


def test_target_without_history_is_no_target():
    lengths, times = np.array([8, 2]), np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    split = split_by_time(lengths, times, 0.1, 0.1)
    assert split.num_train.tolist() == [8, 0]
    assert split.validation_pos.tolist() == [-1, -1]  # the user's very first item
    assert split.test_pos.tolist() == [-1, 1]


def test_time_split_equals_slow_reference_and_cuts_no_tie():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 9, size=50)
    times = np.concatenate([np.sort(rng.integers(40, size=n)) for n in lengths])
    split = split_by_time(lengths, times, 0.2, 0.2)
    first, second = time_cuts(times, 0.2, 0.2)
    start = 0
    for user, length in enumerate(lengths):
        own = times[start : start + length].tolist()
        middle = [p for p in range(length) if first <= own[p] < second and p > 0]
        late = [p for p in range(length) if own[p] >= second]
        begin = [p for p in range(length) if first <= own[p] < second]
        assert split.num_train[user] == sum(time < first for time in own)
        assert split.validation_pos[user] == (begin[0] if begin and begin[0] > 0 else -1)
        assert split.test_pos[user] == (late[0] if late and late[0] > 0 else -1)
        assert not middle or middle[0] >= split.num_train[user]
        start += length


def test_order_against_time_leaks_nothing_into_training():
    times = np.array([0, 9, 1, 2, 3, 4, 5, 6, 7, 8])
    split = split_by_time(np.array([10]), times, 0.1, 0.1)
    assert split.num_train.tolist() == [1]


def test_unknown_times_take_the_neighbours():
    lengths = np.array([3, 2])
    times, known = np.array([5, 0, 7, 0, 4]), np.array([True, False, True, False, True])
    assert fill_times(lengths, times, known).tolist() == [5, 5, 7, 4, 4]


def test_time_split_without_times_is_refused():
    with pytest.raises(DataError, match="1 users without any known time.*leave_one_out"):
        split_histories(SplitConfig(kind="time"), np.array([1, 1]), np.array([3, 0]), np.array([True, False]))


def test_ratios_that_leave_no_training_are_refused():
    with pytest.raises(ConfigError, match="split.validation_ratio"):
        split_by_time(np.array([2]), np.array([1, 2]), 0.5, 0.5)


def test_cold_items_leave_training_and_stay_as_targets():
    lengths = np.array([5, 3, 1, 2])
    items = np.array([0, 9, 1, 9, 2, 9, 9, 3, 9, 4, 5])
    stays, split = hold_out(leave_one_out(lengths), lengths, items == 9)
    assert items[stays].tolist() == [0, 1, 9, 2, 9, 3, 4, 5]
    assert split.num_train.tolist() == [2, 0, 0, 2]
    assert split.validation_pos.tolist() == [2, -1, -1, -1], "a target without an item before it is none"
    assert split.test_pos.tolist() == [3, 1, -1, -1]


def test_cold_items_are_drawn_by_the_seed():
    drawn = draw_cold_items(200, 0.05, seed=3)
    assert drawn.sum() == 10 and (drawn == draw_cold_items(200, 0.05, seed=3)).all()
    assert (drawn != draw_cold_items(200, 0.05, seed=4)).any()

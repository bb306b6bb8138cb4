"""Where every history is cut: training, validation target, test target.

The history of a target at position p is items[:p]. Training is items[:num_train], a prefix, so no target and nothing
after a target is ever trained on.

leave_one_out   the last item is the test target, the one before it the validation target; users with fewer than three
                items are all training.
time            two cuts, the same for everybody. Training is what a user did before the first cut; the validation
                target is the first interaction between the cuts, the test target the first one after the second. What
                follows a user's test target is nobody's target.

`cold_items` holds a share of the items out of training: their interactions leave the training part of every history and stay
where they are targets, or come after training.
"""

from dataclasses import dataclass

import numpy as np

from contrec_dist.config import SplitConfig
from contrec_dist.errors import ConfigError, DataError

NO_TARGET = -1


@dataclass(kw_only=True, slots=True)
class Split:
    """Shapes   all (U,) int64; a position of -1 says that the user has no such target."""

    num_train: np.ndarray
    validation_pos: np.ndarray
    test_pos: np.ndarray


def split_histories(config: SplitConfig, lengths: np.ndarray, times_ms: np.ndarray, known: np.ndarray) -> Split:
    """Cut histories by the rule that config.kind names.

    Shapes   lengths: (U,) int64; times_ms, known: (sum of lengths,), user after user
    """
    if config.kind == "leave_one_out":
        return leave_one_out(lengths)
    return split_by_time(lengths, fill_times(lengths, times_ms, known), config.validation_ratio, config.test_ratio)


def leave_one_out(lengths: np.ndarray) -> Split:
    """Last item test, second last validation; under three items all training."""
    cut = lengths >= 3
    return Split(
        num_train=np.where(cut, lengths - 2, lengths),
        validation_pos=np.where(cut, lengths - 2, NO_TARGET),
        test_pos=np.where(cut, lengths - 1, NO_TARGET),
    )


def split_by_time(lengths: np.ndarray, times_ms: np.ndarray, validation_ratio: float, test_ratio: float) -> Split:
    """Two global cuts at the (1 - validation - test) and (1 - test) quantiles of all times.

    A target without any item before it is no target. Where the order column and the time disagree, training ends at
    the first item past the cut, so training never holds an item from after the cut.

    Errors   ConfigError where the ratios leave nothing to train on; DataError where all times are equal.
    """
    if min(validation_ratio, test_ratio) < 0 or not 0 < validation_ratio + test_ratio < 1:
        got = (validation_ratio, test_ratio)
        raise ConfigError("split.validation_ratio, split.test_ratio", got, "a sum between 0 and 1")
    first_cut, second_cut = time_cuts(times_ms, validation_ratio, test_ratio)
    if not (times_ms < first_cut).any():
        raise DataError("split.kind=time", f"no interaction before the first cut ({first_cut} ms)", "times that differ")
    first = _first_position(lengths, times_ms >= first_cut)
    second = _first_position(lengths, times_ms >= second_cut)
    has_validation = (first < second) & (first > 0)
    has_test = (second < lengths) & (second > 0)
    return Split(
        num_train=first,
        validation_pos=np.where(has_validation, first, NO_TARGET),
        test_pos=np.where(has_test, second, NO_TARGET),
    )


def draw_cold_items(num_items: int, share: float, seed: int) -> np.ndarray:
    """Which items are held out of training. -> (num_items,) bool"""
    cold = np.zeros(num_items, dtype=bool)
    cold[np.random.default_rng([seed, 5]).permutation(num_items)[: round(share * num_items)]] = True
    return cold


def hold_out(split: Split, lengths: np.ndarray, is_cold: np.ndarray) -> tuple[np.ndarray, Split]:
    """Take cold interactions out of the training parts. A validation target without any item before it is none.

    Shapes   lengths (U,) int64, is_cold (sum of lengths,) bool -> which interactions stay (sum of lengths,) bool, the split then
    """
    users = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    taken = is_cold & (place < split.num_train[users])
    num_taken = np.bincount(users[taken], minlength=len(lengths))

    def shift(positions: np.ndarray) -> np.ndarray:
        moved = positions - num_taken
        return np.where((positions == NO_TARGET) | (moved == 0), NO_TARGET, moved)

    return ~taken, Split(
        num_train=split.num_train - num_taken,
        validation_pos=shift(split.validation_pos),
        test_pos=shift(split.test_pos),
    )


def time_cuts(times_ms: np.ndarray, validation_ratio: float, test_ratio: float) -> tuple[int, int]:
    """The times at which validation and test begin; equal times are never cut apart."""
    ordered = np.sort(times_ms)
    places = [round(len(ordered) * (1 - validation_ratio - test_ratio)), round(len(ordered) * (1 - test_ratio))]
    cuts = [int(ordered[place]) if place < len(ordered) else int(ordered[-1]) + 1 for place in places]
    return cuts[0], cuts[1]


def fill_times(lengths: np.ndarray, times_ms: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Give an unknown time that of the user's item before it, or of the first known one after it.

    Errors   DataError where a user has no known time at all.
    """
    users = np.repeat(np.arange(len(lengths)), lengths)
    num_known = np.bincount(users[known], minlength=len(lengths))
    if (num_known[lengths > 0] == 0).any():
        got = f"{int((num_known == 0).sum())} users without any known time"
        expected = "a time for every user (source.timestamp_column), or split.kind=leave_one_out"
        raise DataError("split.kind=time", got, expected)
    starts = np.cumsum(lengths) - lengths
    places = np.arange(len(times_ms))
    before = np.maximum.accumulate(np.where(known, places, -1))
    after = np.minimum.accumulate(np.where(known, places, len(places))[::-1])[::-1]
    return times_ms[np.where(before >= starts[users], before, after)]


def _first_position(lengths: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Per user, the position of the first True; the length where there is none."""
    starts = np.cumsum(lengths) - lengths
    places = np.append(np.where(mask, np.arange(len(mask)), len(mask)), len(mask))
    first = np.minimum.reduceat(places, starts) if len(lengths) else np.zeros(0, dtype=np.int64)
    return np.minimum(first - starts, lengths)

"""baselines/popularity.py."""

import numpy as np

from contrec_dist.baselines.popularity import recommend_popular

COUNTS = np.array([3, 9, 3, 0, 7])  # order 1, 4, 0, 2, 3


def test_most_trained_on_first_ties_by_lower_index():
    lists = recommend_popular(COUNTS, 4, np.array([1]), np.array([0, 1, 1]), mask=False)
    assert lists.tolist() == [[1, 4, 0, 2]] * 2


def test_seen_items_leave_and_the_list_is_refilled():
    seen, offsets = np.array([1, 0, 0, 1, 2, 3, 4]), np.array([0, 2, 2, 7])
    lists = recommend_popular(COUNTS, 3, seen, offsets, mask=True)
    assert lists.tolist() == [[4, 2, 3], [1, 4, 0], [-1, -1, -1]]


def test_past_the_end_is_minus_one():
    assert recommend_popular(COUNTS, 7, np.array([1]), np.array([0, 1]), mask=True).tolist() == [[4, 0, 2, 3, -1, -1, -1]]

"""Cleaning: wrong rows, k-core, repeats, order."""

import numpy as np
import pytest

from contrec_dist.data.interactions import clean_logs, k_core_mask
from contrec_dist.data.sources import read_source
from contrec_dist.errors import ConfigError, DataError


def test_k_core_by_hand():
    # u3 has one interaction; without it i3 has one; without that u2 has one; what is left is u0, u1 on i0, i1.
    users = np.array([0, 0, 1, 1, 2, 2, 3])
    items = np.array([0, 1, 0, 1, 1, 3, 3])
    assert k_core_mask(users, items, 2, 2).tolist() == [True] * 4 + [False] * 3


def test_k_core_equals_slow_reference():
    rng = np.random.default_rng(0)
    users, items = rng.integers(60, size=400), rng.integers(80, size=400)
    pairs = list(zip(users.tolist(), items.tolist()))
    kept = list(range(len(pairs)))
    while True:
        of_user, of_item = [pairs[i][0] for i in kept], [pairs[i][1] for i in kept]
        after = [i for i in kept if of_user.count(pairs[i][0]) >= 5 and of_item.count(pairs[i][1]) >= 4]
        if after == kept:
            break
        kept = after
    assert 0 < len(kept) < len(pairs)
    assert np.flatnonzero(k_core_mask(users, items, 5, 4)).tolist() == kept


def test_k_core_drops_are_counted(clean_csv):
    rows = ["u0,a,1", "u0,b,2", "u1,a,1", "u1,b,2", "u2,a,1"]
    logs = clean_csv(rows, min_user_interactions=2, min_item_interactions=2)
    assert len(logs.interactions) == 4 and logs.drops == {"k-core": 1}
    assert logs.user_ids.to_list() == ["u0", "u1"]


def test_ties_keep_the_source_order(clean_csv):
    items = [f"i{n}" for n in (5, 3, 9, 1, 7, 2, 8)]
    logs = clean_csv([f"u,{item},100" for item in items] + ["u,first,99"])
    order = [logs.item_ids[i] for i in logs.interactions["item_idx"]]
    assert order == ["first", *items]
    assert logs.item_ids.to_list() == [*items, "first"]  # numbered by first appearance, not by time


def test_order_column_beats_time_and_allows_empty_times(clean_csv):
    header = "user_id,item_id,timestamp,place"
    logs = clean_csv(["u,a,1,10", "u,b,,9", "u,c,5,2"], header, order_column="place")
    assert [logs.item_ids[i] for i in logs.interactions["item_idx"]] == ["c", "b", "a"]
    assert logs.interactions["time_known"].to_list() == [True, False, True]
    assert logs.drops == {}


def test_exact_duplicates_go_and_repeats_stay(clean_csv):
    rows = ["u,a,1", "u,b,2", "u,a,1", "u,a,3"]
    logs = clean_csv(rows, deduplicate="exact")
    assert [logs.item_ids[i] for i in logs.interactions["item_idx"]] == ["a", "b", "a"]
    assert logs.drops == {"duplicate (exact)": 1}
    assert len(clean_csv(rows, deduplicate="none").interactions) == 4


def test_first_interaction_in_time_stays(clean_csv):
    logs = clean_csv(["u,a,9", "u,b,5", "u,a,1"], deduplicate="first")
    rows = [(logs.item_ids[item], time) for _, item, time, _ in logs.interactions.iter_rows()]
    assert rows == [("a", 1000), ("b", 5000)]
    assert logs.drops == {"duplicate (first)": 1}


WRONG = ["u,a,1", ",a,1", "u,,1", "u,a,soon", "u,a,", "u,zzz,1", "u,a,2,surplus"]
REASONS = [
    "missing user id",
    "missing item id",
    "bad time",
    "bad time",
    "item not in the item file",
    "more than 3 fields",
]


def test_wrong_rows_are_counted_and_shown_with_their_lines(tmp_path, clean_csv):
    logs = clean_csv(WRONG, items=["a"], max_bad_ratio=0.9)
    bad = logs.bad["interactions"]
    assert (bad.num_rows, bad.total) == (7, 6)
    assert bad.counts["bad time"] == 2 and logs.drops["interactions: bad time"] == 2
    path = tmp_path / "interactions.csv"
    assert bad.examples == [f"{path}:{line}: {reason}" for line, reason in zip(range(3, 9), REASONS)]
    assert len(logs.interactions) == 1


def test_line_numbers_count_quoted_line_breaks_and_blank_lines(tmp_path, clean_csv):
    logs = clean_csv(["u,a,1", '"v\nw",b,1', "", "u,c,never"], max_bad_ratio=0.9)
    assert logs.bad["interactions"].examples == [f"{tmp_path / 'interactions.csv'}:6: bad time"]
    assert logs.drops == {"interactions: blank row": 1, "interactions: bad time": 1}


def test_only_ten_examples_are_kept(clean_csv):
    logs = clean_csv(["u,a,1"] + [",a,1"] * 25, max_bad_ratio=1.0)
    assert logs.bad["interactions"].total == 25 and len(logs.bad["interactions"].examples) == 10


def test_too_many_wrong_rows_fail_with_counts_and_examples(clean_csv):
    with pytest.raises(DataError) as caught:
        clean_csv(["u,a,1", "u,b,2", "u,c,never"], max_bad_ratio=0.3)
    message = str(caught.value)
    assert "1 wrong rows of 3 (1 x bad time)" in message
    assert "max_bad_ratio" in message and "interactions.csv:4: bad time" in message


def test_wrong_rows_up_to_the_ratio_pass(clean_csv):
    assert len(clean_csv(["u,a,1", "u,b,2", "u,c,never"], max_bad_ratio=0.34).interactions) == 2


def test_item_file_faults_and_repeats_are_counted(tmp_path, clean_csv):
    logs = clean_csv(["u,a,1"], items=["a", "b", "a", ""], max_bad_ratio=0.5)
    assert logs.items["item_id"].to_list() == ["a", "b"]
    assert logs.drops == {"items: missing item id": 1, "items: further row of the same item": 1}
    assert logs.bad["items"].examples == [f"{tmp_path / 'items.csv'}:5: missing item id"]


def test_nothing_left_is_an_error_that_counts(clean_csv):
    with pytest.raises(DataError, match="no interaction left after 1 x k-core"):
        clean_csv(["u,a,1"], min_user_interactions=2)


def test_min_rating_needs_a_rating(make_csv_config):
    config = make_csv_config(["u,a,1"], min_rating=3.0)
    with pytest.raises(ConfigError, match="source.min_rating"):
        clean_logs(read_source(config), config.source)


def test_ids_are_text_and_keep_leading_zeros(clean_csv):
    logs = clean_csv(["007,0042,1"])
    assert (logs.user_ids[0], logs.item_ids[0]) == ("007", "0042")

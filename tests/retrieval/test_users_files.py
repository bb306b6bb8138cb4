"""retrieval/users_files.py: every format gives the same users; what cannot be used is named with file and row, never lost."""

import numpy as np
import polars as pl
import pytest

from contrec_dist.config import Config
from contrec_dist.errors import ConfigError, DataError
from contrec_dist.manifest import run_stage
from contrec_dist.progress import get_logger
from contrec_dist.retrieval.users_files import pick_users, read_histories

HISTORIES = {"b": ["i 4", "i3", "i3"], "a": ["i1"], "c c": ["i5", "i0", "i2", "i1", "i4x", "i2"]}
ITEMS = ["i0", "i1", "i2", "i3", "i 4", "i5", "i4x"]


@pytest.fixture
def config(tmp_path) -> Config:
    """A catalogue of seven items and three users."""
    config = Config(name="toy", run_dir=str(tmp_path / "run"))
    folder = config.folder("catalog")
    folder.mkdir(parents=True)
    pl.DataFrame({"item_idx": range(7), "item_id": ITEMS}).write_parquet(folder / "items.parquet")
    pl.DataFrame({"user_idx": range(3), "user_id": ["z", "x", "y"]}).write_parquet(folder / "users.parquet")
    pl.DataFrame({
        "user_idx": range(3), "items": [[0, 1, 2], [3], [4, 5, 6]], "timestamps": [[0] * 3, [0], [0] * 3],
        "num_train": [1, 1, 1], "validation_pos": [1, -1, 1], "test_pos": [2, -1, 2],
    }).write_parquet(folder / "histories.parquet")  # fmt: skip
    for name in ("tokens/item_latents", "embeddings/items"):
        path = config.folder(f"{name}.npy")
        path.parent.mkdir()
        np.save(path, np.zeros((7, 1)))
    describe = lambda config, work: {space: {"num_items": 7} for space in config.index.spaces}  # noqa: E731
    run_stage(config, stage="index", folder="index", sections=("index",), inputs=(), build=describe)  # says what is known
    return config


def read(config, path, **changes):
    """The histories of a file by user, the rows' order, and the facts."""
    config.score.histories_file = str(path)
    named = read_histories(config, path.with_name("users.parquet"))
    users = named.users.load("next", 0, 99)
    spans = zip(users.offsets, users.offsets[1:])
    found = {user: [ITEMS[item] for item in users.items[a:b]] for user, (a, b) in zip(users.user_ids, spans)}
    assert (users.user_idx == -1).all() and (users.targets == -1).all()
    return found, named.facts


def heard(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def log(caplog):
    """What the stage says."""
    get_logger("score").addHandler(caplog.handler)
    yield caplog
    get_logger("score").removeHandler(caplog.handler)


def write_lists_as_json(path, histories):
    path.write_text("".join(pl.DataFrame({"user_id": [u], "item_ids": [i]}).write_ndjson() for u, i in histories.items()))


def write_lists_as_parquet(path, histories):
    pl.DataFrame({"user_id": list(histories), "item_ids": list(histories.values())}).write_parquet(path)


def write_rows(path, histories):
    """The users' rows alternate, each user's own in order."""
    longest = max(map(len, histories.values()))
    rows = [(user, items[n]) for n in range(longest) for user, items in histories.items() if n < len(items)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    {".csv": frame.write_csv, ".jsonl": frame.write_ndjson, ".parquet": frame.write_parquet}[path.suffix](path)


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_lists_as_json, "l.jsonl"), (write_lists_as_parquet, "l.parquet"), (write_rows, "r.csv"),
     (write_rows, "r.jsonl"), (write_rows, "r.parquet")],
)  # fmt: skip
def test_every_format_gives_the_same_histories_sorted_by_user(config, tmp_path, write, name):
    """Ids with blanks, repeats and the users' own order are kept."""
    path = tmp_path / name
    write(path, HISTORIES)
    found, facts = read(config, path)
    assert found == HISTORIES and list(found) == ["a", "b", "c c"]
    assert facts["users"] == 3 and facts["wrong_entries"] == 0


def test_lists_in_csv_are_separated_by_blanks(config, tmp_path):
    path = tmp_path / "lists.csv"
    path.write_text("when,user_id,item_ids\n1,b,i3 i1  i3\n2,a,\n")
    assert read(config, path)[0] == {"a": [], "b": ["i3", "i1", "i3"]}


def test_numbers_serve_as_ids_in_lists(config, tmp_path):
    pl.DataFrame({"item_idx": range(2), "item_id": ["7", "8"]}).write_parquet(config.folder("catalog") / "items.parquet")
    for name in ("n.parquet", "n.jsonl"):
        frame = pl.DataFrame({"user_id": [1, 2], "item_ids": [[8, 7], [7]]})
        frame.write_parquet(tmp_path / name) if name.endswith("parquet") else frame.write_ndjson(tmp_path / name)
        found, _ = read(config, tmp_path / name)
        assert {user: len(items) for user, items in found.items()} == {"1": 2, "2": 1}


def test_unknown_items_above_the_ratio_are_an_error_with_file_and_row(config, tmp_path):
    path = tmp_path / "few.csv"
    path.write_text("user_id,item_id\na,i1\na,nothing\nb,i2\n")
    with pytest.raises(DataError) as error:
        read(config, path)
    message = str(error.value)
    assert "1 of 3 entries wrong, 1 of them item ids that the catalogue does not have" in message
    assert f"'nothing' ({path}:3)" in message and "at most 1.00% wrong (source.max_bad_ratio)" in message


def test_a_few_unknown_items_are_left_out_told_and_counted(config, tmp_path, log):
    config.source.max_bad_ratio = 0.2
    path = tmp_path / "lists.jsonl"
    write_lists_as_json(path, {"a": ["i1", "nothing", "i2", "i3", "i0"], "b": ["i1"] * 9})
    found, facts = read(config, path)
    assert found == {"a": ["i1", "i2", "i3", "i0"], "b": ["i1"] * 9}
    assert facts["unknown_items"] == facts["wrong_entries"] == 1
    assert "1 of 14 entries wrong" in heard(log) and f"'nothing' ({path}:1)" in heard(log)


def test_rows_without_a_user_and_unreadable_lines_count_as_wrong(config, tmp_path):
    config.source.max_bad_ratio = 0.5
    path = tmp_path / "rows.jsonl"
    path.write_text('{"user_id": "a", "item_id": "i1"}\n{"item_id": "i2"}\nnonsense\n{"user_id": "a", "item_id": "i3"}\n')
    found, facts = read(config, path)
    assert found == {"a": ["i1", "i3"]} and facts["wrong_entries"] == 2


def test_a_user_without_a_known_item_is_kept_and_told(config, tmp_path, log):
    config.source.max_bad_ratio = 0.5
    path = tmp_path / "lists.parquet"
    write_lists_as_parquet(path, {"nobody": [], "stranger": ["nothing"], "somebody": ["i1", "i2"]})
    found, facts = read(config, path)
    assert found == {"nobody": [], "somebody": ["i1", "i2"], "stranger": []}
    assert facts["users_without_items"] == 2
    assert "2 users have no known item; they are scored with an empty history" in heard(log)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [("user_id,item_ids\na,i1\nb,i2\na,i3\n", DataError, "users with two lists: 'a' "),
     ("user,item\n1,2\n", ConfigError, "a column of"),
     ("item_ids\ni1\n", ConfigError, "a column 'user_id'"),
     ("user_id,item_id\n", DataError, "no user")],
)  # fmt: skip
def test_files_that_cannot_be_used_are_named(config, tmp_path, content, error, message):
    path = tmp_path / "wrong.csv"
    path.write_text(content)
    with pytest.raises(error) as raised:
        read(config, path)
    assert message in str(raised.value) and str(path) in str(raised.value)


def test_a_file_of_another_kind_is_refused(config, tmp_path):
    path = tmp_path / "users.txt"
    path.write_text("a")
    with pytest.raises(ConfigError, match="score.histories_file.*users.txt.*parquet"):
        read(config, path)


def pick(config, path):
    config.score.users_file = str(path)
    return pick_users(config, path.with_name("picked.parquet"))


def test_picked_users_are_the_catalogues_sorted_with_their_own_numbers_and_targets(config, tmp_path, log):
    path = tmp_path / "some.csv"
    path.write_text("user_id\nz\ny\nz\n")
    named = pick(config, path)
    users = named.users.load("test", 0, 9)
    assert users.user_ids.to_list() == ["y", "z"] and users.user_idx.tolist() == [2, 0]
    assert users.items.tolist() == [4, 5, 0, 1] and users.targets.tolist() == [6, 2]
    assert named.facts == {"users": 2, "repeated_rows": 1} and "1 rows repeat a user" in heard(log)


def test_users_that_the_catalogue_does_not_have_are_an_error_that_names_the_first_few(config, tmp_path):
    path = tmp_path / "wrong.csv"
    path.write_text("user_id\n" + "\n".join(["x", *(f"x{n}" for n in range(8))]) + "\n")
    with pytest.raises(DataError) as error:
        pick(config, path)
    message = str(error.value)
    assert "8 users that the catalogue does not have" in message and f"'x0' ({path}:3)" in message
    assert "'x4'" in message and "'x5'" not in message and "..." in message


def test_an_empty_list_of_users_is_refused(config, tmp_path):
    path = tmp_path / "none.csv"
    path.write_text("user_id\n")
    with pytest.raises(DataError, match="no user"):
        pick(config, path)

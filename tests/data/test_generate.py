"""contrec generate: rows that depend on settings alone, the shape of the data, and a pipeline that reads it."""

import re

import numpy as np
import polars as pl
import pytest

from contrec_dist.__main__ import main
from contrec_dist.config import load_config
from contrec_dist.data import generate, prepare
from contrec_dist.data.catalog import Histories, load_items
from contrec_dist.data.sources.streamed_law import StreamedLaw
from contrec_dist.data.sources.streamed_settings import StreamSettings
from contrec_dist.data.sources.streamed_titles import item_frame
from contrec_dist.errors import ArtifactError, ConfigError

SMALL = StreamSettings(num_items=300, num_users=500, mean_history=8.0, max_history=40)


@pytest.fixture(scope="module")
def law() -> StreamedLaw:
    return StreamedLaw(StreamSettings(num_items=5000, num_users=10_000))


@pytest.fixture(scope="module")
def histories(law) -> tuple[np.ndarray, np.ndarray]:
    return law.draw_histories(0, law.settings.num_users)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated") / "catalogue"
    return generate.write_catalogue(SMALL, folder, users_per_file=128).parent


def read_interactions(folder) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted((folder / "interactions").glob("*.parquet"))])


def test_rows_do_not_depend_on_the_ranges_in_which_they_are_made(written, tmp_path, monkeypatch):
    monkeypatch.setattr("contrec_dist.data.sources.streamed_law.CHUNK_USERS", 37)
    monkeypatch.setattr(generate, "ITEMS_PER_ROW_GROUP", 64)
    other = generate.write_catalogue(SMALL, tmp_path / "other", users_per_file=500).parent
    assert len(list((written / "interactions").iterdir())) == 4 and len(list((other / "interactions").iterdir())) == 1
    assert read_interactions(written).equals(read_interactions(other))
    assert pl.read_parquet(written / "items.parquet").equals(pl.read_parquet(other / "items.parquet"))


def test_same_settings_same_bytes_and_another_seed_others(written, tmp_path):
    again = generate.write_catalogue(SMALL, tmp_path / "again", users_per_file=128).parent
    for path in [*written.rglob("*.parquet")]:
        assert (again / path.relative_to(written)).read_bytes() == path.read_bytes()
    other = StreamedLaw(StreamSettings(num_items=300, num_users=500, mean_history=8.0, max_history=40, seed=1))
    assert not np.array_equal(other.draw_histories(0, 50)[1][:100], StreamedLaw(SMALL).draw_histories(0, 50)[1][:100])


def test_existing_output_is_refused_by_name_and_kept(written):
    before = (written / "config.yaml").read_bytes()
    with pytest.raises(ArtifactError, match=f"{written}.*exists"):
        generate.write_catalogue(SMALL, written)
    assert (written / "config.yaml").read_bytes() == before


def test_half_written_output_is_not_found_under_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "write_interactions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generate.write_catalogue(SMALL, tmp_path / "catalogue")
    assert not (tmp_path / "catalogue").exists()
    monkeypatch.undo()
    assert generate.write_catalogue(SMALL, tmp_path / "catalogue").is_file()  # what was left does not stand in the way
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue"]


def test_command_writes_a_config_on_which_prepare_runs(tmp_path, capsys):
    arguments = ["generate", "--output", str(tmp_path / "c"), "--num_items", "300", "--num_users", "500"]
    assert main([*arguments, "--mean_history", "8", "--max_history", "40"]) == 0
    assert str(tmp_path / "c" / "config.yaml") in capsys.readouterr().out
    config = load_config([tmp_path / "c" / "config.yaml"], [f"run_dir={tmp_path}/run"])
    manifest = prepare.run(config)
    assert manifest.facts["num_users"] == 500 and manifest.facts["num_items"] == 300
    assert manifest.facts["drops"] == {} and manifest.facts["num_test"] == 500
    lengths, items = StreamedLaw(SMALL).draw_histories(0, 500)
    read, catalog = Histories.load(config.folder("catalog")), load_items(config.folder("catalog"))
    assert read.lengths.tolist() == lengths.tolist()  # users are numbered by first appearance, in order
    assert catalog["item_id"].gather(read.items).to_list() == [f"I{item:010d}" for item in items]


def test_nobody_repeats_an_item_and_times_increase(law, histories):
    lengths, items = histories
    users = np.repeat(np.arange(len(lengths)), lengths)
    assert len(np.unique(users * law.settings.num_items + items)) == len(items)
    assert items.min() >= 0 and items.max() < law.settings.num_items
    steps = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    times = law.draw_times(0, lengths, steps, users)
    assert (np.diff(times)[np.diff(users) == 0] > 0).all()


def test_lengths_have_a_long_tail_and_the_mean_that_was_asked_for(histories):
    lengths, _ = histories
    assert lengths.min() == 5 and lengths.mean() == pytest.approx(12, rel=0.05)
    assert np.quantile(lengths, 0.99) > 4 * np.median(lengths) and lengths.max() > 100


def test_first_items_are_drawn_by_popularity(law):
    """Shares of ranges of ranks, against the integrals ln(high / low) of exponent 1, summed over families."""
    lengths, items = law.draw_histories(0, 10_000)
    _, rank = law.place_items(items[np.cumsum(lengths) - lengths])
    low = (np.arange(law.num_families) + 1) / law.num_families
    edges = np.array([0, 1, 4, 16, 65])
    sizes = -((np.arange(law.num_families) - 5000) // law.num_families)
    stops = np.minimum(edges[None, :], sizes[:, None])  # (F, edges)
    mass = np.diff(np.log(low[:, None] + stops), axis=1).sum(axis=0)
    np.testing.assert_allclose(np.histogram(rank, edges)[0] / len(rank), mass / mass.sum(), atol=0.015)


def test_popularity_falls_as_a_power_of_the_rank(law, histories):
    counts = np.sort(np.bincount(histories[1], minlength=law.settings.num_items))[::-1]
    ranks = np.arange(100, 3000)
    slope = np.polyfit(np.log(ranks), np.log(counts[100:3000]), 1)[0]
    assert -1.4 < slope < -0.8 and (counts > 0).mean() > 0.95


def test_users_stay_in_their_categories(law, histories):
    lengths, items = histories
    category = law.words_of_family[law.place_items(items)[0], 0]
    same_user = np.diff(np.repeat(np.arange(len(lengths)), lengths)) == 0
    stays = (np.diff(category) == 0)[same_user].mean()
    assert stays > 5 * ((np.bincount(category) / len(category)) ** 2).sum()


def test_the_last_item_tells_the_next_one_and_counts_of_transitions_learn_it(law, histories):
    """HR@10 of training transitions, of the same by family, and of popularity, for the last items of 2,000 users."""
    lengths, items = histories
    stops = np.cumsum(lengths)
    train = np.ones(len(items), bool)
    train[stops - 1] = False
    number = law.settings.num_items
    popularity = np.bincount(items[train], minlength=number).astype(float)
    follows = np.flatnonzero(train[1:] & (np.diff(np.repeat(np.arange(len(lengths)), lengths)) == 0))
    counts = np.zeros((number, number), dtype=np.float32)
    np.add.at(counts, (items[follows], items[follows + 1]), 1)
    last, target = items[stops[:2000] - 2], items[stops[:2000] - 1]
    top_popular = np.argsort(-popularity)[:10]
    learned = np.argpartition(-(counts[last] + 1e-4 * popularity / popularity.max()), 10, axis=1)[:, :10]
    by_popularity, by_transition = np.isin(target, top_popular).mean(), (learned == target[:, None]).any(axis=1).mean()
    assert by_popularity < 0.08 and by_transition > 3 * by_popularity


def test_titles_differ_and_name_line_and_path(law):
    frame = item_frame(law, 0, law.settings.num_items)
    assert frame["title"].n_unique() > 0.999 * len(frame) and frame["item_id"].n_unique() == len(frame)
    assert frame["category"].str.split(" > ").list.len().unique().to_list() == [3]
    line = frame["category"].str.split(" > ").list.get(2)
    assert frame.select(pl.col("title").str.contains(line, literal=True).all()).item()
    assert frame["brand"].n_unique() > 50 and 0.7 < (frame["text"] != "").mean() < 0.9


def test_successors_are_a_function_of_the_item(law):
    items, slots = np.arange(100), np.arange(100) % 20
    assert np.array_equal(law.find_successors(items, slots)[50:], law.find_successors(items[50:], slots[50:]))


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"num_items": 3}, "'--num_items': got 3, expected 20 to"),
        ({"mean_history": 2.0}, "1 <= min <= mean <= max"),
        ({"category_stickiness": 1.0}, "--category_stickiness"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        StreamSettings(**setting)

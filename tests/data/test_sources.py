"""Every source format, from tiny files made here, plain and gz."""

import datetime
import gzip
import json

import polars as pl
import pytest

from contrec_dist.config import Config
from contrec_dist.data.fields import clean_category, clean_text, parse_time_ms
from contrec_dist.data.interactions import clean_logs
from contrec_dist.data.sources import read_source, source_files
from contrec_dist.errors import ConfigError, DataError

INTERACTIONS = "user_id,item_id,timestamp\nu2,i1,20\nu1,i1,10\nu1,i2,30\n"
ITEMS = 'item_id,title,category,brand,text\ni1,"Salt &amp; Pepper",A>B|C,x,\ni2,Plain,,,\n'


def write(path, text, compressed=False, encoding="utf-8"):
    data = text.encode(encoding)
    if compressed:
        path = path.with_name(path.name + ".gz")
        data = gzip.compress(data)
    path.write_bytes(data)


def make_config(folder, kind="table", **source):
    config = Config(name="test", run_dir=str(folder / "run"))
    values = {"kind": kind, "path": str(folder), "min_user_interactions": 1, "min_item_interactions": 1, **source}
    for name, value in values.items():
        setattr(config.source, name, value)
    return config


def triples(config):
    """(user, item, seconds) in canonical order, and the item frame."""
    logs = clean_logs(read_source(config), config.source)
    rows = [
        (logs.user_ids[user], logs.item_ids[item], time // 1000)
        for user, item, time, _ in logs.interactions.iter_rows()
    ]
    return rows, logs.items


EXPECTED = [("u2", "i1", 20), ("u1", "i1", 10), ("u1", "i2", 30)]


@pytest.mark.parametrize("compressed", [False, True])
def test_csv_is_read_by_named_columns(tmp_path, compressed):
    write(tmp_path / "interactions.csv", INTERACTIONS.replace("user_id", "who"), compressed)
    write(tmp_path / "items.csv", ITEMS, compressed)
    names = {"interactions_file": "interactions.csv", "items_file": "items.csv", "user_column": "who"}
    rows, items = triples(make_config(tmp_path, **names))
    assert rows == EXPECTED
    assert items["title"].to_list() == ["Salt & Pepper", "Plain"]
    assert items["category"].to_list() == ["A > B | C", ""]


def test_csv_with_byte_order_mark_and_crlf_is_read(tmp_path):
    write(tmp_path / "interactions.csv", "\ufeff" + INTERACTIONS.replace("\n", "\r\n"))
    rows, _ = triples(make_config(tmp_path, interactions_file="interactions.csv", items_file=""))
    assert rows == EXPECTED


def test_parquet_is_read_with_native_types(tmp_path):
    times = [datetime.datetime(1970, 1, 1, 0, 0, s) for s in (20, 10, 30)]
    frame = pl.DataFrame({"user_id": [2, 1, 1], "item_id": ["a", "a", "b"], "timestamp": times})
    frame.write_parquet(tmp_path / "log.parquet")
    rows, _ = triples(make_config(tmp_path, interactions_file="log.parquet", items_file=""))
    assert rows == [("2", "a", 20), ("1", "a", 10), ("1", "b", 30)]


@pytest.mark.parametrize("compressed", [False, True])
def test_json_lines_are_read_and_nested_item_fields_joined(tmp_path, compressed):
    lines = [{"user_id": u, "item_id": i, "timestamp": t} for u, i, t in EXPECTED]
    write(tmp_path / "log.jsonl", "\n".join(json.dumps(line) for line in lines), compressed)
    item = {"item_id": "i1", "title": "T", "category": ["A", "B"], "brand": "x", "text": ["p", "q"]}
    other = {"item_id": "i2", "title": None}
    write(tmp_path / "items.jsonl", f"{json.dumps(item)}\n{json.dumps(other)}\n", compressed)
    rows, items = triples(make_config(tmp_path, interactions_file="log.jsonl", items_file="items.jsonl"))
    assert rows == EXPECTED
    assert items.row(0) == ("i1", "T", "A > B", "x", "p q")


@pytest.mark.parametrize("compressed", [False, True])
def test_movielens_dat_is_read(tmp_path, compressed):
    write(tmp_path / "ratings.dat", "1::10::5::200\n1::20::3::100\n2::10::1::50\n", compressed)
    write(tmp_path / "movies.dat", "10::Misérables, Les (1995)::Drama|Musical\n20::B::Comedy\n", compressed, "latin-1")
    rows, items = triples(make_config(tmp_path, "movielens"))
    assert rows == [("1", "20", 100), ("1", "10", 200), ("2", "10", 50)]
    assert items.row(0) == ("10", "Misérables, Les (1995)", "Drama | Musical", "", "")


def test_low_ratings_are_counted(tmp_path):
    write(tmp_path / "ratings.dat", "1::10::5::200\n1::20::3::100\n2::10::1::50\n")
    write(tmp_path / "movies.dat", "10::A::X\n20::B::Y\n")
    config = make_config(tmp_path, "movielens", min_rating=3.0)
    logs = clean_logs(read_source(config), config.source)
    assert len(logs.interactions) == 2 and logs.drops == {"rating below 3": 1}


def amazon(year):
    if year == 2023:
        flat = {"asin": "x", "rating": 5.0}
        reviews = [{"user_id": u, "parent_asin": i, "timestamp": t * 1000, **flat} for u, i, t in EXPECTED]
        lists = {"categories": ["A", "B"], "description": ["d", "e"]}
        meta = {"parent_asin": "i1", "title": "T &amp; U", "store": "S", **lists}
        other = {"parent_asin": "i2", "title": "V", "store": None, "categories": [], "description": []}
    else:
        reviews = [{"reviewerID": u, "asin": i, "overall": 5.0, "unixReviewTime": t} for u, i, t in EXPECTED]
        path = {"categories": [["A", "B"], ["C"]]} if year == 2014 else {"category": ["A", "B"], "vote": "3"}
        meta = {"asin": "i1", "title": "T &amp; U", "brand": "S", "description": "d e", **path}
        other = {"asin": "i2", "title": "V"}
    return reviews, [meta, other]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_amazon_release_is_read(tmp_path, year, compressed):
    reviews, meta = amazon(year)
    dump = repr if year == 2014 else json.dumps
    write(tmp_path / "reviews.json", "".join(json.dumps(r) + "\n" for r in reviews), compressed)
    write(tmp_path / "meta.json", "".join(dump(m) + "\n" for m in meta), compressed)
    config = make_config(tmp_path, "amazon", interactions_file="reviews.json", items_file="meta.json")
    rows, items = triples(config)
    assert rows == EXPECTED
    category = "A > B | C" if year == 2014 else "A > B"
    assert items.row(0) == ("i1", "T & U", category, "S", "d e")
    assert items.row(1) == ("i2", "V", "", "", "")


def test_python_literal_and_broken_review_lines(tmp_path):
    reviews, _ = amazon(2014)
    lines = [json.dumps(reviews[0]), repr(reviews[1]), "{broken", "", json.dumps(reviews[2])]
    write(tmp_path / "reviews.json", "\n".join(lines) + "\n")
    config = make_config(tmp_path, "amazon", interactions_file="reviews.json", items_file="", max_bad_ratio=0.5)
    logs = clean_logs(read_source(config), config.source)
    assert len(logs.interactions) == 3
    assert logs.drops == {"interactions: blank row": 1, "interactions: unreadable line": 1}
    assert logs.bad["interactions"].examples == [f"{tmp_path / 'reviews.json'}:3: unreadable line"]


def test_amazon_file_of_another_shape_is_named(tmp_path):
    write(tmp_path / "reviews.json", '{"person": 1}\n')
    with pytest.raises(DataError, match="reviews.json.*person.*reviewerID"):
        read_source(make_config(tmp_path, "amazon", interactions_file="reviews.json", items_file=""))


@pytest.mark.parametrize("compressed", [False, True])
def test_hetrec_lastfm_takes_the_first_listed_tag_row(tmp_path, compressed):
    tags = "userID\tartistID\ttagID\ttimestamp\r\n2\t52\t13\t5000000\r\n2\t52\t15\t1000000\r\n2\t63\t15\t3000000\r\n"
    write(tmp_path / "user_taggedartists-timestamps.dat", tags, compressed)
    artists = "id\tname\turl\tpictureURL\n52\tMorcheeba\thttp://a\thttp://b\n63\tEnigma\thttp://a\n"
    write(tmp_path / "artists.dat", artists, compressed)
    config = make_config(tmp_path, "hetrec_lastfm")
    rows, items = triples(config)
    assert rows == [("2", "63", 3000), ("2", "52", 5000)]
    assert items["title"].to_list() == ["Morcheeba", "Enigma"]
    drops = clean_logs(read_source(config), config.source).drops
    assert drops == {"further tag row of the same user and artist": 1}


def test_missing_file_names_key_and_what_is_there(tmp_path):
    write(tmp_path / "other.csv", INTERACTIONS)
    with pytest.raises(ConfigError, match="source.interactions_file.*absent.csv.*other.csv"):
        source_files(make_config(tmp_path, interactions_file="absent.csv"))
    with pytest.raises(ConfigError, match="source.path"):
        source_files(make_config(tmp_path / "nowhere"))


def test_missing_column_names_key_and_columns(tmp_path):
    write(tmp_path / "interactions.csv", INTERACTIONS)
    config = make_config(tmp_path, interactions_file="interactions.csv", items_file="", rating_column="stars")
    with pytest.raises(ConfigError, match="source.rating_column.*'stars'.*user_id, item_id, timestamp"):
        read_source(config)


def test_unknown_suffix_is_refused(tmp_path):
    write(tmp_path / "log.xlsx", INTERACTIONS)
    with pytest.raises(ConfigError, match="source.interactions_file.*log.xlsx.*parquet"):
        read_source(make_config(tmp_path, interactions_file="log.xlsx", items_file=""))


def test_times_in_every_unit_mean_the_same():
    second = 1_318_896_000
    for factor in (1, 10**3, 10**6, 10**9):
        column = pl.Series([str(second * factor), str((second + 1) * factor)])
        assert parse_time_ms(column).to_list() == [second * 1000, (second + 1) * 1000]
    texts = ["2011-10-18", "2011-10-18T00:00:00Z", "2011-10-18T02:00:00+02:00", "2011-10-18 00:00:00.250", "soon", None]
    expected = [second * 1000] * 3 + [second * 1000 + 250, None, None]
    assert parse_time_ms(pl.Series(texts)).to_list() == expected
    assert parse_time_ms(pl.Series(["1.5", "nan", "-3"])).to_list() == [1500, None, -3000]


def test_text_loses_html_and_runs_of_white_space():
    html = ["A &amp;amp; B&#39;s", " x\n\t y ", "P</span></span>, Q", "a < b", "one<br />two", "x&nbsp;y", None]
    assert clean_text(pl.Series(html)).to_list() == ["A & B's", "x y", "P, Q", "a < b", "one two", "x y", ""]
    assert clean_category(pl.Series(["Animation|Children's", "A>B | C", None])).to_list() == [
        "Animation | Children's",
        "A > B | C",
        "",
    ]


def test_damaged_gz_is_named(tmp_path):
    whole = gzip.compress(INTERACTIONS.encode() * 200)
    (tmp_path / "interactions.csv.gz").write_bytes(whole[:-30])
    with pytest.raises(DataError, match="interactions.csv.gz.*unreadable file"):
        read_source(make_config(tmp_path, items_file=""))


def test_header_alone_is_an_error(tmp_path):
    write(tmp_path / "interactions.csv", "user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match="no interaction left"):
        triples(make_config(tmp_path, interactions_file="interactions.csv", items_file=""))


def test_rows_before_and_after_a_long_block_keep_their_lines(tmp_path):
    lines = [json.dumps({"user_id": f"u{i}", "item_id": "a", "timestamp": i}) for i in range(2_000)]
    lines[1_500] = "{"
    write(tmp_path / "log.jsonl", "\n".join(lines))
    config = make_config(tmp_path, interactions_file="log.jsonl", items_file="")
    logs = clean_logs(read_source(config), config.source)
    assert logs.bad["interactions"].examples == [f"{tmp_path / 'log.jsonl'}:1501: unreadable line"]
    assert len(logs.interactions) == 1_999


def write_folder(tmp_path, rows, wrong=()):
    """interactions/ of one row a Parquet file; None for an item id that is missing."""
    (tmp_path / "interactions").mkdir()
    for number, (user, item, time) in enumerate(rows):
        frame = pl.DataFrame({"user_id": [user], "item_id": [None if number in wrong else item], "timestamp": [time]})
        frame.write_parquet(tmp_path / "interactions" / f"{number:03d}.parquet")
    return make_config(tmp_path, interactions_file="interactions", items_file="", max_bad_ratio=0.5)


def test_folder_of_parquet_files_is_one_table_in_the_order_of_names(tmp_path):
    config = write_folder(tmp_path, [("u2", "i1", 20), ("u1", "i1", 10), ("u1", "i2", 30)])
    assert triples(config)[0] == EXPECTED
    labels = [f"source.interactions_file/{number:03d}.parquet" for number in range(3)]
    assert list(source_files(config)) == labels  # each file counts in the stage's identity


def test_wrong_row_of_a_folder_is_found_in_its_file(tmp_path):
    config = write_folder(tmp_path, [("u2", "i1", 20), ("u1", "i1", 10), ("u1", "i2", 30)], wrong=[1])
    logs = clean_logs(read_source(config), config.source)
    (example,) = logs.bad["interactions"].examples
    assert "001.parquet row 0" in example and "missing item id" in example


def test_folder_without_parquet_files_is_named(tmp_path):
    with pytest.raises(ConfigError, match="source.interactions_file.*without \\*.parquet"):
        source_files(write_folder(tmp_path, []))

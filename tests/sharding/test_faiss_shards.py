"""sharding/faiss_shards.py: equality with brute force, files, measured recall, refusals."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from contrec_dist.config import IndexConfig
from contrec_dist.errors import ArtifactError, ConfigError, DataError
from contrec_dist.retrieval.top_k import exact_top_k
from sharding.faiss_build import extend_shards
from sharding.faiss_factory import choose_factory
from sharding.faiss_files import list_shards
from sharding.faiss_groups import move_aligned_lists
from sharding.faiss_shards import FaissShards
from sharding.faiss_tuning import find_cheapest

FLAT = IndexConfig(factory="Flat", device="cpu", recall_queries=20)


def make_vectors(num_items: int, dim: int, seed: int = 0) -> np.ndarray:
    """A third of the rows are copies of others, so that many scores tie exactly."""
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(num_items, dim)).astype(np.float32)
    copies = draw.choice(num_items, size=num_items // 3, replace=False)
    vectors[copies] = vectors[draw.choice(num_items // 20 + 1, size=len(copies))]
    return vectors


def build(vectors, folder, config=FLAT, metric="inner_product", ids=None):
    ids = np.arange(len(vectors)) if ids is None else ids
    return FaissShards.build(vectors, ids, folder, config, metric, vectors[:20])


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("num_shards", [1, 5])
@pytest.mark.parametrize("num_queries", [3, 40])  # below and above FAISS's switch to matrix products
def test_flat_shards_equal_exact_search_with_duplicates(tmp_path, metric, num_shards, num_queries):
    vectors = make_vectors(600, 12)
    queries = np.concatenate([vectors[:2], make_vectors(num_queries - 2, 12, seed=1)])
    shards = build(vectors, tmp_path, replace(FLAT, num_shards=num_shards), metric)
    expected_scores, expected_idx = exact_top_k(queries, vectors, 25, metric)
    scores, item_idx = shards.search(queries, 25)
    assert np.array_equal(item_idx, expected_idx)
    assert np.array_equal(scores, expected_scores)
    assert shards.recall == 1.0


def test_all_vectors_equal_come_back_by_rising_id(tmp_path):
    shards = build(np.ones((500, 4), np.float32), tmp_path, replace(FLAT, num_shards=3))
    _, item_idx = shards.search(np.ones((2, 4), np.float32), 7)
    assert item_idx.tolist() == [list(range(7))] * 2


def test_minus_one_past_the_end(tmp_path):
    shards = build(make_vectors(40, 4), tmp_path, replace(FLAT, num_shards=2))
    scores, item_idx = shards.search(make_vectors(3, 4), 45)
    assert (item_idx[:, 40:] == -1).all() and np.isneginf(scores[:, 40:]).all()
    assert np.array_equal(np.sort(item_idx[:, :40]), np.tile(np.arange(40), (3, 1)))


def test_ids_come_back_as_given_in_whatever_order(tmp_path):
    vectors = make_vectors(100, 6)
    ids = np.random.default_rng(3).permutation(10_000)[:100].astype(np.int64)
    shards = build(vectors, tmp_path, replace(FLAT, num_shards=3), "l2", ids)
    by_id = np.argsort(ids)
    _, rows = exact_top_k(vectors[:9], vectors[by_id], 5, "l2")
    assert np.array_equal(shards.search(vectors[:9], 5)[1], ids[by_id][rows])


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW8", "IVF8,PQ8x4fs,RFlat"])
def test_opened_index_answers_as_the_built_one_and_files_are_the_same_when_built_again(tmp_path, factory):
    vectors, config = make_vectors(600, 8), replace(FLAT, factory=factory, num_shards=2, min_recall=0.5)
    built = build(vectors, tmp_path / "a", config, "l2")
    build(vectors, tmp_path / "b", config, "l2")
    opened = FaissShards.open(tmp_path / "a", "cpu")
    for got, expected in zip(opened.search(vectors[:30], 9), built.search(vectors[:30], 9)):
        assert np.array_equal(got, expected)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (opened.num_items, opened.dim) == (600, 8)


def test_search_is_widened_until_recall_is_reached(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    shards = build(vectors, tmp_path, replace(FLAT, factory="IVF64,Flat", min_recall=0.9, num_shards=2), "l2")
    assert shards.recall >= 0.9 and 1 < shards.layout["parameters"]["nprobe"] <= 64
    queries = np.random.default_rng(1).normal(size=(50, 16)).astype(np.float32)
    expected, found = exact_top_k(queries, vectors, 10, "l2")[1], shards.search(queries, 10)[1]
    assert np.mean([np.isin(e, f).mean() for e, f in zip(expected, found)]) > 0.75


def test_recall_below_the_minimum_is_refused_with_the_figures(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(600, 32)).astype(np.float32)
    with pytest.raises(ConfigError, match=r"index.min_recall.*recall@10 0\.\d+ of 'PQ2x4'.*at least 0.95"):
        build(vectors, tmp_path, replace(FLAT, factory="PQ2x4"), "l2")
    assert not (tmp_path / "shards.json").exists()


@pytest.mark.parametrize(
    "factory", ["IVF8,Flat", "IVF8,PQ8x4fsr,RFlat", "IVF8,PQ8x4fs,Refine(SQ8)", "IVF8,SQ8", "PQ8x4fs,RFlat"]
)
def test_shards_answer_with_the_bits_and_the_recall_of_one(tmp_path, factory):
    vectors, config = make_vectors(900, 8), replace(FLAT, factory=factory, min_recall=0.7)
    one = build(vectors, tmp_path / "one", config)
    split = build(vectors, tmp_path / "split", replace(config, num_shards=5))
    assert split.layout["parameters"] == one.layout["parameters"] and split.recall == one.recall
    for got, expected in zip(split.search(vectors[::7] + 0.1, 12), one.search(vectors[::7] + 0.1, 12)):
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("factory", ["IVF32,PQ16x4fs,RFlat", "IVF32,PQ16x4fs,Refine(SQ8)", "HNSW8"])
def test_measured_recall_is_the_recall_of_the_opened_index(tmp_path, factory):
    draw = np.random.default_rng(0)
    vectors, queries = (draw.normal(size=(count, 16)).astype(np.float32) for count in (2000, 60))
    config = replace(FLAT, factory=factory, min_recall=0.8, num_shards=4)
    shards = FaissShards.build(vectors, np.arange(2000), tmp_path, config, "l2", queries)
    expected, found = exact_top_k(queries, vectors, 10, "l2")[1], shards.search(queries, 10)[1]
    recall = np.mean([np.isin(e, f).mean() for e, f in zip(expected, found)])
    assert shards.recall >= 0.8 and recall >= shards.recall - 1e-9
    if factory != "HNSW8":  # graphs are not joined: their shards look at more than was counted
        assert recall == pytest.approx(shards.recall)


def test_a_list_that_ends_with_its_block_bytes_is_joined_without_the_merge_of_faiss():
    """faiss writes beyond a list whose length is a multiple of its block's bytes, here 128; such a list must not reach it."""
    vectors, index = make_vectors(400, 8), faiss.index_factory(8, "IVF2,PQ8x4fs", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    _, list_of = index.quantizer.search(vectors, 1)
    near = [np.flatnonzero(list_of[:, 0] == number) for number in (0, 1)]
    first, second = np.concatenate([near[0][:128], near[1][:60]]), np.concatenate([near[0][128:], near[1][60:]])
    whole, one, two = (faiss.clone_index(index) for _ in range(3))
    whole.add(vectors[np.concatenate([first, second])])
    one.add(vectors[first])
    two.add(vectors[second])
    lists = {name: faiss.downcast_InvertedLists(each.invlists) for name, each in (("one", one), ("two", two))}
    assert [lists["one"].list_size(0), lists["one"].block_size] == [128, 128] and lists["two"].list_size(0) > 32
    move_aligned_lists(one, two, len(first))
    assert [lists["two"].list_size(number) for number in (0, 1)] == [0, len(near[1]) - 60]  # the other list is left to faiss
    one.merge_from(two, len(first))
    for joined in (one, whole):
        joined.nprobe = 2
    assert np.array_equal(faiss.rev_swig_ptr(lists["one"].get_ids(0), len(near[0])), np.r_[:128, 188 : 188 + len(near[0]) - 128])
    for found, wanted in zip(one.search(vectors, 400), whole.search(vectors, 400)):
        assert np.array_equal(found, wanted)


def test_the_cheapest_setting_that_reaches_the_recall_is_taken():
    ladders = {"nprobe": [1, 2, 4, 8], "k_factor_rf": [1, 2, 4, 8]}
    recall = lambda one: min(one["nprobe"], 4) * min(one["k_factor_rf"], 4) / 16  # noqa: E731
    cost = lambda one: 10 * one["nprobe"] + one["k_factor_rf"]  # noqa: E731
    assert find_cheapest(ladders, recall, cost, 0.5) == ({"nprobe": 2, "k_factor_rf": 4}, 0.5)
    assert find_cheapest(ladders, recall, lambda one: one["nprobe"] + 10 * one["k_factor_rf"], 0.5)[0] == {
        "nprobe": 4,
        "k_factor_rf": 2,
    }
    assert find_cheapest(ladders, recall, cost, 1.1) == ({"nprobe": 8, "k_factor_rf": 8}, 1.0)
    assert find_cheapest({}, lambda one: 0.5, lambda one: 0, 0.4) == ({}, 0.5)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,PQ8x4fs,RFlat", "HNSW8"])
@pytest.mark.parametrize("memory_map", [False, True])
def test_removed_ids_never_come_back_and_lists_stay_full(tmp_path, factory, memory_map):
    vectors = make_vectors(900, 8)
    built = build(vectors, tmp_path, replace(FLAT, factory=factory, num_shards=3, min_recall=0.9), "l2")
    removed = np.unique(built.search(vectors[:40], 12)[1])  # the very ones that would be found
    files = [replace(file, removed=removed) for file in list_shards(tmp_path, built.layout)]
    left = FaissShards.open_files(files, built.layout, "cpu", memory_map=memory_map)
    assert left.num_items == 900 - len(removed)
    scores, found = left.search(vectors[:40], 12)
    assert not np.isin(found, removed).any() and (found >= 0).all()
    if factory == "Flat":
        living = np.setdiff1d(np.arange(900), removed)
        expected_scores, expected_rows = exact_top_k(vectors[:40], vectors[living], 12, "l2")
        assert np.array_equal(found, living[expected_rows]) and np.array_equal(scores, expected_scores)
        assert (np.sort(left.search(vectors[:3], 900)[1][:, : len(living)]) == living).all()


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,PQ8x4fs,RFlat", "HNSW8"])
def test_a_memory_mapped_index_answers_the_same(tmp_path, factory):
    vectors = make_vectors(900, 8)
    built = build(vectors, tmp_path, replace(FLAT, factory=factory, min_recall=0.9), "l2")
    mapped = FaissShards.open(tmp_path, "cpu", memory_map=True)
    for got, expected in zip(mapped.search(vectors[:30], 11), built.search(vectors[:30], 11)):
        assert got.tobytes() == expected.tobytes()


def test_a_memory_mapped_index_does_not_hold_its_vectors(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(60_000, 64)).astype(np.float32)  # 15 MB
    build(vectors, tmp_path)
    script = (  # a process of its own: memory that this one has freed would be used again unseen
        "import psutil, sys; from pathlib import Path; from sharding.faiss_shards import FaissShards\n"
        "def grown(memory_map):\n"
        "    before = psutil.Process().memory_full_info().uss\n"
        "    held.append(FaissShards.open(Path(sys.argv[1]), 'cpu', memory_map=memory_map))\n"
        "    return psutil.Process().memory_full_info().uss - before\n"
        "held = []; print(grown(False), grown(True))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    loaded, mapped = map(int, done.stdout.split())
    assert loaded > 0.9 * vectors.nbytes and mapped < 0.25 * vectors.nbytes


def test_shards_are_written_from_a_memory_mapped_file_one_after_another(tmp_path):
    vectors = make_vectors(700, 6)
    np.save(tmp_path / "vectors.npy", vectors)
    config = replace(FLAT, factory="IVF4,Flat", num_shards=3)
    build(np.load(tmp_path / "vectors.npy", mmap_mode="r"), tmp_path / "mapped", config)
    build(vectors, tmp_path / "whole", config)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "mapped" / path.name).read_bytes(), path.name


def test_further_rows_share_the_codebook_and_are_searched_with_the_first(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(900, 8)).astype(np.float32)
    layout = build(
        vectors[:800], tmp_path / "base", replace(FLAT, factory="IVF8,PQ8x4fs,RFlat", min_recall=0.9), "l2"
    ).layout
    extended = extend_shards(
        tmp_path / "base", layout, vectors[800:], np.arange(800, 900), tmp_path / "more", num_shards=2
    )
    files = list_shards(tmp_path / "base", layout) + list_shards(tmp_path / "more", extended)
    together = FaissShards.open_files(files, layout, "cpu")
    assert together.num_items == 900
    assert np.array_equal(together.search(vectors, 1)[1][:, 0], np.arange(900))


def test_codebook_is_shared_by_the_shards(tmp_path):
    import faiss

    build(make_vectors(600, 8), tmp_path, replace(FLAT, factory="IVF4,Flat", num_shards=3), "l2")
    indexes = [faiss.read_index(str(path)) for path in sorted(tmp_path.glob("shard_*.faiss"))]
    centroids = [index.quantizer.reconstruct_n(0, 4) for index in map(faiss.downcast_index, indexes)]
    assert np.array_equal(centroids[0], centroids[1]) and np.array_equal(centroids[0], centroids[2])


def test_inputs_are_not_modified(tmp_path):
    vectors, queries = make_vectors(100, 4), make_vectors(5, 4, seed=9)
    vectors_before, queries_before = vectors.copy(), queries.copy()
    build(vectors, tmp_path, metric="l2").search(queries, 5)
    assert np.array_equal(vectors, vectors_before) and np.array_equal(queries, queries_before)


def test_nan_in_the_catalogue_is_refused_by_row(tmp_path):
    vectors = make_vectors(30, 4)
    vectors[17, 2] = np.nan
    with pytest.raises(DataError, match="vectors.*first is row 17"):
        build(vectors, tmp_path)


def test_nan_queries_wrong_width_and_k_zero_are_refused(tmp_path):
    shards = build(make_vectors(30, 4), tmp_path)
    with pytest.raises(DataError, match="queries.*first is row 1"):
        shards.search(np.array([[0, 0, 0, 0], [0, np.inf, 0, 0]], np.float32), 3)
    with pytest.raises(DataError, match=r"\(2, 5\).*\(B, 4\)"):
        shards.search(np.zeros((2, 5), np.float32), 3)
    with pytest.raises(DataError, match="k: got 0"):
        shards.search(np.zeros((2, 4), np.float32), 0)


def test_repeated_ids_are_refused_by_name(tmp_path):
    ids = np.arange(30)
    ids[20] = 7
    with pytest.raises(DataError, match="1 repeated ids, the first is 7"):
        build(make_vectors(30, 4), tmp_path, ids=ids)


def test_unknown_factory_and_too_many_shards_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="index.factory.*'Nonsense'"):
        build(make_vectors(30, 4), tmp_path, replace(FLAT, factory="Nonsense"))
    with pytest.raises(ConfigError, match="index.num_shards.*31.*1 to 30"):
        build(make_vectors(30, 4), tmp_path, replace(FLAT, num_shards=31))


def test_gpu_is_refused_where_there_is_none(tmp_path):
    import faiss

    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="index.device.*gpu"):
        build(make_vectors(30, 4), tmp_path, replace(FLAT, device="gpu"))


def test_a_torn_shard_names_its_file(tmp_path):
    build(make_vectors(60, 4), tmp_path, replace(FLAT, num_shards=2))
    path = tmp_path / "shard_000001.faiss"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ArtifactError, match="shard_000001.faiss"):
        FaissShards.open(tmp_path, "cpu")
    (tmp_path / "shards.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ArtifactError, match="format 99"):
        FaissShards.open(tmp_path, "cpu")


def test_auto_is_flat_when_small_and_scans_codes_when_big():
    assert choose_factory("auto", 12_000, 128, "l2") == "Flat"
    assert choose_factory("auto", 1_000_000, 129, "inner_product") == "IVF2048,PQ129x4fsr,RFlat"
    assert choose_factory("auto", 1_000_000, 64, "l2") == "IVF2048,PQ64x4fs,RFlat"
    assert choose_factory("HNSW32", 12, 128, "l2") == "HNSW32"


def test_auto_keeps_to_the_memory_budget():
    chosen = [choose_factory("auto", 1_000_000, 128, "l2", budget * 1_000_000) for budget in (600, 400, 250, 170)]
    assert chosen == [
        f"IVF2048,{rest}" for rest in ("PQ128x4fs,RFlat", "PQ128x4fs,Refine(SQfp16)", "PQ128x4fs,Refine(SQ8)", "SQ8")
    ]
    with pytest.raises(ConfigError, match="index.memory_bytes.*1000.*at least"):
        choose_factory("auto", 1_000_000, 128, "l2", 1000)

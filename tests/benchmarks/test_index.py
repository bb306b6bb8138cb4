"""benchmarks/index.py: the figures are of what they say, at a toy size."""

import argparse

import numpy as np
import pytest

from contrec_dist.benchmarks import index, machine
from contrec_dist.retrieval.top_k import exact_top_k


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    index.add_arguments(parser)
    small = [
        "--num_items",
        "3000",
        "--dim",
        "16",
        "--recall_queries",
        "200",
        "--exact_queries",
        "64",
        "--num_queries",
        "96",
    ]
    return parser.parse_args([*small, "--repeats", "2", "--num_shards", "3", *arguments])


def test_queries_are_near_the_vectors_and_none_of_them():
    vectors, queries = index.load_vectors(parse())
    assert vectors.shape == (3000, 16) and queries.shape == (296, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    near = exact_top_k(queries, vectors, 1)[0]
    assert 0.8 < np.median(near) < 1 and near.max() < 1
    again, _ = index.load_vectors(parse())
    assert np.array_equal(again, vectors)


def test_bf16_search_with_a_second_look_is_exact_here():
    vectors, queries = index.load_vectors(parse())
    import torch

    found = index.search_bf16(queries[:70], torch.from_numpy(vectors).bfloat16(), vectors)[1]
    assert np.array_equal(np.sort(found), np.sort(exact_top_k(queries[:70], vectors, 10)[1]))


@pytest.mark.parametrize("fast_bf16", [True, False])
def test_every_search_is_measured_against_exact_search(tmp_path, monkeypatch, fast_bf16):
    monkeypatch.setattr("contrec_dist.model.backbone.has_fast_bf16", lambda device: fast_bf16)
    monkeypatch.setitem(machine.MATMUL_SIZES, "cpu", 128)  # where bf16 is slow after all, one large product takes ten seconds
    figures = index.run(parse("--factory", "IVF16,PQ16x4fsr,RFlat", "--min_recall", "0.9", "--folder", str(tmp_path)))
    rows = figures["searches"]
    assert list(rows) == ["exact", "one shard", "3 shards", *(["bf16"] if fast_bf16 else [])]
    assert list(figures["flops_per_second"]) == ["fp32", *(["bf16"] if fast_bf16 else [])]
    assert rows["exact"]["recall"] == 1.0 and rows["one shard"]["recall"] == rows["3 shards"]["recall"] > 0.85
    for row in rows.values():
        assert row["times_exact"] == pytest.approx(row["queries_per_second"] / rows["exact"]["queries_per_second"])
    expected = rows["exact"]["queries_per_second"] * 2 * 3000 * 16 / figures["flops_per_second"]["fp32"]
    assert figures["exact_share_of_fp32"] == pytest.approx(expected)
    assert len(list((tmp_path / "split").glob("shard_*.faiss"))) == 3


def test_vectors_of_a_file_are_held_out_for_the_queries(tmp_path):
    rows = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    vectors, queries = index.load_vectors(parse("--vectors", str(tmp_path / "rows.npy")))
    assert len(vectors) + len(queries) == 500
    assert np.array_equal(np.sort(np.concatenate([vectors, queries]), axis=0), np.sort(rows, axis=0))

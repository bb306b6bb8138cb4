"""sharding/faiss_actors.py: Ray actors answer as one process does, and one that dies is no wrong answer."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import ray

from contrec_dist.config import IndexConfig
from contrec_dist.errors import ArtifactError, DataError
from sharding.faiss_actors import RayFaissShards
from sharding.faiss_files import list_shards, read_layout
from sharding.faiss_shards import FaissShards
from sharding.ray_jobs import worker_environment

CONFIG = IndexConfig(factory="Flat", device="cpu", recall_queries=20, num_shards=5, ray_actors=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("actors")
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(900, 12)).astype(np.float32)
    vectors[300:500] = vectors[:200]
    for factory in ("Flat", "IVF8,PQ12x4fs,RFlat"):
        config = replace(CONFIG, factory=factory, min_recall=0.9)
        FaissShards.build(vectors, np.arange(900), folder / factory, config, "inner_product", vectors[:30])
    return folder, vectors


def open_both(folder, ray_cluster, config=CONFIG):
    layout = read_layout(folder)
    return FaissShards.open(folder, "cpu"), RayFaissShards.open_files(
        list_shards(folder, layout), layout, config, ray_cluster
    )


def actor_process(actors: RayFaissShards, number: int) -> int:
    return ray.get(actors._actors[number].describe.remote())["process"]


def test_actors_answer_with_the_bytes_of_one_process(built, ray_cluster):
    folder, vectors = built
    threads, actors = open_both(folder / "Flat", ray_cluster)
    assert actors.num_items == threads.num_items == 900 and actors.dim == 12 and actors.recall == 1.0
    for queries, k in ((vectors[:7], 25), (vectors[250:330], 3), (vectors[:1], 1000), (vectors[:0], 4)):
        for got, expected in zip(actors.search(queries, k), threads.search(queries, k)):
            assert got.tobytes() == expected.tobytes()
    with pytest.raises(DataError, match="queries"):
        actors.search(np.full((1, 12), np.nan, np.float32), 3)
    actors.close()


def test_an_approximate_index_finds_no_less_in_actors(built, ray_cluster):
    folder, vectors = built
    threads, actors = open_both(folder / "IVF8,PQ12x4fs,RFlat", ray_cluster)
    alone, together = threads.search(vectors[:60], 10)[0], actors.search(vectors[:60], 10)[0]
    assert (together >= alone).all()  # every actor scores its own best again: more are looked at, never fewer
    actors.close()


def test_an_actor_that_is_killed_opens_its_shards_again(built, ray_cluster):
    folder, vectors = built
    threads, actors = open_both(folder / "Flat", ray_cluster)
    expected = threads.search(vectors[:40], 9)
    pid = actor_process(actors, 1)
    os.kill(pid, signal.SIGKILL)
    while os.path.exists(f"/proc/{pid}/exe"):
        time.sleep(0.01)
    for _ in range(3):
        for got, wanted in zip(actors.search(vectors[:40], 9), expected):
            assert got.tobytes() == wanted.tobytes()
    assert actor_process(actors, 1) != pid
    actors.close()


def test_processes_of_one_job_share_the_actors_of_the_same_shards(built, ray_cluster):
    folder, vectors = built
    _, actors = open_both(folder / "Flat", ray_cluster)

    def open_elsewhere(files, layout, config, workers):
        shards = RayFaissShards.open_files(files, layout, config, workers)
        described = ray.get([actor.describe.remote() for actor in shards._actors])
        return [one["process"] for one in described], shards.search(vectors[:5], 4)[1]

    elsewhere = ray.remote(open_elsewhere).options(num_cpus=0, runtime_env={"env_vars": worker_environment()})
    files = list_shards(folder / "Flat", actors.layout)
    processes, found = ray.get(elsewhere.remote(files, actors.layout, CONFIG, ray_cluster))
    assert processes == [actor_process(actors, number) for number in range(2)]
    assert np.array_equal(actors.search(vectors[:5], 4)[1], found)  # and they outlive the one that only found them
    other = list_shards(folder / "Flat", actors.layout, removed=np.arange(3))
    left = RayFaissShards.open_files(other, actors.layout, CONFIG, ray_cluster)
    assert left.num_items == 897 and actor_process(left, 0) not in processes
    for opened in (actors, left):
        opened.close()


def test_a_missing_shard_is_named(built, ray_cluster, tmp_path):
    folder, _ = built
    layout = read_layout(folder / "Flat")
    files = list_shards(folder / "Flat", layout)
    files[3] = replace(files[3], index_path=tmp_path / "gone.faiss")
    with pytest.raises(ArtifactError, match="gone.faiss"):
        RayFaissShards.open_files(files, layout, CONFIG, ray_cluster)

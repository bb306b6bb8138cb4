"""An index over machines: every Ray actor opens a range of the shards, a search goes to all and is merged.

Guarantees   the contract of top_k.py; with an exact factory the bytes of FaissShards, in any number of actors. An actor
             that dies is started again by Ray, opens its shards again and is asked again: a search answers late, never
             wrongly, and after MAX_DEATHS deaths in one search it fails by name.
Cost         queries are put into the object store once; an answer is B x k numbers an actor. The shards' files must be
             readable at the same path on every machine.

The actors of the same shards have the same names inside a Ray job: the first process that opens them starts and owns
them, the others find them. So a driver opens them before its workers do, and keeps them as long as they work.
"""

import hashlib
import os
from typing import Sequence

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from contrec_dist.config import IndexConfig, RayConfig
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import hash_json
from contrec_dist.progress import get_logger
from contrec_dist.retrieval.top_k import check_queries, empty_result, merge_top_k
from sharding.faiss_files import ShardFile
from sharding.ray_jobs import worker_environment

MAX_DEATHS = 3


class RayFaissShards:
    """A searchable catalogue whose shards lie in Ray actors. Make one with `open_files`."""

    def __init__(self, actors: list, layout: dict, num_items: int):
        self._actors, self.layout, self.num_items = actors, layout, num_items

    @classmethod
    def open_files(
        cls, files: Sequence[ShardFile], layout: dict, index: IndexConfig, workers: RayConfig
    ) -> "RayFaissShards":
        """Start the actors, spread over the machines, and wait until every shard is open.

        Errors   ArtifactError naming the file that is missing or does not fit, or that the actors cannot start
        """
        num_actors = min(index.ray_actors or _count_machines(), len(files))
        cuts = [len(files) * number // num_actors for number in range(num_actors + 1)]
        actors = [_start_actor(list(files[start:stop]), layout, index, workers) for start, stop in zip(cuts, cuts[1:])]
        try:
            num_items = sum(one["num_items"] for one in _fetch([actor.describe.remote() for actor in actors]))
        except ArtifactError:
            for actor in actors:
                ray.kill(actor)
            raise
        get_logger("index").info("search by %d Ray actors: %d shards", num_actors, len(files))
        return cls(actors, layout, num_items)

    @property
    def dim(self) -> int:
        """Q, the width of vectors and queries."""
        return self.layout["dim"]

    @property
    def recall(self) -> float:
        """Recall@10 against exact search, measured when it was built."""
        return self.layout["recall"]["value"]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of every query, by the contract of top_k.py.

        Shapes   queries (B, Q) float32 -> scores (B, k) float32, item_idx (B, k) int64
        Errors   DataError for NaN or infinity, another width, or k < 1; ArtifactError when an actor died too often.
        """
        queries = check_queries(queries, self.dim, k)
        if not len(queries):
            return empty_result(0, k)
        sent = ray.put(queries)
        return merge_top_k(_fetch([actor.search.remote(sent, k) for actor in self._actors]), k)

    def close(self) -> None:
        """End the actors. A search after that fails."""
        for actor in self._actors:
            ray.kill(actor)


class _ShardActor:
    """Lives in a worker process and holds a range of the shards, which it opens when it is first asked, and again after
    a restart: an error that its constructor raised would be known by nothing but the actor's death.
    """

    def __init__(self, files: list[ShardFile], layout: dict, device: str, memory_map: bool, num_threads: int):
        self.files, self.layout, self.num_threads = files, layout, num_threads
        self.device, self.memory_map, self.shards = device, memory_map, None

    def describe(self) -> dict:
        """Items that a search can return, and the process."""
        return {"num_items": self._open().num_items, "process": os.getpid()}

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._open().search(queries, k)

    def _open(self):
        import faiss

        from sharding.faiss_shards import FaissShards

        if self.shards is None:
            faiss.omp_set_num_threads(self.num_threads)
            self.shards = FaissShards.open_files(self.files, self.layout, self.device, memory_map=self.memory_map)
        return self.shards


def _start_actor(files: list[ShardFile], layout: dict, index: IndexConfig, workers: RayConfig):
    threads = max(1, int(workers.cpus_per_worker))
    options = {
        "num_cpus": 0,  # they work while the workers that ask them wait, which reserving CPUs could leave none
        "num_gpus": workers.gpus_per_worker if index.device != "cpu" else 0,
        "max_restarts": -1,
        "max_task_retries": MAX_DEATHS,
        "scheduling_strategy": "SPREAD",
        "name": f"contrec-index-{_hash_files(files, layout, index)}",
        "get_if_exists": True,
        "runtime_env": {"env_vars": worker_environment() | {"OMP_NUM_THREADS": str(threads)}},
    }
    return ray.remote(_ShardActor).options(**options).remote(files, layout, index.device, index.memory_map, threads)


def _hash_files(files: list[ShardFile], layout: dict, index: IndexConfig) -> str:
    """What tells an actor's shards from others'."""
    shards = [[str(one.index_path), one.num_items, hashlib.sha256(one.removed.tobytes()).hexdigest()] for one in files]
    return hash_json([shards, layout, index.device, index.memory_map])


def _count_machines() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def _fetch(references: list) -> list:
    """Answers in order; what a worker raised, as it raised it."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(
            "index", f"a search actor that died ({type(error).__name__}: {reason})", "living actors"
        ) from error

"""Which FAISS index a catalogue of some size gets, and the parameters that trade its speed for recall.

A factory is any string of faiss.index_factory. 'auto' takes, of the first that fit `memory_bytes`:

    up to 200,000 items    Flat                          every vector visited
    above                  IVFn,PQdx4fsr,RFlat           4 bits a dimension scanned in registers, the best scored again
                           IVFn,PQdx4fsr,Refine(SQfp16)  with half, or a quarter, of the bytes for that second look
                           IVFn,PQdx4fsr,Refine(SQ8)
                           IVFn,SQ8                      one byte a dimension, nothing else

with n, the lists, about 2 sqrt(N). One dimension a sub-quantiser fits every width, keeps a column that differs from the
others (the bias of item vectors) apart from them, and orders candidates well enough that few are scored again. Codes
are of what a list's centroid leaves over (fsr), which for inner products costs nothing; for L2 it would cost a table a
list, so there they are of the vectors (fs).

Search parameters: nprobe (IVF: lists visited), efSearch (HNSW: width of the walk), k_factor_rf (RFlat and Refine:
candidates scored again, per result).
"""

import math
import re

import faiss

import sharding.faiss_settings  # noqa: F401
from contrec_dist.errors import ConfigError
from contrec_dist.retrieval.top_k import Metric

FLAT_ROWS = 200_000  # up to here exact search is fast enough on a CPU
ID_BYTES = 8
MAX_EF_SEARCH = 4096
MAX_REFINE_FACTOR = 64
POINTS_PER_CENTROID = 64  # more rows move the centroids less than what recall can tell
TRAIN_ITERATIONS = 8
# Costs are bytes read one after another; a vector anywhere in memory costs as much as several times its bytes.
SCATTERED_BYTES_FACTOR = 6
LIST_OVERHEAD_BYTES = 4096


def choose_factory(factory: str, num_items: int, dim: int, metric: Metric, memory_bytes: int = 0) -> str:
    """The factory string itself, or for 'auto' the first of the module's table that fits.

    Errors   ConfigError when none fits memory_bytes (0: no limit), with the bytes of the smallest
    """
    if factory != "auto":
        return factory
    options = _auto_options(num_items, dim, metric)
    for name, num_bytes in options.items():
        if not memory_bytes or num_bytes <= memory_bytes:
            return name
    smallest = min(options.values())
    raise ConfigError(
        "index.memory_bytes", memory_bytes, f"at least {smallest} for {num_items} items of width {dim}, or 0"
    )


def count_lists(num_items: int) -> int:
    """Lists of an IVF: the power of two nearest to 2 sqrt(N)."""
    return 2 ** max(2, round(math.log2(2 * math.sqrt(num_items))))


def make_index(dim: int, factory: str, faiss_metric: int) -> faiss.Index:
    """An empty index. Raises ConfigError with FAISS's reason where it does not know the factory or the width."""
    try:
        index = faiss.index_factory(dim, factory, faiss_metric)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError("index.factory", f"'{factory}' ({reason})", f"one that FAISS makes for width {dim}") from None
    inverted = find_inverted(index)
    if inverted is not None:
        inverted.cp.niter, inverted.cp.max_points_per_centroid = TRAIN_ITERATIONS, POINTS_PER_CENTROID
    return index


def find_inverted(index: faiss.Index) -> faiss.IndexIVF | None:
    """The IVF inside an index, if there is one."""
    return faiss.try_extract_index_ivf(index)


def is_exact(factory: str) -> bool:
    """Whether a search of this factory visits every vector at full precision."""
    return factory == "Flat"


def parameter_ladders(factory: str) -> dict[str, list[int]]:
    """Search parameters that a factory has: name -> the values to try, rising."""
    ladders = {}
    lists = re.search(r"IVF(\d+)(k?)", factory)
    if lists:
        ladders["nprobe"] = _ladder(1, int(lists.group(1)) * (1024 if lists.group(2) else 1))
    if any(part.startswith("HNSW") for part in factory.split(",")):
        ladders["efSearch"] = _ladder(16, MAX_EF_SEARCH)
    if "Refine" in factory or "RFlat" in factory:
        ladders["k_factor_rf"] = _ladder(1, MAX_REFINE_FACTOR)
    return ladders


def estimate_cost(parameters: dict[str, int], factory: str, num_items: int, dim: int, num_results: int) -> float:
    """Bytes that one query reads: what tells the cheaper of two settings, the same on every machine.

    num_results: candidates that a search asks of the index
    """
    cost, code_bytes = 0.0, dim / 2 if "x4fs" in factory else 4 * dim
    if "nprobe" in parameters:
        num_lists = parameter_ladders(factory)["nprobe"][-1]
        cost += parameters["nprobe"] * (num_items / num_lists * code_bytes + LIST_OVERHEAD_BYTES)
    cost += parameters.get("efSearch", 0) * 4 * dim * SCATTERED_BYTES_FACTOR
    cost += parameters.get("k_factor_rf", 0) * num_results * 4 * dim * SCATTERED_BYTES_FACTOR
    return cost


def set_parameters(indexes: list[faiss.Index], parameters: dict[str, int]) -> None:
    """Give the search parameters to every index."""
    for index in indexes:
        for name, value in parameters.items():
            faiss.ParameterSpace().set_index_parameter(index, name, value)


def _auto_options(num_items: int, dim: int, metric: Metric) -> dict[str, int]:
    """Factories of 'auto', the preferred one first, and the bytes that the index takes when it is open."""
    lists = f"IVF{count_lists(num_items)}"
    codes = f"{lists},PQ{dim}x4fs{'r' if metric == 'inner_product' else ''}"
    shared, fixed = count_lists(num_items) * 4 * dim, 2 * ID_BYTES
    bytes_per_item = {
        "Flat": 4 * dim + ID_BYTES,
        f"{codes},RFlat": 4.5 * dim + fixed,
        f"{codes},Refine(SQfp16)": 2.5 * dim + fixed,
        f"{codes},Refine(SQ8)": 1.5 * dim + fixed,
        f"{lists},SQ8": dim + fixed + ID_BYTES,
    }
    if num_items >= FLAT_ROWS:
        del bytes_per_item["Flat"]
    return {name: int(one * num_items) + (0 if name == "Flat" else shared) for name, one in bytes_per_item.items()}


def _ladder(first: int, last: int) -> list[int]:
    """first, then about 1.4 times the one before, up to and with last."""
    values, step = [], first
    while step < last:
        values += [value for value in (step, step * 3 // 2) if value < last and value not in values]
        step *= 2
    return [*values, last]

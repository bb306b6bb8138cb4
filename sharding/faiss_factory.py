"""Which FAISS index a catalogue of some size gets, and the parameters that trade its speed for recall.

A factory is any string of faiss.index_factory. Its search parameters start small and are doubled at build time until the
measured recall is reached: nprobe (IVF: lists visited), efSearch (HNSW: width of the walk), k_factor_rf (RFlat and Refine:
candidates scored again, per result).
"""

import re

import faiss

from contrec_dist.errors import ConfigError

FLAT_ROWS = 200_000  # up to here exact search is fast enough on a CPU
MAX_EF_SEARCH = 4096
MAX_REFINE_FACTOR = 64


def choose_factory(factory: str, num_items: int) -> str:
    """The factory string itself, or for 'auto' Flat below 200,000 items and IVF with about 4 sqrt(N) lists above."""
    if factory != "auto":
        return factory
    if num_items < FLAT_ROWS:
        return "Flat"
    return f"IVF{2 ** round(2 + 0.5 * (num_items.bit_length() - 1))},Flat"


def make_index(dim: int, factory: str, faiss_metric: int) -> faiss.Index:
    """An empty index. Raises ConfigError with FAISS's reason where it does not know the factory or the width."""
    try:
        return faiss.index_factory(dim, factory, faiss_metric)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError("index.factory", f"'{factory}' ({reason})", f"one that FAISS makes for width {dim}") from None


def is_exact(factory: str) -> bool:
    """Whether a search of this factory visits every vector at full precision."""
    return factory == "Flat"


def smallest_parameters(factory: str) -> dict[str, int]:
    """Search parameters that a factory has, at their starting values."""
    return {name: start for name, (start, _) in _parameter_spans(factory).items()}


def largest_parameters(factory: str) -> dict[str, int]:
    """The same at their limits."""
    return {name: limit for name, (_, limit) in _parameter_spans(factory).items()}


def widen_parameters(factory: str, parameters: dict[str, int]) -> dict[str, int]:
    """Every parameter doubled, up to its limit."""
    return {name: min(2 * value, largest_parameters(factory)[name]) for name, value in parameters.items()}


def set_parameters(indexes: list[faiss.Index], parameters: dict[str, int]) -> None:
    """Give the search parameters to every index."""
    for index in indexes:
        for name, value in parameters.items():
            faiss.ParameterSpace().set_index_parameter(index, name, value)


def _parameter_spans(factory: str) -> dict[str, tuple[int, int]]:
    """name -> (start, limit)."""
    spans = {}
    lists = re.search(r"IVF(\d+)(k?)", factory)
    if lists:
        num_lists = int(lists.group(1)) * (1024 if lists.group(2) else 1)
        spans["nprobe"] = (max(1, num_lists // 64), num_lists)
    if any(part.startswith("HNSW") for part in factory.split(",")):
        spans["efSearch"] = (64, MAX_EF_SEARCH)
    if "Refine" in factory or "RFlat" in factory:
        spans["k_factor_rf"] = (4, MAX_REFINE_FACTOR)
    return spans

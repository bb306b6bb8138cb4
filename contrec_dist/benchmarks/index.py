"""The FAISS index at scale: exact search, the index that `auto` chooses, and that one in several shards, in one run.

Vectors are drawn unless --vectors names a .npy file: a mixture of Gaussians whose cluster sizes fall by a power law;
each cluster varies along few directions of its own (as real item vectors do, whose local dimension is 10-30 of 128),
plus noise in all directions; rows are scaled to unit length. Queries are further draws of the same mixture, none of
them in the catalogue (of a file: rows of it, held out). Recall is measured on queries that the build has not seen.

Exact search is given its own best: the product's path (FAISS, blocked fp32 products), and, on a CPU with bf16 instructions,
bf16 products by torch whose best candidates are scored again in fp32. The measured searches take turns, so that a slow
moment of the machine meets all of them.
"""

import os
import shutil
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import numpy as np

RANK, CLUSTER_SPREAD, NOISE, SIZE_EXPONENT, ITEMS_PER_CLUSTER = 24, 0.6, 0.1, 0.8, 250
K = 10
BF16_QUERIES, BF16_ROWS, BF16_GROUP, BF16_CANDIDATES = 64, 16_384, 64, 128


def add_arguments(parser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--num_items", type=int, default=1_000_000, help="vectors of the catalogue")
    parser.add_argument("--dim", type=int, default=128, help="width of a vector")
    parser.add_argument("--vectors", type=Path, help="(N, D) float32 .npy file instead of drawn vectors")
    parser.add_argument("--metric", choices=["inner_product", "l2"], default="inner_product")
    parser.add_argument("--factory", default="auto", help="index.factory")
    parser.add_argument("--memory_bytes", type=int, default=0, help="index.memory_bytes")
    parser.add_argument(
        "--min_recall", type=float, default=0.99, help="lowest recall@10 on queries that the build has not seen"
    )
    parser.add_argument("--recall_queries", type=int, default=2000, help="queries on which the build measures recall")
    parser.add_argument("--num_queries", type=int, default=8192, help="queries a timed search of an approximate index")
    parser.add_argument("--exact_queries", type=int, default=1024, help="queries a timed exact search, and for recall")
    parser.add_argument("--num_shards", type=int, default=8, help="shards of the split index")
    parser.add_argument("--repeats", type=int, default=5, help="times that each search is measured; the median counts")
    parser.add_argument("--folder", type=Path, help="where the index files go (default: a temporary folder, removed)")
    parser.add_argument("--seed", type=int, default=0)


def run(parsed) -> dict:
    """Measure and print; returns the figures."""
    from contrec_dist.progress import get_logger

    get_logger("benchmark").info("vectors")
    vectors, queries = load_vectors(parsed)
    with _folder(parsed.folder) as folder:
        figures = measure_index(parsed, vectors, queries, folder)
    print_figures(figures)
    return figures


def load_vectors(parsed) -> tuple[np.ndarray, np.ndarray]:
    """The catalogue and queries: what the build tunes on first, then what is timed. Shapes   (N, D), (P, D) float32"""
    num_queries = parsed.recall_queries + max(parsed.num_queries, parsed.exact_queries)
    if parsed.vectors is None:
        return draw_vectors(parsed.num_items, parsed.dim, num_queries, parsed.seed)
    whole = np.load(parsed.vectors, mmap_mode="r")
    held_out = np.random.default_rng(parsed.seed).permutation(len(whole))[: min(num_queries, len(whole) // 10)]
    return np.delete(whole, held_out, axis=0), np.array(whole[held_out])


def draw_vectors(num_items: int, dim: int, num_queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """See the module. Shapes   -> (N, D), (P, D) float32 of unit length"""
    draw = np.random.default_rng(seed)
    num_clusters, rank = max(1, num_items // ITEMS_PER_CLUSTER), min(RANK, dim)
    share = np.arange(1, num_clusters + 1) ** -SIZE_EXPONENT
    spectrum = np.arange(1, dim + 1) ** -0.5
    axes = np.linalg.qr(draw.standard_normal((dim, dim)))[0]
    centres = (draw.standard_normal((num_clusters, dim)) * (spectrum / np.linalg.norm(spectrum))) @ axes.T
    directions = draw.standard_normal((num_clusters, rank, dim), dtype=np.float32) / np.float32(np.sqrt(rank * dim))

    def draw_rows(count: int) -> np.ndarray:
        rows = draw.standard_normal((count, dim), dtype=np.float32) * np.float32(NOISE / np.sqrt(dim))
        cluster = draw.choice(num_clusters, size=count, p=share / share.sum())
        order = np.argsort(cluster, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(cluster[order])) + 1):
            one = cluster[members[0]]
            place = draw.standard_normal((len(members), rank), dtype=np.float32) @ directions[one]
            rows[members] += centres[one].astype(np.float32) + np.float32(CLUSTER_SPREAD) * place
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return draw_rows(num_items), draw_rows(num_queries)


def measure_index(parsed, vectors: np.ndarray, queries: np.ndarray, folder: Path) -> dict:
    """Build the three indexes, check their recall, time them in turns."""
    import torch

    from contrec_dist.benchmarks.machine import matmul_flops_per_second
    from contrec_dist.model.backbone import has_fast_bf16

    cut = min(parsed.recall_queries, len(queries) // 2)  # a file may hold few
    tune_queries, queries = queries[:cut], queries[cut:]
    few = queries[: parsed.exact_queries]
    flat, flat_facts = build_index(parsed, vectors, tune_queries, folder / "flat", "Flat", 1)
    one, one_facts = build_index(parsed, vectors, tune_queries, folder / "one", parsed.factory, 1)
    split, split_facts = build_index(parsed, vectors, tune_queries, folder / "split", parsed.factory, parsed.num_shards)
    searches = {"exact": lambda: flat.search(few, K), "one shard": lambda: one.search(queries, K)}
    searches |= {f"{parsed.num_shards} shards": lambda: split.search(queries, K)}
    precisions = {"fp32": torch.float32}
    if parsed.metric == "inner_product" and has_fast_bf16(torch.device("cpu")):
        precisions["bf16"] = torch.bfloat16
        searches["bf16"] = lambda: search_bf16(few, bf16_vectors, vectors)
        bf16_vectors = torch.from_numpy(np.ascontiguousarray(vectors)).bfloat16()
    answers, seconds = {}, {name: [] for name in searches}
    rates = {name: [] for name in precisions}
    for _ in range(parsed.repeats):
        for name, dtype in precisions.items():
            rates[name].append(matmul_flops_per_second(dtype, repeats=3))
        for name, search in searches.items():
            started = time.perf_counter()
            answers[name] = search()[1]
            seconds[name].append(time.perf_counter() - started)
    facts = {"exact": flat_facts, "one shard": one_facts, f"{parsed.num_shards} shards": split_facts, "bf16": {}}
    rows = {name: describe_search(facts[name], answers[name], answers["exact"], seconds[name]) for name in searches}
    return compare(parsed, vectors, rows, {name: statistics.median(values) for name, values in rates.items()})


def build_index(parsed, vectors, queries, folder: Path, factory: str, num_shards: int):
    """A saved and opened index, and what building it took."""
    from contrec_dist.config import IndexConfig
    from contrec_dist.progress import get_logger
    from sharding.faiss_shards import FaissShards

    get_logger("benchmark").info("building %s in %d shards", factory, num_shards)
    config = IndexConfig(factory=factory, num_shards=num_shards, device="cpu", memory_bytes=parsed.memory_bytes)
    # The build sees other queries than the measurement: a margin of two standard errors of their share.
    config.min_recall = (
        parsed.min_recall + 2 * (parsed.min_recall * (1 - parsed.min_recall) / (K * len(queries))) ** 0.5
    )
    few = queries[:64] if factory == "Flat" else queries
    started, before = time.perf_counter(), _memory_bytes()
    shards = FaissShards.build(vectors, np.arange(len(vectors)), folder, config, parsed.metric, few)
    return shards, {
        "factory": shards.layout["factory"],
        "parameters": shards.layout["parameters"],
        "build_seconds": time.perf_counter() - started,
        "recall_at_build": shards.recall,
        "file_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "memory_bytes": max(0, _memory_bytes() - before),
    }


def describe_search(facts: dict, found: np.ndarray, wanted: np.ndarray, seconds: list[float]) -> dict:
    """Figures of one search."""
    from sharding.faiss_tuning import measure_recall

    median = statistics.median(seconds)
    return {
        **facts,
        "recall": measure_recall(wanted, found[: len(wanted)]),
        "queries_per_second": len(found) / median,
        "seconds": [round(one, 4) for one in seconds],
    }


def compare(parsed, vectors: np.ndarray, rows: dict[str, dict], rates: dict[str, float]) -> dict:
    """Put the figures beside each other and beside what the machine can do."""
    flops_per_query = 2 * vectors.shape[0] * vectors.shape[1]
    exact, split = rows["exact"], rows[f"{parsed.num_shards} shards"]
    baseline = max(("exact", "bf16"), key=lambda name: rows.get(name, {"queries_per_second": 0})["queries_per_second"])
    for row in rows.values():
        row["times_exact"] = row["queries_per_second"] / exact["queries_per_second"]
        row["times_best_exact"] = row["queries_per_second"] / rows[baseline]["queries_per_second"]
    return {
        "num_items": len(vectors),
        "dim": vectors.shape[1],
        "metric": parsed.metric,
        "vectors": str(
            parsed.vectors
            or f"mixture: rank {RANK}, spread {CLUSTER_SPREAD}, noise {NOISE}, sizes ~ r^-{SIZE_EXPONENT}"
        ),
        "flops_per_second": rates,
        "exact_share_of_fp32": exact["queries_per_second"] * flops_per_query / rates["fp32"],
        "best_exact": baseline,
        "split_share_of_one": split["queries_per_second"] / rows["one shard"]["queries_per_second"],
        "searches": rows,
    }


def search_bf16(queries: np.ndarray, bf16_vectors, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inner products in bf16, the best 128 scored again in fp32: as fast as exact search gets here, exact but for luck.

    Whole score rows are too many to sort: the best groups of 64 rows by their maximum, then the best rows of these.
    """
    import torch

    found, scores = [], []
    num_rows = len(vectors) - len(vectors) % BF16_GROUP
    for start in range(0, len(queries), BF16_QUERIES):
        piece = torch.from_numpy(queries[start : start + BF16_QUERIES])
        products = torch.empty(len(piece), len(vectors), dtype=torch.bfloat16)
        left = piece.bfloat16()
        for first in range(0, len(vectors), BF16_ROWS):
            span = slice(first, first + BF16_ROWS)
            torch.mm(left, bf16_vectors[span].T, out=products[:, span])
        groups = products[:, :num_rows].view(len(piece), -1, BF16_GROUP)
        best = groups.amax(-1).topk(min(BF16_CANDIDATES, groups.shape[1])).indices
        rows = (best[:, :, None] * BF16_GROUP + torch.arange(BF16_GROUP)).flatten(1)
        rows = torch.cat([rows, torch.arange(num_rows, len(vectors)).expand(len(piece), -1)], dim=1)
        rows = rows.gather(1, products.gather(1, rows).topk(min(BF16_CANDIDATES, rows.shape[1])).indices)
        again = torch.einsum("bcd,bd->bc", torch.from_numpy(vectors[rows.numpy()]), piece)
        values, place = again.topk(min(K, rows.shape[1]))
        scores.append(values.numpy())
        found.append(rows.gather(1, place).numpy())
    return np.concatenate(scores), np.concatenate(found)


def print_figures(figures: dict) -> None:
    """The table that is read."""
    from rich.console import Console
    from rich.table import Table

    title = f"{figures['num_items']} vectors x {figures['dim']}, {figures['metric']}, recall@{K}"
    table = Table(title=title)
    for column in "search|factory|parameters|recall|queries/s|x exact|x best exact|build s|MB".split("|"):
        table.add_column(column)
    for name, row in figures["searches"].items():
        parameters = " ".join(f"{key}={value}" for key, value in row.get("parameters", {}).items())
        table.add_row(
            name, row.get("factory", "matmul"), parameters, f"{row['recall']:.4f}", f"{row['queries_per_second']:.0f}",
            f"{row['times_exact']:.1f}", f"{row['times_best_exact']:.1f}", f"{row.get('build_seconds', 0):.1f}",
            f"{row.get('file_bytes', 0) / 1e6:.0f}",
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    rates = figures["flops_per_second"]
    products = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {name}" for name, rate in rates.items())
    console.print(
        f"matrix products: {products}; exact search at "
        f"{figures['exact_share_of_fp32']:.0%} of fp32; split shards at {figures['split_share_of_one']:.0%} of one"
    )


@contextmanager
def _folder(named: Path | None) -> Iterator[Path]:
    folder = named or Path(tempfile.mkdtemp(prefix="contrec_index_"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if named is None:
            shutil.rmtree(folder)


def _memory_bytes() -> int:
    """Memory of this process now."""
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss

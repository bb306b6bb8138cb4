"""Users a second of TIGER's beam search: the peer of a query search, at any size of catalogue, with the same backbone.

Floor: the histories through the backbone alone, which every method that reads them with this backbone pays. What the beam search
adds is (levels - 1) * width tokens a user. Weights are random unless a run is named; they have no effect on the work.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Sequence

import numpy as np

from contrec_dist.config import BackboneConfig, ShapeConfig


def synthetic_decoder(
    num_items: int,
    shape: ShapeConfig,
    *,
    max_history: int,
    beam_width: int = 20,
    batch_users: int = 128,
    num_levels: int = 3,
    num_codes: int = 256,
    seed: int = 0,
    precision: str = "auto",
):
    """A TigerDecoder over random semantic ids, with random weights, on a GPU where torch sees one."""
    import torch

    from contrec_dist.baselines.tiger.decoder import TigerDecoder
    from contrec_dist.baselines.tiger.semantic_ids import SemanticIds
    from contrec_dist.baselines.tiger.sequence_model import SequenceModel

    learned = np.random.default_rng(seed).integers(0, num_codes, (num_items, num_levels))
    ids = SemanticIds.from_learned(learned, num_codes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SequenceModel(BackboneConfig(shape=shape, precision=precision), ids)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return TigerDecoder(model, ids, max_history=max_history, beam_width=beam_width, batch_users=batch_users)


def draw_histories(num_items: int, num_users: int, items_per_user: int, seed: int = 0) -> list[np.ndarray]:
    """Histories of one length, items drawn evenly."""
    return list(np.random.default_rng([seed, 1]).integers(0, num_items, (num_users, items_per_user)))


def measure_decoder(decoder, histories: Sequence[np.ndarray], k: int, *, repeats: int = 3) -> dict:
    """Users a second, medians of `repeats` passes over all histories after one that is not counted.

    Returns {"users_per_second", "floor_users_per_second": reading alone, "times_the_floor", "beam_width", "k", ...}
    """
    whole = _median_seconds(lambda: decoder.recommend(histories, k), decoder, repeats)
    floor = _median_seconds(lambda: _read_alone(decoder, histories, k), decoder, repeats)
    return {
        "users": len(histories),
        "items": len(decoder.ids.codes),
        "beam_width": max(decoder.beam_width, k),
        "k": k,
        "users_per_second": len(histories) / whole,
        "floor_users_per_second": len(histories) / floor,
        "times_the_floor": whole / floor,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, help="YAML of a run whose TIGER is finished; else random ids and weights")
    parser.add_argument("--items", type=int, default=1_000_000, help="items of the catalogue")
    parser.add_argument("--users", type=int, default=512, help="users a pass")
    parser.add_argument("--history", type=int, default=20, help="items of a history")
    parser.add_argument("--beam", type=int, default=20, help="beam width, and items a user")
    parser.add_argument("--batch", type=int, default=128, help="users a batch")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own")
    parser.add_argument("--repeats", type=int, default=3, help="passes, of which the median counts")
    parser.add_argument("--hidden-size", type=int, default=ShapeConfig().hidden_size, help="width of the backbone")
    parser.add_argument("--layers", type=int, default=ShapeConfig().num_layers, help="layers of the backbone")


def run(parsed: argparse.Namespace) -> dict:
    """Measure and print. Errors   ContRecError of a run that is not finished"""
    import torch
    from rich.console import Console

    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    decoder = _open_run(parsed) if parsed.run else _make(parsed)
    histories = draw_histories(len(decoder.ids.codes), parsed.users, parsed.history)
    figures = measure_decoder(decoder, histories, parsed.beam, repeats=parsed.repeats) | {"threads": torch.get_num_threads()}
    Console().print(
        f"TIGER, {figures['items']:,} items, histories of {parsed.history}, beam {figures['beam_width']}, "
        f"{figures['threads']} threads: {figures['users_per_second']:.1f} users/s; reading alone "
        f"{figures['floor_users_per_second']:.1f} users/s; {figures['times_the_floor']:.2f} times the floor",
        soft_wrap=True,
    )
    return figures


def _make(parsed: argparse.Namespace):
    shape = ShapeConfig(hidden_size=parsed.hidden_size, num_layers=parsed.layers, intermediate_size=3 * parsed.hidden_size)
    return synthetic_decoder(
        parsed.items, shape, max_history=parsed.history, beam_width=parsed.beam, batch_users=parsed.batch
    )


def _open_run(parsed: argparse.Namespace):
    from contrec_dist.baselines.tiger.baseline import load_recommender
    from contrec_dist.config import load_config

    config = load_config([parsed.run], [f"tiger.beam_width={parsed.beam}", f"tiger.batch_users={parsed.batch}"])
    return load_recommender(config, config.folder("baselines/tiger"))


def _read_alone(decoder, histories: Sequence[np.ndarray], k: int) -> None:
    for _, tokens, lengths in decoder.batches(histories):
        decoder.read(tokens, lengths, max(decoder.beam_width, k))


def _median_seconds(work, decoder, repeats: int) -> float:
    """Median of `repeats` runs after one that warms up."""
    import torch

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if decoder.model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])

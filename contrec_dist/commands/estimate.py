"""`contrec estimate --config FILE [--ranks N] [--stage S | --all]`: memory of a training rank, before anything runs.

What the data decides is read from the run's tokens/ where precompute has been; --num_items, --mean_history and
--num_tokenizer_words say it where it has not, or something else. training/memory.py holds the formula, its sources and limits.
"""

import argparse
import warnings

from contrec_dist.config import Config

QUANTILES = 64
"training samples whose lengths stand for all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Ranks, stage and device of the run, and the sizes of its data."""
    parser.add_argument("--ranks", type=int, help="ranks over all machines (default: launch.num_ranks)")
    stages = parser.add_mutually_exclusive_group()
    stages.add_argument("--stage", type=int, choices=[0, 1, 2, 3], help="ZeRO stage (default: zero.stage)")
    stages.add_argument("--all", action="store_true", help="a column for each ZeRO stage")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="where the ranks will run (default: as this machine has it)")
    parser.add_argument("--num_items", type=int, help="items of the catalogue (default: of the run's tokens)")
    parser.add_argument("--mean_history", type=int, help="items of a training sample (default: as in the run's tokens)")
    parser.add_argument("--num_tokenizer_words", type=int, help="entries of the text tokenizer (default: as the config says)")


def run(config: Config, parsed: argparse.Namespace) -> int:
    """Print the table. Errors   ConfigError when nothing says how large the catalogue is"""
    import torch

    from contrec_dist.training.memory import estimate_memory

    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)  # PEFT's call

    ranks = parsed.ranks or config.launch.num_ranks
    stages = [0, 1, 2, 3] if parsed.all else [config.zero.stage if parsed.stage is None else parsed.stage]
    on_gpu = parsed.device == "gpu" if parsed.device else torch.cuda.is_available()
    sizes = data_sizes(config, parsed)
    _print_table(estimate_memory(config, sizes, ranks=ranks, stages=stages, on_gpu=on_gpu), config, ranks, on_gpu)
    return 0


def data_sizes(config: Config, parsed: argparse.Namespace):
    """What the run's tokens/ says, and what the arguments say instead.

    Errors   ConfigError when there are no tokens and no --num_items
    """
    from contrec_dist.errors import ConfigError
    from contrec_dist.training.dry_step import DataSizes

    tokens = config.folder("tokens")
    there = (tokens / "manifest.json").is_file()
    if not there and parsed.num_items is None:
        raise ConfigError("--num_items", "nothing", f"the items of the catalogue, as long as there is no {tokens}")
    if parsed.mean_history or not there:
        samples = (parsed.mean_history or config.prompt.max_history,)
    else:
        samples = _sample_items(config)
    num_items = parsed.num_items or _count_rows(tokens / "item_latents.npy")
    words = parsed.num_tokenizer_words or config.backbone.shape.vocab_size
    return DataSizes(num_items=num_items, vocab_size=words, sample_items=samples)


def _count_rows(path) -> int:
    import numpy as np

    return len(np.load(path, mmap_mode="r"))


def _sample_items(config: Config) -> tuple[int, ...]:
    """Items of training samples, short to long, as they are spread in the run's tokens."""
    import numpy as np
    import polars as pl

    from sharding.partition import cut_windows

    num_train = pl.read_parquet(config.folder("tokens") / "index.parquet")["num_train"].to_numpy()
    _, start, stop = cut_windows(num_train, config.prompt.max_history)
    lengths = np.sort(stop - start)
    return tuple(int(one) for one in lengths[np.linspace(0, len(lengths) - 1, min(QUANTILES, len(lengths))).astype(int)])


def _print_table(estimates: list, config: Config, ranks: int, on_gpu: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    train = config.train
    where = "GPU memory" if on_gpu else "resident memory (CPU)"
    table = Table(title=f"{where} of a rank, MB: {ranks} ranks, {train.micro_batch_rows} rows x {train.row_tokens} positions")
    table.add_column("", no_wrap=True)
    for estimate in estimates:
        table.add_column(f"ZeRO {estimate.stage}", justify="right")
    names = dict.fromkeys(name for estimate in estimates for name in estimate.parts)
    megabytes = lambda size: f"{size / 1e6:,.0f}"  # noqa: E731
    for name in names:
        table.add_row(name, *(megabytes(one.parts[name]) if name in one.parts else "" for one in estimates))
    table.add_section()
    table.add_row("at its peak", *(megabytes(one.bytes) for one in estimates), style="bold")
    table.add_row("which is in the", *(one.phase for one in estimates))
    Console().print(table)

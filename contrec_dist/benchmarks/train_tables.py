"""Figures of the training benchmark from what its ranks wrote, and their tables: rich on the terminal, then Markdown."""

import statistics
import sys
from io import StringIO

from rich.console import Console
from rich.table import Table

from contrec_dist.benchmarks.machine import processor_name
from contrec_dist.config import Config

FILE_WIDTH = 180
RATES = ("tokens_per_second", "targets_per_second", "padding_share", "data_wait_share", "flops_per_second")
MAX_PADDING_SHARE, MAX_WAIT_SHARE, MIN_PEER_RATIO, MAX_HEAD_SHARE = 0.03, 0.02, 15.0, 0.15


def summarise(records: dict[str, list[dict]], config: Config) -> dict:
    """records: job key -> every rank's figures. Rates are sums over the ranks, medians over the repeats."""
    figures = {"dataset": config.dataset, "train": [], "packing": {}, "head": {}}
    for key, ranks in records.items():
        kind, _, rest = key.partition(":")
        if kind == "train":
            name, stage, num_ranks = rest.rsplit(":", 2)
            figures["train"].append({"config": name, "zero_stage": int(stage), "ranks": int(num_ranks), **_join_ranks(ranks)})
        elif kind == "peer":
            figures["peer"] = dict(ranks[0])
        else:
            figures[kind][rest] = ranks[0]
    _divide_by_best_rate(figures["train"])
    if "peer" in figures:
        figures["peer"] |= _compare_with_peer(figures, config)
    figures["goals"] = _judge(figures)
    return figures


def _join_ranks(ranks: list[dict]) -> dict:
    """One measured training: what all ranks did together."""
    first, repeats = ranks[0], []
    for blocks in zip(*(rank["blocks"] for rank in ranks)):
        seconds = blocks[0]["seconds"]
        total = {name: sum(block[name] for block in blocks) for name in ("positions", "tokens", "targets")}
        repeats.append({
            "seconds": seconds,
            **total,
            "tokens_per_second": total["tokens"] / seconds,
            "targets_per_second": total["targets"] / seconds,
            "padding_share": 1 - total["tokens"] / total["positions"],
            "data_wait_share": max(block["waited_seconds"] for block in blocks) / seconds,
            "flops_per_second": sum(sum(block["flops"].values()) for block in blocks) / seconds,
        })  # fmt: skip
    medians = {name: statistics.median(one[name] for one in repeats) for name in RATES}
    machine = sum(rank["matmul_flops_per_second"] for rank in ranks)
    parts = {name: sum(rank["blocks"][0]["flops"][name] for rank in ranks) for name in first["blocks"][0]["flops"]}
    told = ("precision", "device", "threads", "parameters", "trained_parameters", "micro_batch_rows", "global_batch_rows", "row_tokens")
    return {
        **medians,
        "machine_flops_per_second": machine,
        "peak_bytes": [rank["peak_bytes"] for rank in ranks],
        "start_bytes": [rank["start_bytes"] for rank in ranks],
        "flop_shares": {name: value / sum(parts.values()) for name, value in parts.items()},
        "repeats": repeats,
        **{name: first[name] for name in told},
    }


def _divide_by_best_rate(trained: list[dict]) -> None:
    """MFU: over the machine's best rate of matrix products in this run, so that a slow moment of it flatters no config."""
    for one in trained:
        same = [other for other in trained if (other["ranks"], other["precision"]) == (one["ranks"], one["precision"])]
        one["mfu"] = one["flops_per_second"] / max(other["machine_flops_per_second"] for other in same)


def _compare_with_peer(figures: dict, config: Config) -> dict:
    """Our targets/s over the peer's, at the config's ZeRO stage (else the last one): of one process, and of all ranks measured."""
    first = figures["train"][0]["config"] if figures["train"] else None
    ours = [one for one in figures["train"] if one["config"] == first]
    staged = [one for one in ours if one["zero_stage"] == config.zero.stage] or ours[-1:]
    ratios = {one["ranks"]: one["targets_per_second"] / figures["peer"]["targets_per_second"] for one in staged}
    return {"our_zero_stage": staged[0]["zero_stage"] if staged else None, "ratio_by_ranks": {str(n): r for n, r in ratios.items()}}


def _judge(figures: dict) -> list[dict]:
    """Every goal with the worst figure that was measured for it."""
    goals = []
    padding = {name: one["padding_share"] for name, one in figures["packing"].items()}
    if padding:
        goals.append(("padding of an epoch, worst data set", max(padding.values()), MAX_PADDING_SHARE, "below"))
    if figures["train"]:
        goals.append(("waiting for data, worst config", max(one["data_wait_share"] for one in figures["train"]), MAX_WAIT_SHARE, "below"))
    ratios = figures.get("peer", {}).get("ratio_by_ranks")
    if ratios:
        goals.append(("targets/s over the paper's scheme, least", min(ratios.values()), MIN_PEER_RATIO, "at least"))
    for name, one in figures["head"].items():
        goals.append((f"diffusion head's share of a step, {name} size", one["share"], MAX_HEAD_SHARE, "at most"))
    return [
        {"goal": text, "measured": found, "wanted": f"{sense} {limit:g}",
         "met": found >= limit if sense == "at least" else found < limit if sense == "below" else found <= limit}
        for text, found, limit, sense in goals
    ]  # fmt: skip


def print_tables(figures: dict) -> None:
    """All tables twice: for the eye, and as Markdown for a document."""
    tables = [table for table in _tables(figures) if table[2]]
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    for title, columns, rows in tables:
        console.print(_rich_table(title, columns, rows))
    print()
    for title, columns, rows in tables:
        print(markdown_table(title, columns, rows))


def _tables(figures: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    return [_train_table(figures), _packing_table(figures), _peer_table(figures), _head_table(figures), _goal_table(figures)]


def _train_table(figures: dict):
    columns = [
        "config", "ZeRO", "ranks", "rows x positions", "tokens/s", "targets/s", "padding", "data wait", "peak memory a rank",
        "GFLOP/s", "machine GFLOP/s", "MFU",
    ]  # fmt: skip
    rows = [
        [
            one["config"], str(one["zero_stage"]), str(one["ranks"]), f"{one['micro_batch_rows']} x {one['row_tokens']}",
            f"{one['tokens_per_second']:,.0f}", f"{one['targets_per_second']:,.0f}", _percent(one["padding_share"]),
            _percent(one["data_wait_share"]), f"{max(one['peak_bytes']) / 2**20:,.0f} MiB",
            f"{one['flops_per_second'] / 1e9:,.1f}", f"{one['machine_flops_per_second'] / 1e9:,.0f}", _percent(one["mfu"]),
        ]
        for one in figures["train"]
    ]  # fmt: skip
    first = figures["train"][0] if figures["train"] else {}
    what = f"{first.get('precision', '')} on {_device_name(first)}"
    return f"Training, {figures['dataset']}, {what}", columns, rows


def _device_name(first: dict) -> str:
    if first.get("device") == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return processor_name()


def _packing_table(figures: dict):
    rows = [
        [name, f"{one['samples']:,}", f"{one['rows']:,}", str(one["row_tokens"]), _percent(one["padding_share"])]
        for name, one in figures["packing"].items()
    ]
    return "Packing of an epoch", ["data set", "samples", "rows", "positions a row", "padding"], rows


def _peer_table(figures: dict):
    peer = figures.get("peer")
    if peer is None:
        return "", [], []
    rows = [[f"paper's scheme, batch {size}", f"{one['targets_per_second']:,.1f}", ""] for size, one in peer["by_batch_size"].items()]
    for ranks, ratio in peer["ratio_by_ranks"].items():
        rate = ratio * peer["targets_per_second"]
        rows.append([f"ours, ZeRO-{peer['our_zero_stage']}, {ranks} rank(s)", f"{rate:,.0f}", f"{ratio:,.1f}"])
    return f"One target a padded prompt of {peer['prompt_tokens']:,}", ["scheme", "targets/s", "ratio to its best"], rows


def _head_table(figures: dict):
    rows = [
        [name, str(one["width"]), str(one["num_blocks"]), str(one["batch_mul"]), str(one["max_targets"]), _percent(one["share"]),
         f"{_percent(one['share_least'])} .. {_percent(one['share_most'])}", _percent(one["processor_share"])]
        for name, one in figures["head"].items()
    ]  # fmt: skip
    columns = ["size", "width", "blocks", "noise draws", "targets at most", "share of a step", "range", "of processor time"]
    return "Diffusion head", columns, rows


def _goal_table(figures: dict):
    rows = [[one["goal"], f"{one['measured']:.3g}", one["wanted"], "yes" if one["met"] else "NO"] for one in figures["goals"]]
    return "Goals", ["", "measured", "wanted", "met"], rows


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}%"


def _rich_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table that a document can take in as it is."""
    text = StringIO()
    text.write(f"**{title}**\n\n")
    text.write("| " + " | ".join(columns) + " |\n")
    text.write("|" + "---|" + "---:|" * (len(columns) - 1) + "\n")
    for row in rows:
        text.write("| " + " | ".join(row) + " |\n")
    return text.getvalue()

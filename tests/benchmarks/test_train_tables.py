"""benchmarks/train_tables.py: rates of several ranks, medians, the comparison with the peer, and the goals."""

import pytest

from contrec_dist.benchmarks.train_tables import markdown_table, print_tables, summarise
from contrec_dist.config import Config


def rank(seconds, waited, targets, rate=100.0):
    """What one rank wrote: a block for each entry."""
    blocks = [
        {"seconds": s, "waited_seconds": w, "positions": 100, "tokens": 90, "targets": t, "flops": {"backbone": 30.0, "head": 10.0}}
        for s, w, t in zip(seconds, waited, targets)
    ]
    told = {
        "precision": "float32", "device": "cpu", "threads": 1, "parameters": 5, "trained_parameters": 5,
        "micro_batch_rows": 2, "global_batch_rows": 4, "row_tokens": 25,
    }  # fmt: skip
    return {"blocks": blocks, "peak_bytes": 2**20, "start_bytes": 2**19, "matmul_flops_per_second": rate, **told}


@pytest.fixture
def records():
    """One training on two ranks in three repeats, and everything else."""
    head = {"width": 8, "num_blocks": 2, "batch_mul": 4, "max_targets": 0, "share": 0.2, "share_least": 0.1, "share_most": 0.3,
            "processor_share": 0.2, "step_seconds": 1.0}  # fmt: skip
    peer = {"targets_per_second": 0.5, "batch_size": 4, "padding_share": 0.9, "prompt_tokens": 1024,
            "by_batch_size": {"4": {"targets_per_second": 0.5, "rates": [0.5]}}}  # fmt: skip
    padding = {"padding_share": 0.04, "samples": 10, "rows": 3, "row_tokens": 25}
    ranks = [rank([1.0, 2.0, 4.0], [0.0, 0.1, 0.0], [10, 10, 10]), rank([1.1, 2.1, 4.1], [0.05, 0.0, 0.4], [6, 6, 6])]
    return {"train:a:3:2": ranks, "packing:toy": [padding], "peer": [peer], "head:config": [head]}


def test_rates_are_sums_over_ranks_and_medians_over_repeats(records):
    figures = summarise(records, Config(name="toy"))["train"][0]
    assert (figures["config"], figures["zero_stage"], figures["ranks"]) == ("a", 3, 2)
    assert figures["targets_per_second"] == 16 / 2.0 and figures["tokens_per_second"] == 180 / 2.0
    assert figures["padding_share"] == pytest.approx(0.1)
    assert figures["data_wait_share"] == 0.05  # of .05, .05 and .1: the rank that waited longest decides
    assert figures["flops_per_second"] == 80 / 2.0
    assert figures["mfu"] == pytest.approx(40 / 200) and figures["machine_flops_per_second"] == 200
    assert figures["flop_shares"] == {"backbone": 0.75, "head": 0.25}


def test_mfu_is_taken_of_the_best_rate_of_the_run(records):
    slow = [dict(one, matmul_flops_per_second=25) for one in records["train:a:3:2"]]
    figures = summarise(records | {"train:a:2:2": slow, "train:a:2:1": slow}, Config(name="toy"))["train"]
    assert [one["mfu"] for one in figures] == pytest.approx([40 / 200, 40 / 200, 40 / 50])


def test_the_peer_is_compared_at_the_stage_of_the_config(records):
    records["train:a:0:2"] = [rank([1.0], [0.0], [100]), rank([1.0], [0.0], [100])]
    peer = summarise(records, Config(name="toy"))["peer"]
    assert peer["our_zero_stage"] == 3 and peer["ratio_by_ranks"] == {"2": 16.0}


def test_goals_are_judged_by_the_worst_figure(records):
    goals = {one["goal"]: one for one in summarise(records, Config(name="toy"))["goals"]}
    met = {name.split(",")[0]: one["met"] for name, one in goals.items()}
    assert met == {
        "padding of an epoch": False, "waiting for data": False, "targets/s over the paper's scheme": True,
        "diffusion head's share of a step": False,
    }  # fmt: skip


def test_tables_are_printed_for_the_eye_and_as_markdown(records, capsys):
    print_tables(summarise(records, Config(name="toy")))
    printed = capsys.readouterr().out
    assert "| a | 3 | 2 | 2 x 25 | 90 | 8 | 10.00% | 5.00% | 1 MiB | 0.0 | 0 | 20.00% |" in printed
    assert "| ours, ZeRO-3, 2 rank(s) | 8 | 16.0 |" in printed and "┃" in printed


def test_a_part_that_was_not_measured_has_no_table(records, capsys):
    print_tables(summarise({"packing:toy": records["packing:toy"]}, Config(name="toy")))
    printed = capsys.readouterr().out
    assert "Packing" in printed and "Training" not in printed and "scheme" not in printed and "head" not in printed


def test_markdown_has_a_row_a_line_and_numbers_to_the_right():
    assert markdown_table("T", ["a", "b"], [["x", "1"]]) == "**T**\n\n| a | b |\n|---|---:|\n| x | 1 |\n"

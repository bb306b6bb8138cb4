"""ablation/figures.py and table.py: paired intervals by hand, rows that are not comparable, and what the tables say."""

import json

import numpy as np
import pytest
from rich.console import Console

from contrec_dist.ablation.figures import Judged, describe_figures
from contrec_dist.ablation.table import print_records, write_tables

USERS = ["a", "b", "c", "d"]


def judged(hits: list[float], users=None, targets=None) -> Judged:
    users = users or [f"u{number}" for number in range(len(hits))]
    values = {"hr@10": np.array(hits), "ndcg@10": np.array(hits) / 2}
    return Judged(users=users, targets=targets or [f"i{user}" for user in users], values=values)


def test_the_paired_interval_of_one_better_user_in_four_by_hand():
    """Differences 1, 0, 0, 0: the resampled mean is a binomial of 4 draws with p = 1/4, divided by 4. P(0) = .316 holds the
    2.5% quantile; P(<= 2/4) = .949 and P(<= 3/4) = .996, so the 97.5% quantile is 3/4."""
    figures = describe_figures(judged([1, 1, 0, 0]), judged([0, 1, 0, 0]), seed=0)
    assert figures["hr@10"]["difference"] == {"value": 0.25, "low": 0.0, "high": 0.75}
    assert figures["ndcg@10"]["difference"] == {"value": 0.125, "low": 0.0, "high": 0.375}
    assert figures["hr@10"]["value"] == 0.5 and figures["num_users"] == 4


def test_equal_lists_have_no_difference_however_few_users_there_are():
    """Unpaired, two samples of four users would differ by up to 1."""
    own = describe_figures(judged([1, 0, 1, 0]), judged([1, 0, 1, 0]), seed=3)["hr@10"]
    assert own["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert own["high"] - own["low"] > 0.5


def test_a_row_that_is_worse_has_a_negative_difference():
    assert describe_figures(judged([0, 0]), judged([1, 1]), seed=0)["hr@10"]["difference"] == {"value": -1, "low": -1, "high": -1}


@pytest.mark.parametrize("other", [{"users": ["a", "b", "c", "x"]}, {"users": USERS, "targets": list("wxyz")}])
def test_other_users_or_targets_are_not_compared(other):
    figures = describe_figures(judged([1, 1, 1, 1], USERS), judged([0, 0, 0, 0], **other), seed=0)
    assert figures["hr@10"]["difference"] is None and figures["hr@10"]["value"] == 1
    assert describe_figures(judged([1.0]), None, seed=0)["hr@10"]["difference"] is None


def record(name: str, **more) -> dict:
    return {"row": name, "about": f"about {name}", "change": {}, "rank_by": "query", **more}


def done(name: str, hits: list[float], **more) -> dict:
    figures = {part: describe_figures(judged(hits), judged([0, 1, 0, 0]), seed=0) for part in more.pop("parts", ["validation"])}
    return record(name, status="done", seconds={"train": 872.4, "score": 9.9}, taken_over=more.pop("taken", {}), **figures, **more)


RECORDS = [
    done("base", [0, 1, 0, 0], taken={"model": "the base's run"}),
    done("no_mask", [1, 1, 0, 0], change={"tokenizer.mask_ratio": 0.0}),
    record("vq", status="failed", error="config key 'x': got 1, expected 2"),
    record("rq", status="not run"),
]


def test_the_files_hold_every_row_with_its_status(tmp_path):
    write_tables(RECORDS, tmp_path, title="beauty: ablation")
    told = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["status"] for row in told["rows"]] == ["done", "done", "failed", "not run"]
    assert told["rows"][1]["validation"]["hr@10"]["difference"]["high"] == 0.75 and told["seen"] == "masked"
    text = (tmp_path / "ablation.md").read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "0.5000 [0.0000, 1.0000]" in lines["no_mask"] and "+0.2500 [+0.0000, +0.7500]" in lines["no_mask"]
    assert lines["no_mask"].endswith("| 872 | 10 |") and lines["base"].endswith("| (872) | 10 |")
    assert "+" not in lines["base"]  # it is not compared with itself
    assert "failed" in lines["vq"] and "not run" in lines["rq"]
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1  # a table
    assert "- **no_mask**: about no_mask (`tokenizer.mask_ratio=0.0`)" in text and "Failed: config key 'x'" in text
    assert "test" not in text.splitlines()[2]


def test_test_figures_stand_beside_the_validation_ones_where_they_were_asked_for(tmp_path):
    records = [done("base", [0, 1, 0, 0], parts=["validation", "test"]), record("rq", status="not run")]
    write_tables(records, tmp_path, title="toy")
    head = (tmp_path / "ablation.md").read_text().splitlines()[2]
    assert "HR@10 validation" in head and "HR@10 test" in head and "NDCG@10 test" in head


def test_the_terminal_shows_the_rows_and_the_errors(tmp_path):
    console = Console(width=240, record=True)
    print_records(RECORDS, tmp_path, title="toy", console=console)
    shown = console.export_text()
    assert all(name in shown for name in ("base", "no_mask", "not run", str(tmp_path / "ablation.md")))
    assert "vq failed: config key 'x': got 1, expected 2" in shown

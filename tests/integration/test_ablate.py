"""`contrec ablate` end to end on the toy catalogue: rows by the real stages, one of them trained, one failing; twice."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from launched import copy_run, file_hashes, write_config

from contrec_dist.__main__ import STAGES, main
from contrec_dist.config import Config
from contrec_dist.manifest import MANIFEST_NAME, WRITTEN_BY, Manifest
from contrec_dist.progress import get_logger
from contrec_dist.retrieval.current_index import open_current

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

ROWS = {
    "base": "# nothing\n{}\n",
    "broken": "# no latent at all\ntokenizer:\n  latent_dim: 0\n",
    "guided": "# scores again\nscore: {rank_by: samples, guidance: 2.0, text_weights: [0.0], users_per_part: 150}\n",
    "left_out": "# not asked for\nseed: 1\n",
    # Every switch that rows need, in one training: no text anywhere, marked items, quantised tokens that are trained on, the last
    # target alone.
    "switched": """# everything
embed: {text_dim: 0}
tokenizer: {kind: rq, num_codes: 8, num_levels: 2}
prompt: {item_layout: marked, instruction: "", titled_items: 0, response_drop: 1.0}
loss: {lm: 0.0}
head: {latents: trained}
train: {targets: last, num_epochs: 1, learning_rate: 0.03}
score: {reasoning: none, users_per_part: 150}
""",
}
CHOSEN = "base,broken,guided,switched"


class Messages(logging.Handler):
    """What the stages say; `launches` counts trainings."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, line: logging.LogRecord) -> None:
        self.lines.append(f"{line.name} {line.getMessage()}")

    @property
    def launches(self) -> int:
        return sum("contrec.train starting" in line for line in self.lines)


def ablate(config: Config, folder: Path, *more: str) -> tuple[int, Messages]:
    messages, log = Messages(), get_logger("ablate").parent
    log.addHandler(messages)
    try:
        path = write_config(config, folder / "base.yaml")
        code = main(["ablate", "--config", str(path), "--configs", str(folder / "rows"), *more])
    finally:
        log.removeHandler(messages)
    return code, messages


@pytest.fixture(scope="module")
def ablated(reference, tmp_path_factory):
    """The config of a finished run, the command's exit code and what it said."""
    folder = tmp_path_factory.mktemp("ablation")
    config = copy_run(reference[0], replace(reference[0], run_dir=str(folder / "run")), *WRITTEN_BY)
    config = replace(config, launch=replace(config.launch, num_ranks=1))
    (folder / "rows").mkdir()
    for name, text in ROWS.items():
        (folder / "rows" / f"{name}.yaml").write_text(text)
    code, messages = ablate(config, folder, "--rows", CHOSEN)
    return config, folder, code, messages


def records(config: Config) -> dict[str, dict]:
    told = json.loads((config.folder("ablation") / "ablation.json").read_text())
    return {row["row"]: row for row in told["rows"]}


def row_config(config: Config, name: str) -> Config:
    return replace(config, run_dir=str(config.folder("ablation") / name))


def test_rows_run_fail_and_wait_as_they_should(ablated):
    config, _, code, messages = ablated
    rows = records(config)
    assert code == 1  # of the broken one; those after it were run
    states = {name: row["status"] for name, row in rows.items()}
    assert states == {"base": "done", "broken": "failed", "guided": "done", "left_out": "not run", "switched": "done"}
    assert "tokenizer.latent_dim" in rows["broken"]["error"]
    assert any("row broken: config key 'tokenizer.latent_dim'" in line for line in messages.lines)


def test_only_what_a_row_changes_is_built(ablated):
    config, _, _, messages = ablated
    rows = records(config)
    assert messages.launches == 1
    assert set(rows["base"]["taken_over"]) == set(WRITTEN_BY)
    assert set(rows["guided"]["taken_over"]) == set(WRITTEN_BY) - {"recommendations", "report"}
    assert rows["switched"]["taken_over"] == {"catalog": "the base's run"}
    for folder in WRITTEN_BY:  # whatever the rows built, the base's run is what it was
        file_hashes(config, folder)


def test_every_row_is_a_complete_run_of_the_real_stages(ablated):
    config, *_ = ablated
    for name in ("base", "guided", "switched"):
        own = row_config(config, name)
        assert {Manifest.load(own.folder(folder)).stage for folder in WRITTEN_BY} == set(STAGES)
        assert (own.folder("report") / "report.html").is_file()
    used = Manifest.load(row_config(config, "switched").folder("model")).config["train"]
    assert used["targets"] == "last" and used["num_epochs"] == 1


def test_latents_that_training_turned_are_what_is_indexed(ablated):
    """head.latents: trained. The tokens of the row stay, the model has its own, and its index finds every item at those."""
    row = row_config(ablated[0], "switched")
    own, tokens = (np.load(row.folder(name) / "item_latents.npy") for name in ("model", "tokens"))
    mean, std = (np.load(row.folder("tokens") / f"latent_{name}.npy") for name in ("mean", "std"))
    lengths = [np.linalg.norm(((latents - mean) / std).reshape(len(latents), -1), axis=1) for latents in (own, tokens)]
    np.testing.assert_allclose(*lengths, rtol=1e-4)
    moved = np.square((own - tokens) / std).sum((1, 2))
    index, points = open_current(row, ["latent"]), ((own - mean) / std).reshape(len(own), -1).astype(np.float32)
    distances, _ = index.spaces["latent"].search(points, 1)
    assert np.abs(distances).max() < 1e-3 < np.median(moved) / 4, "the index holds other latents than the model's"
    assert np.array_equal(index.latents[np.arange(len(own))], own)


def test_figures_are_those_of_the_stage_evaluate(ablated):
    config, *_ = ablated
    for name in ("base", "guided", "switched"):
        row, metrics = records(config)[name], json.loads((row_config(config, name).folder("report") / "metrics.json").read_text())
        for figure in ("hr@10", "ndcg@10"):
            assert row["validation"][figure]["value"] == pytest.approx(metrics["validation"][figure])
            difference = row["validation"][figure]["difference"]
            assert difference["low"] <= difference["value"] <= difference["high"]
        assert "test" not in row and set(row["seconds"]) == {"train", "score"}


def test_a_second_start_builds_nothing_and_says_the_same(ablated):
    config, folder, *_ = ablated
    stamps = lambda: {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob(MANIFEST_NAME)}  # noqa: E731
    before, told = stamps(), (config.folder("ablation") / "ablation.json").read_bytes()
    code, messages = ablate(config, folder, "--rows", CHOSEN)
    assert code == 1 and messages.launches == 0
    assert stamps() == before and (config.folder("ablation") / "ablation.json").read_bytes() == told


def test_test_users_are_looked_at_when_asked_for(ablated):
    config, folder, *_ = ablated
    code, _ = ablate(config, folder, "--rows", "base,switched", "--test")
    row = records(config)["switched"]
    metrics = json.loads((row_config(config, "switched").folder("report") / "metrics.json").read_text())
    assert code == 0 and row["test"]["ndcg@10"]["value"] == pytest.approx(metrics["test"]["ndcg@10"])
    assert "HR@10 test" in (config.folder("ablation") / "ablation.md").read_text()

"""ablation/run.py: what happens around the rows when one of them ends otherwise than well. The stages are those of others."""

from pathlib import Path

import pytest

from contrec_dist.ablation import run as run_module
from contrec_dist.ablation.rows import load_rows
from contrec_dist.config import load_config
from contrec_dist.errors import DataError, StageStopped
from contrec_dist.training.stop import stop_file


@pytest.fixture
def base_and_rows(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("base", "first", "second"):
        (folder / f"{name}.yaml").write_text("{}\n")
    settings = ["name=toy", f"run_dir={tmp_path / 'run'}"]
    return load_config([], settings), load_rows(folder, [], settings)


def run_with(monkeypatch, base_and_rows, failures: dict[str, Exception]):
    """Run all rows with a pipeline that does nothing, or raises; what run_rows returns and the rows that were begun."""
    begun = []

    def pipeline(config, before_stage):
        begun.append(Path(config.run_dir).name)
        if begun[-1] in failures:
            raise failures[begun[-1]]

    monkeypatch.setattr(run_module, "run_pipeline", pipeline)
    base, rows = base_and_rows
    return lambda: run_module.run_rows(base, rows, rows, with_test=False, title="toy"), begun


def test_rows_after_a_failing_one_are_run_and_every_error_is_told(monkeypatch, base_and_rows):
    failures = {"base": DataError("file.csv", "2 lines", "3 lines"), "first": ValueError("not ours")}
    run, begun = run_with(monkeypatch, base_and_rows, failures)
    records, errors = run()
    assert begun == ["base", "first", "second"]
    assert errors == {"base": "file.csv: got 2 lines, expected 3 lines", "first": "ValueError: not ours"}
    assert [record["status"] for record in records] == ["failed", "failed", "not run"]  # the last one has written nothing
    assert "ValueError: not ours" in (Path(base_and_rows[0].run_dir) / "ablation" / "ablation.md").read_text()


def test_a_row_that_was_asked_to_stop_ends_the_command(monkeypatch, base_and_rows):
    run, begun = run_with(monkeypatch, base_and_rows, {"first": StageStopped("asked to", 7)})
    with pytest.raises(StageStopped) as stopped:
        run()
    assert begun == ["base", "first"] and stopped.value.exit_code == 7


def test_the_stop_file_of_the_bases_run_ends_the_command_between_rows(monkeypatch, base_and_rows):
    run, begun = run_with(monkeypatch, base_and_rows, {})
    Path(base_and_rows[0].run_dir).mkdir()
    stop_file(base_and_rows[0]).touch()
    with pytest.raises(StageStopped, match="stopped before row base"):
        run()
    assert begun == [] and not stop_file(base_and_rows[0]).exists()

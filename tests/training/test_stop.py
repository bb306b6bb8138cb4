"""Being asked to stop, between the stages and before any: the rest of training/stop.py runs in tests/integration."""

import pytest

from contrec_dist import __main__ as command_line
from contrec_dist.config import Config, LaunchConfig
from contrec_dist.errors import ConfigError, StageStopped
from contrec_dist.training.stop import remove_stop_file, stop_file


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(name="test", run_dir=str(tmp_path), launch=LaunchConfig(requeue_exit_code=75))


def test_a_stop_file_stops_the_pipeline_before_the_next_stage_and_is_removed(config, monkeypatch):
    made = []

    def run_stage(name, config):
        made.append(name)
        if name == "tokenize":
            stop_file(config).touch()  # somebody does, while the stage is at work

    monkeypatch.setattr(command_line, "run_stage_by_name", run_stage)
    with pytest.raises(StageStopped, match="stopped before precompute; run the same command again") as stopped:
        command_line.run_pipeline(config)
    assert stopped.value.exit_code == 75 and made == ["prepare", "embed", "tokenize"]
    assert not stop_file(config).exists() and not remove_stop_file(config)
    made.clear()
    monkeypatch.setattr(command_line, "run_stage_by_name", lambda name, config: made.append(name))
    command_line.run_pipeline(config)
    assert made == list(command_line.STAGES)


def test_the_command_ends_with_the_code_of_the_stop(config):
    stop_file(config).touch()
    assert command_line.main(["pipeline", f"run_dir={config.run_dir}", "name=test", "launch.requeue_exit_code=75"]) == 75
    stop_file(config).touch()
    assert command_line.main(["pipeline", f"run_dir={config.run_dir}", "name=test"]) == 0


@pytest.mark.parametrize("code", [1, -1, 256])
def test_the_code_of_a_stop_cannot_be_taken_for_a_failure(code):
    with pytest.raises(ConfigError, match="launch.requeue_exit_code"):
        LaunchConfig(requeue_exit_code=code)

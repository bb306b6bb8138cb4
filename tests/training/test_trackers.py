"""training/trackers.py: what TensorBoard, W&B and MLflow are told can be read back from them."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contrec_dist.config import Config, MonitorConfig
from contrec_dist.errors import ConfigError
from contrec_dist.training import trackers
from contrec_dist.training.trackers import MlflowTracker, TensorBoardTracker, WandbTracker, check_trackers, open_trackers


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(name="watched", run_dir=str(tmp_path / "run"))


def test_resumed_run_hides_what_it_logs_again(config, tmp_path):
    (first,) = open_trackers(config, "run1", first_step=1)
    for step in (2, 4, 6):
        first.log(step, {"loss/loss": float(step), "probe/query_hr@10": 0.5})
    first.close()
    (again,) = open_trackers(config, "run1", first_step=5)
    assert isinstance(again, TensorBoardTracker)
    again.log(6, {"loss/loss": 60.0})
    again.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "run1")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/loss")] == [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert [event.step for event in events.Scalars("probe/query_hr@10")] == [2, 4]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_tracker_that_is_not_installed_is_a_config_error_with_its_package(monkeypatch, name):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None if package == name else find_spec(package))
    with pytest.raises(ConfigError, match=f"monitor.trackers.*'{name}'.*pip install {name}"):
        check_trackers(MonitorConfig(trackers=["tensorboard", name]))


def test_unknown_tracker_is_a_config_error():
    with pytest.raises(ConfigError, match="monitor.trackers.*visdom.*tensorboard"):
        MonitorConfig(trackers=["visdom"])


def test_mlflow_is_told_once_a_run(config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    for start, loss in ((1, 4.0), (3, 3.0)):
        tracker = MlflowTracker(config, "run1", first_step=start)
        tracker.log(start, {"loss/loss": loss, "probe/query_hr@10": 0.25})
        tracker.close()
    (run,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert run.data.metrics["probe/query_hr_at_10"] == 0.25
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss/loss")
    assert sorted((one.step, one.value) for one in history) == [(1, 4.0), (3, 3.0)]


def test_wandb_is_told_offline(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = WandbTracker(replace(config, run_dir=str(tmp_path)), "run1", first_step=1)
    for step, loss in ((1, 4.0), (2, 3.0)):
        tracker.log(step, {"loss/loss": loss})
    tracker.close()
    (path,) = (tmp_path / "wandb").glob("offline-run-*-run1/run-run1.wandb")
    written = path.read_bytes()  # records of protocol buffers, their texts as they are
    assert b"loss/loss" in written and b"watched" in written and b"probe_every_steps" in written

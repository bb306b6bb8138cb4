"""Where figures go beside the JSON lines: TensorBoard, Weights & Biases, MLflow. Rank 0 alone talks to them.

A tracker has two verbs: log(step, {name: value}) and close().
"""

import dataclasses
import os
from importlib.util import find_spec
from pathlib import Path

from contrec_dist.config import Config, MonitorConfig
from contrec_dist.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
PROJECT = "contrec_dist"


def check_trackers(monitor: MonitorConfig) -> None:
    """Errors   ConfigError naming the package of a tracker that is asked for and not installed"""
    for name in monitor.trackers:
        if find_spec(PACKAGES[name]) is None:
            package = PACKAGES[name]
            raise ConfigError("monitor.trackers", f"'{name}'", f"package {package} installed (pip install {package})")


def open_trackers(config: Config, run_id: str, first_step: int) -> list:
    """The trackers of the config. What an earlier start logged from first_step on will be logged again.

    `run_id` tells a training from others of the same run folder; a resumed one keeps it.
    """
    check_trackers(config.monitor)
    return [TRACKERS[name](config, run_id, first_step) for name in config.monitor.trackers]


class TensorBoardTracker:
    """Event files in run_dir/tensorboard; events of steps that are written again are hidden (purge_step)."""

    def __init__(self, config: Config, run_id: str, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(Path(config.run_dir) / "tensorboard" / run_id, purge_step=first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """A W&B run that a resumed training goes on with; WANDB_MODE, WANDB_PROJECT and the like are obeyed."""

    def __init__(self, config: Config, run_id: str, first_step: int):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=config.name, id=run_id, resume="allow",
            dir=config.run_dir, config=dataclasses.asdict(config),
        )  # fmt: skip

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        import wandb

        self.run.finish()
        wandb.teardown()  # until W&B's own process has written everything: a rank ends without Python's exit hooks


class MlflowTracker:
    """An MLflow run that a resumed training goes on with; MLFLOW_TRACKING_URI is obeyed, else run_dir/mlflow.db."""

    def __init__(self, config: Config, run_id: str, first_step: int):
        import mlflow

        self.mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{Path(config.run_dir).resolve() / 'mlflow.db'}")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        known = mlflow.search_runs(filter_string=f"tags.contrec_run = '{run_id}'", output_format="list")
        mlflow.start_run(
            run_id=known[0].info.run_id if known else None, run_name=config.name, tags={"contrec_run": run_id}
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        # MLflow takes no @ in a name.
        self.mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker, "mlflow": MlflowTracker}

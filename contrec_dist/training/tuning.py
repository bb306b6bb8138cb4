"""One trial of DeepSpeed's autotuner: `deepspeed --autotuning tune launchers/train.py --deepspeed_config ds.json --config ...`

The autotuner starts launchers/train.py again and again, each time with settings of its own (micro-batch rows, accumulation,
ZeRO stage, buckets) in the place of the JSON, and reads the throughput that the engine writes before it ends the process.
It owns those settings, so here they go before our config. A trial trains on the run's real batches in a folder of its own:
the run's checkpoints and model stay as they are, and a model that is complete does not end the trial before it began.

Needs    the package `tabulate` (pip install 'contrec_dist[autotuning]'); "autotuning": {"enabled": true} in the JSON; as many
         CPU ranks as LOCAL_SIZE says where there is no GPU (the autotuner counts devices before --num_gpus is looked at).
Of DeepSpeed 0.19  After each trial the autotuner asks `pdsh` to end what is left of it; without pdsh it prints a traceback and
         goes on. With mlflow installed it wants a run of mlflow's (MLFLOW_RUN_ID). `run` starts the best trial once more, which
         still carries the autotuning section and so ends after the profiled steps: use `tune`, then train with the values of
         autotuning_results/ds_config_optimal.json.
"""

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from contrec_dist.config import Config, ZeroConfig
from contrec_dist.manifest import IDENTITY_NAME, write_json
from contrec_dist.training.deepspeed_file import read_settings
from contrec_dist.training.train import STAGE

END_PROFILE_STEP = 5
"DeepSpeed's default of autotuning.end_profile_step: the engine ends the process after the step that follows"
TRIAL_FOLDER = ".autotuning"
OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def is_trial(config: Config) -> bool:
    """Whether the settings came from the autotuner (read_settings leaves its section out of a user's file)."""
    source = config.launch.deepspeed_config
    return bool(source) and bool((read_settings(source).get("autotuning") or {}).get("enabled"))


def trial_config(config: Config, world_size: int) -> Config:
    """The config under which a trial trains: what the autotuner owns goes before it."""
    settings = read_settings(config.launch.deepspeed_config)
    micro, accumulation = (settings.get(name, "auto") for name in OWNED[1:])
    micro = micro if isinstance(micro, int) else config.train.micro_batch_rows
    accumulation = accumulation if isinstance(accumulation, int) else 1
    last_step = (settings["autotuning"].get("end_profile_step") or END_PROFILE_STEP) + 2
    stage = (settings.get("zero_optimization") or {}).get("stage", config.zero.stage)
    default = ZeroConfig()
    rest = {key: value for key, value in settings.items() if key not in OWNED}
    return replace(
        config,
        train=replace(
            config.train,
            micro_batch_rows=micro,
            global_batch_rows=micro * accumulation * world_size,
            max_steps=last_step,
            num_epochs=last_step,  # however few rows there are
            checkpoint_every_steps=last_step + 1,
        ),
        zero=replace(
            config.zero,
            stage=config.zero.stage if stage == "auto" else stage,
            bucket_elements=default.bucket_elements,
            persistence_threshold=default.persistence_threshold,
        ),
        monitor=replace(config.monitor, probe_every_steps=0, trackers=[], profile_num_steps=0),
        launch=replace(config.launch, deepspeed_config=base64.urlsafe_b64encode(json.dumps(rest).encode()).decode()),
    )


def run_trial(config: Config) -> None:
    """One rank of a trial; DeepSpeed ends it once it has measured."""
    from contrec_dist.training.rank import start_process_group, train_and_export

    start_process_group(config)
    run = config.folder(TRIAL_FOLDER)
    first = torch.distributed.get_rank() == 0
    try:
        if first:
            _make_run(config, run)
        torch.distributed.barrier()
        config = trial_config(config, torch.distributed.get_world_size())
        train_and_export(replace(config, run_dir=str(run)), run / STAGE["folder"])
    except SystemExit:
        pass  # DeepSpeed's way to say that it has what it wants
    finally:
        torch.distributed.destroy_process_group()
        if first:
            shutil.rmtree(run, ignore_errors=True)


def _make_run(config: Config, run: Path) -> None:
    """A run folder that shares the inputs of the real one and holds whatever the trial writes."""
    shutil.rmtree(run, ignore_errors=True)
    (run / STAGE["folder"]).mkdir(parents=True)
    for name in (*STAGE["inputs"], "embeddings"):
        (run / name).symlink_to(config.folder(name).resolve(), target_is_directory=True)
    write_json(run / STAGE["folder"] / IDENTITY_NAME, {"identity": TRIAL_FOLDER})

"""What every rank of a benchmark start executes: several jobs one after the other in one process group.

    deepspeed --num_gpus 2 contrec_dist/benchmarks/train_ranks.py --jobs jobs.json

A start of DeepSpeed costs more than most of what is measured. Every job's figures go to `<folder>/<job>-rank<r>.json`. Jobs
with the peer, the head or the packing need one rank.
"""

import argparse
import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("--jobs", type=Path, required=True)
    parsed = parser.parse_args()

    import torch

    from contrec_dist.config import load_config
    from contrec_dist.errors import ContRecError
    from contrec_dist.manifest import write_json
    from contrec_dist.progress import get_logger
    from contrec_dist.training.rank import start_process_group
    from contrec_dist.training.starter import stop_with_starter

    stop_with_starter()
    jobs = json.loads(parsed.jobs.read_text())
    start_process_group(load_config([jobs[0]["config"]]))
    for job in jobs:
        get_logger("benchmark").info("%s", job["name"])
        try:
            record = {"figures": JOBS[job["kind"]](load_config([job["config"]]), **job["settings"])}
        except ContRecError as error:
            record = {"error": str(error)}
        write_json(parsed.jobs.parent / f"{job['name']}-rank{os.environ['RANK']}.json", record)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _measure_training(config, *, max_rows: int | None, **timing: int) -> dict:
    from contrec_dist.benchmarks.micro_batch import find_micro_batch
    from contrec_dist.benchmarks.timed_loop import Timing, measure_training

    if max_rows is not None:
        config = find_micro_batch(config, max_rows)
    return measure_training(config, Timing(**timing))


def _measure_peer(config, **settings) -> dict:
    from contrec_dist.benchmarks.peer_scheme import measure_peer

    return measure_peer(config, _open_data(config), **settings)


def _measure_head(config, **settings) -> dict:
    from contrec_dist.benchmarks.head_cost import measure_head

    return measure_head(config, _open_data(config), **settings)


def _measure_packing(config) -> dict:
    plan = _open_data(config).rows.plan(0)
    return {
        "padding_share": plan.padding_ratio(config.train.row_tokens), "samples": len(plan.user), "rows": len(plan.rows),
        "row_tokens": config.train.row_tokens,
    }  # fmt: skip


def _open_data(config):
    """What a training rank reads, through the same functions."""
    from contrec_dist.training.rank import TrainingData, _shared_tokenizer

    folder = config.folder("checkpoints") / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    return TrainingData.open(config, _shared_tokenizer(config, folder))


JOBS = {"train": _measure_training, "peer": _measure_peer, "head": _measure_head, "packing": _measure_packing}

if __name__ == "__main__":
    main()

"""One rank of training: what `deepspeed` (or torchrun) starts.

    deepspeed --num_gpus 8 launchers/train.py --config configs/ml1m.yaml train.num_epochs=20
    deepspeed --hostfile configs/cluster/hostfile launchers/train.py --config configs/llama3_1b.yaml
    torchrun --nproc_per_node 2 launchers/train.py --config configs/demo.yaml

Settings of DeepSpeed's own, for example communication, offloading or its monitors, come from a JSON beside the config
(contrec_dist/training/deepspeed_file.py says which of the two decides what), and its autotuner may try them:

    deepspeed launchers/train.py --deepspeed_config ds.json --config configs/ml1m.yaml
    deepspeed --autotuning tune launchers/train.py --deepspeed_config ds.json --config configs/ml1m.yaml
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# On CPUs oneDNN and its wrapper keep 1024 compiled products each, and packed batches bring new shapes with every step: a rank
# would grow by hundreds of MB. 64 hold those of a step (measured: no slower).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 trained; launch.requeue_exit_code stopped with a checkpoint in place; 1 a named error."""
    from contrec_dist.training.starter import stop_with_starter

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON that joins what the config derives")
    parser.add_argument("--deepspeed", nargs="?", metavar="FILE", help="without a file a flag of no effect: it is always used")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args(arguments)
    stop_with_starter()
    return train_rank(parsed.config, *_sort_arguments(parsed))


def _sort_arguments(parsed: argparse.Namespace) -> tuple[list[str], str]:
    """key=value arguments and the DeepSpeed settings; `--deepspeed` takes the word after it, which may be either."""
    from contrec_dist.training.deepspeed_file import is_settings_source

    word = parsed.deepspeed or ""
    if word and not is_settings_source(word):
        return [word, *parsed.overrides], parsed.deepspeed_config or ""
    return parsed.overrides, parsed.deepspeed_config or word


def train_rank(files: list[str], overrides: list[str], deepspeed_settings: str = "") -> int:
    """Train with what the files and key=value arguments say; errors go to the log.

    `deepspeed_settings` is a DeepSpeed JSON, in the place of launch.deepspeed_config: a file, or what the autotuner passes.
    """
    from contrec_dist.config import load_config
    from contrec_dist.errors import ContRecError, StageStopped
    from contrec_dist.progress import get_logger

    # DeepSpeed and PEFT call torch and transformers by names that are going: lines on every rank, for nobody here to act on.
    for renamed in ("`torch.distributed.", "`is_gradient_checkpointing`"):
        warnings.filterwarnings("ignore", message=f"{renamed}.*is deprecated", category=FutureWarning)
    try:
        config = load_config(files, overrides)
        config.launch.deepspeed_config = deepspeed_settings or config.launch.deepspeed_config

        from contrec_dist.training.rank import run_rank
        from contrec_dist.training.tuning import is_trial, run_trial

        (run_trial if is_trial(config) else run_rank)(config)
    except StageStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            get_logger("train").warning("%s", stopped)
        return stopped.exit_code
    except ContRecError as error:
        get_logger("train").error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch and DeepSpeed apart, module by module, would hold every rank for seconds

"""One rank of training: what `deepspeed` (or torchrun) starts.

    deepspeed --num_gpus 8 launchers/train.py --config configs/ml1m.yaml train.num_epochs=20
    deepspeed --hostfile configs/cluster/hostfile launchers/train.py --config configs/llama3_1b.yaml
    torchrun --nproc_per_node 2 launchers/train.py --config configs/demo.yaml
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    from contrec_dist.config import load_config
    from contrec_dist.errors import ContRecError
    from contrec_dist.progress import get_logger
    from contrec_dist.training.loop import Interrupted
    from contrec_dist.training.train import run_rank

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        run_rank(load_config(arguments.config, arguments.overrides))
    except Interrupted as stopped:
        get_logger("train").warning("%s", stopped)
    except ContRecError as error:
        get_logger("train").error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

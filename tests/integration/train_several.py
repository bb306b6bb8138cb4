"""Trains several configs one after the other in one start of `deepspeed`: a start costs more than a toy training.

    deepspeed train_several.py --observe FOLDER A.yaml B.yaml

Each goes through what launchers/train.py does, in one process group. What is seen when the model reaches
deepspeed.initialize (how many elements of the backbone lie on this rank) and the error that a run ended with are written
to FOLDER/<name>-rank<r>.json.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("--observe", type=Path)
    parser.add_argument("configs", nargs="+", type=Path)
    arguments = parser.parse_args()

    import deepspeed

    from contrec_dist.config import load_config
    from contrec_dist.errors import ContRecError
    from contrec_dist.progress import get_logger
    from contrec_dist.training.rank import run_in_group, start_process_group
    from contrec_dist.training.starter import stop_with_starter

    stop_with_starter()
    initialize, seen = deepspeed.initialize, {}

    def observed_initialize(*, model, **rest):
        backbone = dict(model.backbone.named_parameters())
        seen["here"] = sum(one.numel() for one in backbone.values())
        seen["whole"] = sum(getattr(one, "ds_numel", one.numel()) for one in backbone.values())
        seen["adapters"] = sum(one.numel() for name, one in backbone.items() if "lora_" in name)
        return initialize(model=model, **rest)

    deepspeed.initialize = observed_initialize
    start_process_group(load_config(arguments.configs[:1]))
    for path in arguments.configs:
        seen.clear()
        try:
            run_in_group(load_config([path]))
            error = ""
        except ContRecError as raised:
            error = str(raised)
            get_logger("train").error("%s", raised)
        record = arguments.observe / f"{path.stem}-rank{os.environ['RANK']}.json"
        record.write_text(json.dumps({"error": error, **seen}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

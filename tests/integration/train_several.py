"""Trains several configs one after the other in one start of `deepspeed`: a start costs more than a toy training.

    deepspeed train_several.py --observe FOLDER [--stop A=5] [--spoil B=3] A.yaml B.yaml

Each goes through what launchers/train.py does, in one process group. What is seen when the model reaches
deepspeed.initialize (how many elements of the backbone lie on this rank) and the error that a run ended with are written
to FOLDER/<name>-rank<r>.json. --stop A=5: somebody touches A's stop-file while it makes step 5. --spoil B=3: on rank 1
the third backward pass of B gives infinite gradients of one matrix, while the loss is finite.
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
    parser.add_argument("--stop", action="append", default=[], metavar="NAME=STEP")
    parser.add_argument("--spoil", action="append", default=[], metavar="NAME=BACKWARD")
    parser.add_argument("configs", nargs="+", type=Path)
    arguments = parser.parse_args()

    from contrec_dist.config import load_config
    from contrec_dist.errors import ContRecError
    from contrec_dist.progress import get_logger
    from contrec_dist.training.rank import run_in_group, start_process_group
    from contrec_dist.training.starter import stop_with_starter

    stop_with_starter()
    seen = {}
    observe_initialize(seen, numbers(arguments.spoil))
    touch_stop_files(seen, numbers(arguments.stop))
    start_process_group(load_config(arguments.configs[:1]))
    for path in arguments.configs:
        seen.clear()
        seen |= {"name": path.stem, "error": ""}
        try:
            run_in_group(load_config([path]))
        except ContRecError as raised:
            seen["error"] = str(raised)
            get_logger("train").error("%s", raised)
        (arguments.observe / f"{path.stem}-rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
    sys.stdout.flush()
    os._exit(0)


def numbers(options: list[str]) -> dict[str, int]:
    return {name: int(number) for name, number in (option.split("=") for option in options)}


def observe_initialize(seen: dict, spoil: dict[str, int]) -> None:
    """Look at every model on its way to DeepSpeed."""
    import deepspeed

    initialize = deepspeed.initialize

    def observed(*, model, **rest):
        backbone = dict(model.backbone.named_parameters())
        seen["here"] = sum(one.numel() for one in backbone.values())
        seen["whole"] = sum(getattr(one, "ds_numel", one.numel()) for one in backbone.values())
        seen["adapters"] = sum(one.numel() for name, one in backbone.items() if "lora_" in name)
        if seen["name"] in spoil and os.environ["RANK"] == "1":
            spoil_gradient(model.head, spoil[seen["name"]])
        return initialize(model=model, **rest)

    deepspeed.initialize = observed


def spoil_gradient(head, at: int) -> None:
    """Have the at-th gradient of the head's largest matrix be infinite."""
    calls = 0

    def spoil(gradient):
        nonlocal calls
        calls += 1
        return gradient * float("inf") if calls == at else gradient

    max(head.parameters(), key=lambda one: one.numel()).register_hook(spoil)


def touch_stop_files(seen: dict, stop: dict[str, int]) -> None:
    """Touch a run's stop-file after a step was made and before its boundary."""
    from contrec_dist.training.loop import TrainingLoop
    from contrec_dist.training.stop import stop_file

    record = TrainingLoop._record

    def observed(loop, *rest):
        if loop.position.step == stop.get(seen["name"]):
            stop_file(loop.config).touch()
        record(loop, *rest)

    TrainingLoop._record = observed


if __name__ == "__main__":
    main()

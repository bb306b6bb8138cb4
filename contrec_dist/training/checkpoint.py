"""Saving and loading a DeepSpeed engine, on all ranks together; which files make a good checkpoint: checkpoint_files.py.

Weights that training leaves as they are (a base under adapters) are not stored: their path and hash are.
"""

import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Iterator

import torch
import torch.distributed as dist

from contrec_dist.errors import ArtifactError, ContRecError
from contrec_dist.training.checkpoint_files import (
    TrainingPosition,
    complete_checkpoint,
    find_checkpoint,
    list_checkpoints,
    publish_checkpoint,
    read_marker,
    set_aside,
    step_name,
)
from contrec_dist.training.frozen_base import FrozenBase
from contrec_dist.training.repartition import load_repartitioned

TAG = "state"


def save_checkpoint(
    engine, folder: Path, position: TrainingPosition, keep_last_n: int, base: FrozenBase | None = None
) -> None:
    """Write `folder/step-XXXXXXXX` on all ranks together, then drop all but the newest keep_last_n.

    A checkpoint of a later step can only be one that did not verify when this run was resumed: it is dropped too.
    `base` is what the frozen weights can be had from again.
    """
    target = folder / step_name(position.step)
    work = folder / f".{target.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    dist.barrier()
    with _leaving_out_frozen(engine.module, base is not None):
        engine.save_checkpoint(
            str(work), tag=TAG, client_state=asdict(position), save_latest=False,
            exclude_frozen_parameters=base is not None,
        )  # fmt: skip
    dist.barrier()
    if dist.get_rank() == 0:
        complete_checkpoint(work, position, base)
        publish_checkpoint(work, target)
        checkpoints = list_checkpoints(folder)
        newest = checkpoints.index(target)
        for dropped in checkpoints[:newest] + checkpoints[newest + keep_last_n :]:
            shutil.rmtree(dropped)
    dist.barrier()


def load_checkpoint(
    engine, folder: Path, *, resume: str = "auto", base: FrozenBase | None = None
) -> TrainingPosition | None:
    """Load the checkpoint that `resume` asks for, on all ranks, whatever number wrote it; None where none is wanted.

    resume   "auto": the newest of `folder` that verifies; "never": none, the ones there are set aside; else exactly
             that step of `folder`, or that checkpoint folder, later ones of `folder` being set aside
    Errors   ArtifactError, the same on all ranks, for a named checkpoint that is not there or not good, and for one whose
             adapters belong to another base
    """
    chosen = [_choose(folder, resume, base) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], ContRecError):
        raise chosen[0]
    if chosen[0] is None:
        return None
    checkpoint = Path(chosen[0])
    if _num_pieces(checkpoint) in (0, dist.get_world_size()):
        stored_whole = read_marker(checkpoint).get("base") is None
        load = None if stored_whole else _load_trained
        path, client_state = engine.load_checkpoint(str(checkpoint), tag=TAG, custom_load_fn=load)
    else:
        path, client_state = load_repartitioned(engine, checkpoint, TAG, work=folder / f".{checkpoint.name}.universal")
    if path is None:
        raise ArtifactError(checkpoint, "a checkpoint that DeepSpeed does not load", "one written by this engine")
    known = TrainingPosition.__dataclass_fields__.keys() & client_state.keys()
    return TrainingPosition(**{name: client_state[name] for name in known})


def _choose(folder: Path, resume: str, base: FrozenBase | None) -> str | None | ContRecError:
    """Path of the checkpoint to load, None for none; an error is returned, so that every rank can raise it."""
    try:
        chosen = find_checkpoint(folder, resume)
        if chosen is not None and base is not None:
            base.refuse_other(read_marker(chosen).get("base"), chosen)
        if resume != "auto":
            inside = chosen is not None and chosen.resolve().parent == folder.resolve()
            set_aside(folder, read_marker(chosen)["position"]["step"] if inside else -1)
    except ContRecError as error:
        return error
    return None if chosen is None else str(chosen)


def _load_trained(src: dict, dst: torch.nn.Module) -> None:
    """Load a state without the frozen weights; anything else that is missing is an error, as it would be without them."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    missing = set(missing) - _frozen_names(dst)
    if missing or unexpected:
        raise ArtifactError("checkpoint", f"missing {sorted(missing)}, unknown {unexpected}", "the trained weights of this model")


@contextmanager
def _leaving_out_frozen(module: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """DeepSpeed leaves a frozen weight out under its first name only; tied ones (lm_head) have a second one."""
    if not wanted:
        yield
        return
    frozen = _frozen_names(module)

    def drop(_module, state: dict, prefix: str, _metadata) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    handle = module.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def _frozen_names(module: torch.nn.Module) -> set[str]:
    return {name for name, one in module.named_parameters(remove_duplicate=False) if not one.requires_grad}


def _num_pieces(checkpoint: Path) -> int:
    """Ranks among which ZeRO had cut the optimizer's state; 0 without ZeRO, where any number of ranks can load it."""
    return len(list((checkpoint / TAG).glob("*_optim_states.pt")))

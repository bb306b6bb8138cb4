"""The DeepSpeed dictionary, derived from the config and never written by hand, and the optimizer's parameter groups."""

import torch
from torch import nn

from contrec_dist.config import Config
from contrec_dist.errors import ConfigError
from contrec_dist.training.deepspeed_file import merge_settings, read_settings

NO_DECAY_NAMES = ("items.bias.weight", "inputs.slots.weight", "inputs.markers.weight", "null_condition.weight")


def accumulation_steps(config: Config, world_size: int) -> int:
    """global_batch_rows = micro_batch_rows * ranks * accumulation.

    Errors   ConfigError with the equation when it has no whole solution
    """
    train = config.train
    per_pass = train.micro_batch_rows * world_size
    if train.global_batch_rows % per_pass:
        raise ConfigError(
            "train.global_batch_rows",
            train.global_batch_rows,
            f"a multiple of train.micro_batch_rows * ranks = {train.micro_batch_rows} * {world_size} = {per_pass}",
        )
    return train.global_batch_rows // per_pass


def deepspeed_config(config: Config, world_size: int) -> dict:
    """What deepspeed.initialize takes. Weights are fp32; bf16 matrix products come from autocast inside the model.

    Errors   ConfigError naming every conflict between a JSON of the user's (launch.deepspeed_config) and this config
    """
    zero = config.zero
    section = {
        "stage": zero.stage,
        "overlap_comm": torch.cuda.is_available(),
        "memory_efficient_linear": False,  # its Python autograd function costs more than it saves here
        "contiguous_gradients": True,
        "reduce_bucket_size": zero.bucket_elements,
    }
    if zero.stage == 3:
        section |= {
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_prefetch_bucket_size": zero.bucket_elements,
            "stage3_max_live_parameters": 10**9,
        }
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    derived = {
        "train_batch_size": config.train.global_batch_rows,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_rows,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.train.clip_norm,
        "zero_optimization": section,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    source = config.launch.deepspeed_config
    return merge_settings(derived, read_settings(source), config) if source else derived


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors, biases and markers do not; frozen parameters are left out.

    Errors   ConfigError when the trainable parameters have more than one dtype (ZeRO would fail without a message)
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            exempt = len(shape) < 2 or name.endswith(NO_DECAY_NAMES)
            (plain if exempt else decayed).append(parameter)
    dtypes = {parameter.dtype for parameter in decayed + plain}
    if len(dtypes) > 1:
        raise ConfigError("backbone", f"trainable parameters of dtypes {sorted(map(str, dtypes))}", "one dtype")
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate_at(progress: float, *, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up, then cosine to 0. progress: share of the run that is done, [0, 1]."""
    if warmup_ratio > 0 and progress < warmup_ratio:
        return peak * progress / warmup_ratio
    rest = min(1.0, (progress - warmup_ratio) / max(1.0 - warmup_ratio, 1e-9))
    return peak * 0.5 * (1.0 + float(torch.cos(torch.tensor(rest * torch.pi, dtype=torch.float64))))

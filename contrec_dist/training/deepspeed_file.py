"""A DeepSpeed JSON of the user's own, merged into the dictionary that our config gives (training/zero3.py).

Stage    train: `launch.deepspeed_config`, or `--deepspeed_config FILE` of launchers/train.py.
Rule     A key that our config decides may stand in the JSON with the same value or "auto" (Hugging Face's convention:
         filled from the config). Another value is a conflict, and all conflicts are refused in one error. Bucket sizes,
         the persistence threshold and offloading are taken from the JSON while our config has their default. Everything
         else is taken as it is, and DeepSpeed judges it.
Identity Whatever decides the loss is a conflict or equal to the config, and most of the rest says how a step is executed
         (buckets, offloading, profilers, monitors, logs: HOW below), so such a file leaves a finished model complete. Any
         other key that is taken (a communication dtype, quantised gathers, curriculum learning ...) may change numbers: it
         enters the identity of the train stage through `counted_settings`.

This module loads neither torch nor DeepSpeed: the command that only waits for its ranks reads the file too.
"""

import base64
import binascii
import json
from pathlib import Path

import hjson

from contrec_dist.config import Config, ZeroConfig
from contrec_dist.errors import ConfigError

AUTO = "auto"
BETAS = (0.9, 0.98)
EPSILON = 1e-8
DECIDED = {
    "train_batch_size": "train.global_batch_rows",
    "train_micro_batch_size_per_gpu": "train.micro_batch_rows",
    "gradient_accumulation_steps": "train.global_batch_rows / (train.micro_batch_rows * ranks)",
    "gradient_clipping": "train.clip_norm",
    "zero_optimization.stage": "zero.stage",
    "zero_allow_untested_optimizer": "the optimizer, torch's AdamW",
    "zero_force_ds_cpu_optimizer": "the optimizer, torch's AdamW",
}
"JSON key -> what decides it in our config, whatever the JSON says"
LEFT_OPEN = {
    "zero_optimization.reduce_bucket_size": "bucket_elements",
    "zero_optimization.stage3_prefetch_bucket_size": "bucket_elements",
    "zero_optimization.stage3_param_persistence_threshold": "persistence_threshold",
    "zero_optimization.offload_optimizer": "offload_optimizer",
}
"JSON key -> key of our section `zero` that decides it only where it is not the default"
PRECISIONS = ("fp16", "bf16", "bfloat16", "torch_autocast", "amp")
HOW = {
    "activation_checkpointing", "aio", "autotuning", "checkpoint", "comet", "comms_logger", "csv_monitor", "dump_state",
    "flops_profiler", "memory_breakdown", "nebula", "steps_per_print", "tensorboard", "wall_clock_breakdown", "wandb",
    "zero_optimization",
}  # fmt: skip
"JSON sections and keys that say how a step is executed, not what it computes; of zero_optimization all but the next"
COUNTED_OF_ZERO = ("zero_quantized", "zeropp_loco", "zenflow", "mics")
"beginnings of the keys of zero_optimization that change numbers"


def read_settings(source: str) -> dict:
    """The settings of a JSON file (comments allowed, as in DeepSpeed), or of the base64 that DeepSpeed's autotuner passes.

    Errors   ConfigError when it is neither, or holds a key twice
    """
    is_file = _is_file(source)
    try:
        text = Path(source).read_text() if is_file else _decode(source)
        settings = hjson.loads(text, object_pairs_hook=_refuse_repeated)
    except (ValueError, OSError) as error:
        raise ConfigError("launch.deepspeed_config", source[:200], f"a JSON file of DeepSpeed settings ({error})") from None
    if not isinstance(settings, dict):
        raise ConfigError("launch.deepspeed_config", source[:200], "a JSON object of DeepSpeed settings")
    if is_file:  # in a user's file this section speaks to the launcher; the engine would end after a few steps
        settings.pop("autotuning", None)
    return settings


def is_settings_source(text: str) -> bool:
    """Whether a command-line word names settings: a file, or base64 of a JSON object."""
    return text.endswith(".json") or _is_file(text) or text.startswith("eyJ")


def merge_settings(derived: dict, given: dict, config: Config) -> dict:
    """`derived`, what our config gives, with what the user's JSON may decide.

    Errors   ConfigError that names every conflict: JSON key and value, config key and value
    """
    conflicts = _decided_conflicts(derived, given) + _open_conflicts(derived, given, config) + _other_conflicts(given, config)
    if conflicts:
        raise ConfigError("launch.deepspeed_config", "; ".join(conflicts), 'the same values in both, or "auto" in the JSON')
    taken = {key: value for key, value in given.items() if key not in (*PRECISIONS, "optimizer", "scheduler")}
    return _join(derived, taken)


def counted_settings(config: Config) -> dict | None:
    """What the user's JSON adds that may change numbers, for the stage's identity; None where there is nothing."""
    if not config.launch.deepspeed_config:
        return None
    given = read_settings(config.launch.deepspeed_config)
    ignored = {*HOW, *PRECISIONS, "optimizer", "scheduler", *DECIDED}
    counted = {key: value for key, value in given.items() if key not in ignored and value != AUTO}
    zero = given.get("zero_optimization") or {}
    counted |= {f"zero_optimization.{key}": zero[key] for key in zero if key.startswith(COUNTED_OF_ZERO)}
    return {"deepspeed": counted} if counted else None


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except OSError:  # no system takes so long a name
        return False


def _decode(source: str) -> str:
    try:
        return base64.urlsafe_b64decode(source).decode()
    except (binascii.Error, UnicodeError):
        raise ValueError("no such file") from None


def _refuse_repeated(pairs: list[tuple[str, object]]) -> dict:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"keys that stand twice: {', '.join(repeated)}")
    return dict(pairs)


def _look_up(settings: dict, path: str) -> object:
    """The value at a dotted path; AUTO where there is none."""
    for name in path.split("."):
        if not isinstance(settings, dict) or name not in settings:
            return AUTO
        settings = settings[name]
    return settings


def _conflict(path: str, given: object, key: str, value: object) -> str:
    return f"JSON {path}={json.dumps(given)} but {key}: {json.dumps(value)}"


def _decided_conflicts(derived: dict, given: dict) -> list[str]:
    found = []
    for path, key in DECIDED.items():
        value, ours = _look_up(given, path), _look_up(derived, path)
        if value not in (AUTO, ours):
            found.append(_conflict(path, value, key, ours))
    return found


def _open_conflicts(derived: dict, given: dict, config: Config) -> list[str]:
    """Keys of `zero` that were set in our config, and otherwise in the JSON."""
    found = []
    for path, name in LEFT_OPEN.items():
        value, ours = _look_up(given, path), _look_up(derived, path)
        if path.endswith("offload_optimizer"):  # its details are the JSON's; whether and where is what can differ
            value, ours = _device(value), _device(ours)
        if getattr(config.zero, name) != getattr(ZeroConfig(), name) and value not in (AUTO, ours):
            found.append(_conflict(path, value, f"zero.{name}", getattr(config.zero, name)))
    return found


def _device(section: object) -> object:
    return section.get("device", "none") if isinstance(section, dict) else section


def _other_conflicts(given: dict, config: Config) -> list[str]:
    """Precision, optimizer, scheduler and elastic batches: sections that our training has no use for."""
    found = []
    for name in PRECISIONS:
        enabled = _look_up(given, f"{name}.enabled")
        if enabled not in (AUTO, False):
            found.append(_conflict(f"{name}.enabled", enabled, "backbone.precision (fp32 weights)", config.backbone.precision))
    if given.get("optimizer") not in (None, AUTO):
        found += _optimizer_conflicts(given["optimizer"], config)
    if given.get("scheduler") not in (None, AUTO):
        kind = _look_up(given, "scheduler.type")
        found.append(_conflict("scheduler.type", kind, "train.warmup_ratio, then cosine", config.train.warmup_ratio))
    if _look_up(given, "elasticity.enabled") is True:
        found.append(_conflict("elasticity.enabled", True, "train.global_batch_rows", config.train.global_batch_rows))
    return found


def _optimizer_conflicts(section: dict, config: Config) -> list[str]:
    ours = {
        "lr": ("train.learning_rate", config.train.learning_rate),
        "weight_decay": ("train.weight_decay", config.train.weight_decay),
        "betas": ("AdamW's betas", list(BETAS)),
        "eps": ("AdamW's eps", EPSILON),
        "adam_w_mode": ("AdamW", True),
        "torch_adam": ("AdamW of torch", True),
    }
    kind = section.get("type", AUTO)
    found = [] if kind in (AUTO, "Adam", "AdamW") else [_conflict("optimizer.type", kind, "the optimizer", "AdamW")]
    for name, value in (section.get("params") or {}).items():
        key, wanted = ours.get(name, ("AdamW takes lr, betas, eps and weight_decay", None))
        if value not in (AUTO, wanted):
            found.append(_conflict(f"optimizer.params.{name}", value, key, wanted))
    return found


def _join(derived: dict, given: dict) -> dict:
    """`given` over `derived`, section by section; "auto" keeps what was derived, and is left out where nothing was."""
    joined = dict(derived)
    for key, value in given.items():
        before = derived.get(key)
        if isinstance(value, dict):
            joined[key] = _join(before if isinstance(before, dict) else {}, value)
        elif value != AUTO:
            joined[key] = value
    return joined

"""`contrec env`: what is installed and what this machine has, as Markdown for a bug report; and what is missing for what.

Nothing is compiled and no process group is started; the operators of DeepSpeed are asked by its own builders whether they
would build here (what ds_report prints). Paths, user and host names are left out.
Cost     seconds: torch, DeepSpeed, FAISS and Ray are imported.
"""

import argparse
import contextlib
import io
import logging
import os
import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDS_CONFIG = False
SMALL_SHARED_MEMORY_BYTES = 512 * 1024**2
"below this DeepSpeed warns: NCCL and the loaders run out of room"
WORTH_NAMING = ("HF_HUB_OFFLINE", "NCCL_DEBUG", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES")
OPERATORS = ("cpu_adam", "fused_adam", "async_io", "deepspeed_shm_comm")
"the operators that a run can come to need: offloaded and fused Adam, NVMe offloading, all-reduce between CPU ranks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(config: None, parsed: argparse.Namespace) -> int:
    """Print the report on stdout."""
    print(environment_report())
    return 0


def environment_report() -> str:
    """The report as Markdown: tables of versions, machine, engines and operators, then what is missing."""
    from contrec_dist.manifest import package_versions

    sections = {
        "contrec_dist": {**package_versions(), "python": platform.python_version(), "system": platform.platform()},
        "machine": _machine(),
        "torch": _torch(),
        "faiss": _faiss(),
        "DeepSpeed operators": _deepspeed_operators(),
        "variables": {name: os.environ[name] for name in WORTH_NAMING if name in os.environ},
    }
    text = "".join(_table(name, rows) for name, rows in sections.items())
    return text + "### missing\n\n" + "\n".join(f"- {line}" for line in _missing() or ["nothing"])


def _table(name: str, rows: dict[str, object]) -> str:
    lines = [f"| {key} | {value} |" for key, value in rows.items()] or ["| | none |"]
    return f"### {name}\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n\n"


def _machine() -> dict[str, object]:
    import psutil
    import torch

    from contrec_dist.benchmarks.machine import processor_name
    from contrec_dist.model.backbone import has_fast_bf16

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.device("cuda" if gpus else "cpu")
    return {
        "processor": processor_name(),
        "cores (usable / all)": f"{usable} / {os.cpu_count()}",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB, {psutil.virtual_memory().available / 1e9:.1f} GB available",
        "shared memory (/dev/shm)": _shared_memory(),
        "GPUs": "; ".join(f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus) or "none",
        "bf16 matrix products in hardware": "yes" if has_fast_bf16(device) else "no (fp32 is used)",
    }


def _shared_memory() -> str:
    if not Path("/dev/shm").is_dir():
        return "none"
    usage = shutil.disk_usage("/dev/shm")
    return f"{usage.total / 1e9:.1f} GB, {usage.used / 1e9:.1f} GB in use"


def _torch() -> dict[str, object]:
    import torch
    import torch.distributed as dist

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() and dist.is_nccl_available() else "none"
    return {
        "build": torch.__version__,
        "CUDA of the build": torch.version.cuda or "none",
        "NCCL": nccl,
        "gloo": "yes" if dist.is_gloo_available() else "no",
        "threads": torch.get_num_threads(),
    }


def _faiss() -> dict[str, object]:
    import faiss

    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    return {
        "version": faiss.__version__,
        "compiled for": faiss.get_compile_options().strip(),
        "GPU search": f"{gpus} GPUs" if gpus else "no",
    }


def _deepspeed_operators() -> dict[str, str]:
    """Whether each operator would build here; DeepSpeed's own printing is kept away."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from deepspeed.accelerator import get_accelerator
            from deepspeed.git_version_info import installed_ops
            from deepspeed.ops.op_builder.all_ops import ALL_OPS
            from deepspeed.ops.op_builder.builder import probe_is_compatible

            states = {"accelerator": get_accelerator().device_name(), "ninja": "yes" if shutil.which("ninja") else "no"}
            for name in OPERATORS:
                if name in ALL_OPS:
                    built = "installed" if installed_ops.get(name, False) else "built when first needed"
                    states[name] = built if probe_is_compatible(ALL_OPS[name], False) else "cannot be built here"
    finally:
        logging.disable(logging.NOTSET)
    return states


def _missing() -> list[str]:
    """What is not here, and what it is missing for. torch, faiss and DeepSpeed are here, or the report had no sections."""
    import faiss
    import torch

    from contrec_dist.manifest import package_versions

    gpu = torch.cuda.is_available()
    needed = {name: version for name, version in package_versions().items() if name not in ("contrec_dist", "faiss-cpu")}
    found = [f"{name}: not installed" for name, version in needed.items() if version == "not installed"]
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        found.append("a C++ compiler: DeepSpeed builds the all-reduce between CPU ranks with it")
    if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").total < SMALL_SHARED_MEMORY_BYTES:
        found.append("room in /dev/shm: ranks on one machine and NCCL exchange through it (docker: --shm-size=8g)")
    if gpu and not hasattr(faiss, "StandardGpuResources"):
        found.append("faiss-gpu in the place of faiss-cpu: searching the index on the GPU")
    if gpu and torch.version.cuda and shutil.which("nvcc") is None:
        found.append("nvcc: DeepSpeed's fused operators are built with it (training runs without)")
    if shutil.which("ssh") is None:
        found.append("ssh: a DeepSpeed hostfile (Slurm and Kubernetes do without)")
    if shutil.which("pdsh") is None:
        found.append("pdsh: DeepSpeed's default launcher over a hostfile, and the clean-up of its autotuner")
    extras = {"wandb": "monitor.trackers=[wandb]", "mlflow": "monitor.trackers=[mlflow]", "tabulate": "deepspeed --autotuning"}
    found += [f"{name}: {use}" for name, use in extras.items() if find_spec(name) is None]
    if sys.platform != "linux":
        found.append("Linux: several ranks are tested there alone")
    return found

"""How much memory a training rank will take: `contrec estimate`, before anything ran.

Parts    Weights, gradients and optimizer are counted from the model's own parameters and cut as ZeRO cuts them (weights and
         AdamW are fp32 here; bf16 lives in autocast alone). Activations come from a dry step (dry_step.py). Buckets, gathers
         and the optimizer's temporaries are DeepSpeed's and torch's, as read in 0.19 and 2.13 and seen at work on two ranks.
Peak     The larger of two phases: forward and backward of the last micro-batch of a step, and the optimizer's step.
CPU      What is measured there is the peak resident memory of a process: BASE_BYTES for Python, torch, DeepSpeed, transformers
         and polars, and HEAP_FACTOR for the free blocks that glibc keeps between the live ones. Because it keeps them, what
         rank 0 gathers for the export, and loads again to check it, comes on top. On a GPU it is
         torch.cuda.max_memory_allocated, which knows none of these. The GPU's figures were not measured: no GPU was at hand.
"""

from dataclasses import dataclass, replace

import torch

from contrec_dist.config import Config
from contrec_dist.model.backbone import has_fast_bf16
from contrec_dist.training.dry_step import DataSizes, DryStep, build_empty_model, count_parameters, run_dry_step
from contrec_dist.training.zero3 import accumulation_steps

FP32_BYTES = 4
ALL_REDUCE_ELEMENTS = 500_000_000
"stage 0: elements that DeepSpeed copies together for one all-reduce"
MAX_LIVE_ELEMENTS = 10**9
"stage 3: gathered elements at a time (stage3_max_live_parameters)"
BASE_BYTES = 570_000_000
"resident memory of a rank before it builds its model, and of oneDNN's kernels (measured: an AMD EPYC, torch 2.13 for CPUs)"
HEAP_FACTOR = {"fp32": 1.15, "bf16": 1.4}
"""peak resident memory over bytes in use, beyond the base, by the precision of matrix products (autocast's copies lie between
the rest). Measured there with glibc 2.36 on 2 ranks, 3 steps of 27 to 34 M parameters"""
STAGE3_HEAP_FACTOR = {"fp32": 0.0, "bf16": 0.1}
"more at stage 3, which gathers and gives back weights in between"


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank at its peak: `parts` of `phase`."""

    stage: int
    phase: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """What the phases are computed from; bytes."""

    trainable: int
    frozen: int
    persistent: int
    "of the parameters that stage 3 leaves whole"
    buffers: int
    largest: int
    "of one parameter"
    stage: int
    ranks: int
    accumulates: bool
    on_gpu: bool
    offload: bool
    heap_factor: float
    bucket: int
    step: DryStep

    @property
    def share(self) -> int:
        """Of what ZeRO cuts, this rank's part of the trainable parameters."""
        return self.trainable // (self.ranks if self.stage else 1)


def estimate_memory(config: Config, sizes: DataSizes, *, ranks: int, stages: list[int], on_gpu: bool) -> list[MemoryEstimate]:
    """The peak of one rank (the first, which exports) for each ZeRO stage.

    Errors   ConfigError when the batch cannot be divided over the ranks, or the backbone's config is not there
    """
    accumulates = accumulation_steps(config, ranks) > 1
    config = _as_it_will_run(config, on_gpu)
    model, step = build_empty_model(config, sizes), run_dry_step(config, sizes)
    counts = count_parameters(model).values()
    numels = [parameter.numel() for parameter in model.parameters()]
    estimates = []
    for stage in stages:
        rank = _Rank(
            trainable=FP32_BYTES * sum(trainable for trainable, _ in counts),
            frozen=FP32_BYTES * sum(frozen for _, frozen in counts),
            persistent=FP32_BYTES * sum(one for one in numels if one < config.zero.persistence_threshold),
            buffers=sum(one.numel() * one.element_size() for one in model.buffers()),
            largest=FP32_BYTES * max(numels),
            stage=stage,
            ranks=ranks,
            accumulates=accumulates,
            on_gpu=on_gpu,
            offload=config.zero.offload_optimizer and on_gpu,
            heap_factor=_heap_factor(config.backbone.precision, stage),
            bucket=FP32_BYTES * config.zero.bucket_elements,
            step=step,
        )
        estimates.append(_estimate_rank(rank, config, sizes))
    return estimates


def _heap_factor(precision: str, stage: int) -> float:
    return HEAP_FACTOR[precision] + (STAGE3_HEAP_FACTOR[precision] if stage == 3 else 0.0)


def _as_it_will_run(config: Config, on_gpu: bool) -> Config:
    """`auto` as it is decided on the device, which need not be this one."""
    backbone = config.backbone
    if backbone.attention == "auto":
        backbone = replace(backbone, attention="sdpa" if on_gpu else "packed")
    if backbone.precision == "auto":
        fast = on_gpu or has_fast_bf16(torch.device("cpu"))
        backbone = replace(backbone, precision="bf16" if fast else "fp32")
    return replace(config, backbone=backbone)


def _estimate_rank(rank: _Rank, config: Config, sizes: DataSizes) -> MemoryEstimate:
    standing = _standing(rank, config, sizes)
    phases = {"passes": standing | _forward_backward(rank), "step": standing | _optimizer_step(rank)}
    phase, parts = max(phases.items(), key=lambda item: sum(item[1].values()))
    parts = {name: size for name, size in parts.items() if size}
    if not rank.on_gpu:
        parts["export on rank 0"] = 2 * (rank.trainable + rank.frozen)
        parts["free blocks of the heap"] = round((rank.heap_factor - 1) * sum(parts.values()))
        parts["Python and libraries"] = BASE_BYTES
    return MemoryEstimate(stage=rank.stage, phase=phase, parts=parts)


def _standing(rank: _Rank, config: Config, sizes: DataSizes) -> dict[str, int]:
    """What is there in every phase of a step."""
    weights = rank.trainable + rank.frozen
    latents = FP32_BYTES * sizes.num_items * config.tokenizer.num_item_tokens * config.tokenizer.latent_dim
    parts = {
        "weights": weights if rank.stage < 3 else weights // rank.ranks + rank.persistent,
        "weights of the optimizer": rank.share if rank.stage else 0,
        "optimizer moments": 2 * rank.share,
        "gradient partition": rank.share if rank.stage == 3 else 0,
        "moving average, buffers": rank.buffers,
        "item latents": latents,
    }
    if rank.offload:
        parts |= {"weights of the optimizer": 0, "optimizer moments": 0}
    return parts


def _forward_backward(rank: _Rank) -> dict[str, int]:
    parts = {f"activations: {name}": size for name, size in rank.step.parts.items()}
    if rank.stage == 0:
        if rank.accumulates:
            parts["gradients"] = rank.trainable
        else:  # they grow while activations go
            parts["gradients"] = rank.step.with_gradients - rank.step.bytes
        return parts
    if rank.stage == 1 and rank.accumulates:
        parts["gradients"] = rank.trainable
    if rank.stage == 2:
        parts["gradient partition"] = rank.share
    parts["reduce bucket"] = rank.bucket * (2 if rank.stage < 3 else 1) if rank.on_gpu else min(rank.bucket, rank.trainable)
    if rank.stage == 3:
        whole = min(rank.trainable + rank.frozen, FP32_BYTES * MAX_LIVE_ELEMENTS)
        parts["gathered weights"] = whole
        parts["gather buffers"] = min(whole, rank.bucket)
    return parts


def _optimizer_step(rank: _Rank) -> dict[str, int]:
    """AdamW's temporaries have the size of the tensor at hand, which is the flat partition under ZeRO."""
    if rank.stage == 0:
        copies = min(rank.trainable, FP32_BYTES * ALL_REDUCE_ELEMENTS) if rank.ranks > 1 else 0
        temporaries = rank.trainable if rank.on_gpu else 2 * rank.largest
        return {"gradients": rank.trainable, "all-reduce or temporaries": max(copies, temporaries)}
    parts = {"flat gradients": rank.share, "AdamW temporaries": 2 * rank.share}
    if rank.stage < 3:
        parts["gradient partition"] = rank.share
    else:
        parts["reduce bucket"] = rank.bucket if rank.on_gpu else min(rank.bucket, rank.trainable)
    return parts

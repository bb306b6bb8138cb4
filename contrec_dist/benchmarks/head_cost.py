"""What the diffusion head costs: steps with and without its losses, side by side in one process.

Both kinds of step take the same micro-batches, clip, and update the same optimizer and moving average; without means that
`head.losses` (noise, denoiser, error, dispersive distances, and all of it backwards) is not computed. One step of each is
timed in turn, so that whatever else the machine does meets both. No engine runs here: its fixed cost a step would make
the share look smaller. On a CPU the share of the processor time is told too, which other work on the machine blurs less.
"""

import statistics
import time

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from contrec_dist.config import Config
from contrec_dist.model.contrec import ContRec
from contrec_dist.training.loop import TERMS
from contrec_dist.training.rank import TrainingData
from contrec_dist.training.zero3 import parameter_groups


class PlainStep:
    """An optimizer step of one process without an engine; the head's losses can be left out."""

    def __init__(self, config: Config, model: ContRec, device: torch.device):
        self.config, self.device = config, device
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW(parameter_groups(model, config.train.weight_decay), lr=1e-4, betas=(0.9, 0.98))
        self.head_losses = model.head.losses

    def run(self, batches: list, *, with_head: bool) -> np.ndarray:
        """One step over the micro-batches. -> (seconds that passed, seconds of processor time)"""
        self.model.head.losses = self.head_losses if with_head else _no_losses
        start = np.array([time.perf_counter(), time.process_time()])
        for number, batch in enumerate(batches):
            terms = self.model(batch.to(self.device), number)
            self._loss(terms, len(batches)).backward()
        clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], self.config.train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.model.average is not None and with_head:
            self.model.average.update(dict(self.model.head.named_parameters()))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()]) - start

    def _loss(self, terms: dict, num_batches: int) -> torch.Tensor:
        counts = {"lm": terms["num_texts"], "negative": terms["num_targets"]}
        shares = (getattr(self.config.loss, name) * terms[name] / counts.get(name, 1.0) for name in TERMS)
        return sum(shares) / num_batches


def measure_head(config: Config, data: TrainingData, *, num_steps: int, num_repeats: int, num_warmup: int) -> dict:
    """Median share of a step that the head's losses take, with the range over the repeats."""
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = PlainStep(config, data.build_model(config), device)
    global_batches = read_global_batches(config, data, num_steps)
    for number in range(num_warmup):
        step.run(global_batches[number % num_steps], with_head=bool(number % 2))
    shares, seconds = [], []
    for _ in range(num_repeats):
        spent = {True: np.zeros(2), False: np.zeros(2)}
        for number, batches in enumerate(global_batches):
            for with_head in (True, False) if number % 2 else (False, True):
                spent[with_head] += step.run(batches, with_head=with_head)
        shares.append((1 - spent[False] / spent[True]).tolist())
        seconds.append(float(spent[True][0]) / num_steps)
    passed, processor = zip(*shares)
    return {
        "share": statistics.median(passed), "share_least": min(passed), "share_most": max(passed),
        "processor_share": statistics.median(processor) if device.type == "cpu" else None,
        "step_seconds": statistics.median(seconds),
        "width": config.head.width, "num_blocks": config.head.num_blocks,
        "batch_mul": config.head.batch_mul, "max_targets": config.head.max_targets,
    }  # fmt: skip


def read_global_batches(config: Config, data: TrainingData, count: int) -> list[list]:
    """The first global batches of an epoch, each as its micro-batches."""
    train, plan = config.train, data.rows.plan(0)
    batches = []
    for first in range(0, train.global_batch_rows * count, train.micro_batch_rows):
        rows = np.arange(first, first + train.micro_batch_rows) % len(plan.rows)
        batches.append(data.rows.build(plan, rows, train.micro_batch_rows))
    size = train.global_batch_rows // train.micro_batch_rows
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def _no_losses(condition: torch.Tensor, *_) -> dict[str, torch.Tensor]:
    nothing = condition.new_zeros((), dtype=torch.float32)
    return {"diffusion": nothing, "dispersive": nothing}

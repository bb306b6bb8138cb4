"""The training loop: plan, forward, backward, step, checkpoint; the same losses whatever the number of ranks.

Every random draw of a step comes from (seed, step, micro-batch number) and the data order from (seed, epoch, step), so a
resumed run repeats the uninterrupted one. Losses are sums divided by the counts of the whole global batch.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from contrec_dist.config import Config
from contrec_dist.data.batches import EpochPlan, TrainingRows
from contrec_dist.data.packed_batch import PackedBatch
from contrec_dist.errors import ContRecError, StageStopped
from contrec_dist.progress import get_logger, track
from contrec_dist.training.bad_shards import BadShards
from contrec_dist.training.checkpoint import load_checkpoint, save_checkpoint
from contrec_dist.training.checkpoint_files import TrainingPosition
from contrec_dist.training.frozen_base import find_frozen_base
from contrec_dist.training.monitor import TrainingMonitor
from contrec_dist.training.probe import ValidationProbe
from contrec_dist.training.step_lines import METRICS_NAME, append_line, trim_lines
from contrec_dist.training.stop import StopRequest
from contrec_dist.training.watchdog import Watchdog
from contrec_dist.training.zero3 import learning_rate_at
from sharding.partition import count_steps, rank_micro_batches
from sharding.token_writer import sample_key

TERMS = ("lm", "negative", "diffusion", "dispersive")
NAMED_SAMPLES = 64


class MicroBatches(Dataset):
    """A rank's steps of an epoch: item i is step first_step + i, a list of (micro-batch number, PackedBatch)."""

    def __init__(self, rows: TrainingRows, plan: EpochPlan, config: Config, first_step: int):
        self.rows, self.plan, self.train, self.first_step = rows, plan, config.train, first_step
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def __len__(self) -> int:
        return count_steps(len(self.plan.rows), self.train.global_batch_rows) - self.first_step

    def __getitem__(self, index: int) -> list[tuple[int, PackedBatch]] | ContRecError:
        """A named error is handed over as a value: torch would bring it out of a worker as a RuntimeError."""
        try:
            return self._build_step(index)
        except ContRecError as error:
            return error

    def _build_step(self, index: int) -> list[tuple[int, PackedBatch]]:
        micro_batches = rank_micro_batches(
            self.first_step + index,
            num_rows=len(self.plan.rows),
            global_batch_rows=self.train.global_batch_rows,
            micro_batch_rows=self.train.micro_batch_rows,
            rank=self.rank,
            world_size=self.world_size,
        )
        return [
            (number, self.rows.build(self.plan, row_numbers, self.train.micro_batch_rows))
            for number, row_numbers in micro_batches
        ]

    def load(self, num_workers: int) -> Iterator[list[tuple[int, PackedBatch]]]:
        """The steps in order, built ahead by so many processes; 0: when they are asked for.

        Errors   ContRecError that building one met
        """
        for step in DataLoader(self, batch_size=None, num_workers=num_workers, prefetch_factor=2 if num_workers else None):
            if isinstance(step, ContRecError):
                raise step
            yield step

    def name_samples(self, epoch_step: int, number: int) -> str:
        """Keys, as in the shards, of the samples in one micro-batch of a step of the epoch."""
        rows = self.train.micro_batch_rows
        first = epoch_step * self.train.global_batch_rows + number * rows
        samples = [int(sample) for row in self.plan.rows[first : first + rows] for sample in row]
        named = ", ".join(sample_key(int(self.plan.user[sample])) for sample in samples[:NAMED_SAMPLES])
        return named + (f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else "")


class TrainingLoop:
    """Runs a DeepSpeed engine over the plan of every epoch. All ranks call every method together."""

    def __init__(
        self, config: Config, engine, rows: TrainingRows, folder: Path, watchdog: Watchdog, probe: ValidationProbe | None = None
    ):
        self.config, self.engine, self.rows, self.folder, self.watchdog = config, engine, rows, folder, watchdog
        self.log = get_logger("train")
        self.monitor = TrainingMonitor(config, engine, folder, probe)
        self.position = TrainingPosition()
        self.saved_step = -1
        self.step_is_good = True
        if config.zero.stage == 0:  # without ZeRO, DeepSpeed applies gradients that are not finite
            engine.optimizer.register_step_pre_hook(self._withhold_bad_step)
        self.base = find_frozen_base(config.backbone)
        self.bad_shards = BadShards(config, rows, engine.device)
        self.stop = StopRequest(config)

    def fit(self) -> None:
        """Train to the end, from the checkpoint that launch.resume asks for.

        Errors   StageStopped after SIGTERM, SIGINT or a stop-file, with a checkpoint of the last step in place
                 ContRecError when more than max_bad_steps steps could not be applied
                 ArtifactError when more than max_bad_shards shards cannot be read
        """
        resumed = load_checkpoint(self.engine, self.folder, resume=self.config.launch.resume, base=self.base)
        if resumed is not None:
            self.position, self.saved_step = resumed, resumed.step
            if dist.get_rank() == 0:
                self.log.info("resumed at step %d (epoch %d)", resumed.step, resumed.epoch)
        self.watchdog.beat("checkpoint loaded")
        self.position = self.bad_shards.agree(self.position, is_resumed=resumed is not None, beat=self.watchdog.beat)
        if dist.get_rank() == 0:
            trim_lines(self.folder / METRICS_NAME, self.position.step)
        self.monitor.start(self.position.step)
        try:
            self._train_epochs()
        finally:
            self.monitor.close()

    def _train_epochs(self) -> None:
        self._probe_if_due()  # a stop asked for during this step's probe ended it
        while self.position.epoch < self.config.train.num_epochs and not self._steps_exhausted():
            self._train_epoch()
        self._save_checkpoint()
        self._probe_if_due(at_end=True)
        self._stop_if_asked()

    def _train_epoch(self) -> None:
        with self.monitor.data_wait():
            plan = self.rows.plan(self.position.epoch)
        dataset = MicroBatches(self.rows, plan, self.config, self.position.epoch_step)
        num_steps = len(dataset) + self.position.epoch_step
        if self.position.epoch_step == 0 and dist.get_rank() == 0:
            padding = plan.padding_ratio(self.config.train.row_tokens)
            self.log.info(
                "epoch %d: %d samples in %d rows, %d steps, padding %.1f%%",
                self.position.epoch, plan.num_samples, len(plan.rows), num_steps, 100 * padding,
            )  # fmt: skip
        steps = self.monitor.waiting(dataset.load(num_loader_workers(self.config, self.engine.device)))
        if dist.get_rank() == 0:
            name = f"train epoch {self.position.epoch + 1}/{self.config.train.num_epochs}"
            steps = track(
                steps, stage=name, unit="steps", total=num_steps, done=self.position.epoch_step,
                describe=self.monitor.describe,
            )  # fmt: skip
        for micro_batches in steps:
            self.monitor.before_step(self.position.step + 1)
            self._train_step(micro_batches, num_steps, dataset)
            self._probe_if_due()
            self._checkpoint_if_due()
            if self._steps_exhausted():
                return
        self.position = replace(self.position, epoch=self.position.epoch + 1, epoch_step=0)

    def _train_step(
        self, micro_batches: list[tuple[int, PackedBatch]], steps_in_epoch: int, dataset: MicroBatches
    ) -> None:
        self._set_learning_rate(steps_in_epoch)
        counts = self._global_counts(micro_batches)
        self.position = self.bad_shards.count_skipped(self.position, [batch for _, batch in micro_batches])
        sums = {}
        for number, batch in micro_batches:
            if sums:
                self.engine.step()  # of the micro-batch before: the last one waits until all losses are known
            terms = self._forward(number, batch, counts)
            self.engine.backward(self._weighted(terms) * dist.get_world_size() * len(micro_batches))
            sums[number] = [float(terms[name].detach()) for name in TERMS]
        losses = self._sum_over_ranks(list(sums.values()))
        self.step_is_good = math.isfinite(losses["loss"])
        self.engine.step()
        if not (self.step_is_good and self.engine.was_step_applied()):
            self._refuse_bad_step(losses["loss"], dataset, sums)
        else:
            self._update_average()
        self.position = replace(
            self.position, step=self.position.step + 1, epoch_step=self.position.epoch_step + 1
        )
        self._record(losses, counts)
        self.watchdog.beat(f"step {self.position.step}")
        num_targets, _, num_tokens = counts.long().tolist()
        self.monitor.after_step(self.position.step, [batch for _, batch in micro_batches], losses, num_tokens, num_targets)

    def _forward(self, number: int, batch: PackedBatch, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        """This micro-batch's share of each term of the global batch's loss."""
        seed = _draw_seed(self.config.seed, self.position.step, number)
        out = self.engine(batch.to(self.engine.device), seed)
        num_targets, num_texts, _ = counts.to(self.engine.device, torch.float32).clamp(min=1)
        share = out["num_targets"] / num_targets
        return {
            "lm": out["lm"] / num_texts,
            "negative": out["negative"] / num_targets,
            "diffusion": out["diffusion"] * share,
            "dispersive": out["dispersive"] * share,
        }

    def _weighted(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss; where it is infinite all its gradients are NaN, so that no rank can take them for good ones."""
        loss = sum(getattr(self.config.loss, name) * terms[name] for name in TERMS)
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)

    def _global_counts(self, micro_batches: list[tuple[int, PackedBatch]]) -> torch.Tensor:
        """Targets, text labels and positions in use of the whole global batch. -> (3,) float64"""
        counts = torch.tensor(
            [sum(len(batch.target_idx) for _, batch in micro_batches),
             sum(len(batch.text_labels) for _, batch in micro_batches),
             sum(int((batch.segments > 0).sum()) for _, batch in micro_batches)],
            dtype=torch.float64, device=self.engine.device,
        )  # fmt: skip
        dist.all_reduce(counts)
        return counts.cpu()

    def _update_average(self) -> None:
        model = self.engine.module
        if model.average is None:
            return
        import deepspeed

        parameters = dict(model.head.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=self.config.zero.stage == 3):
            model.average.update(parameters)

    def _set_learning_rate(self, steps_in_epoch: int) -> None:
        train, position = self.config.train, self.position
        if train.max_steps:
            progress = (position.step + 1) / train.max_steps
        else:
            progress = (position.epoch + (position.epoch_step + 1) / steps_in_epoch) / train.num_epochs
        rate = learning_rate_at(progress, peak=train.learning_rate, warmup_ratio=train.warmup_ratio)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.learning_rate = rate

    def _withhold_bad_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """Without gradients the optimizer leaves weights and moments as they are."""
        gradients = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        self.step_is_good &= bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        if not self.step_is_good:
            optimizer.zero_grad(set_to_none=True)

    def _sum_over_ranks(self, shares: list[list[float]]) -> dict[str, float]:
        """The loss of the global batch and its terms, from every rank's shares (micro-batches, terms)."""
        total = torch.tensor(shares, dtype=torch.float64).sum(0).to(self.engine.device)
        dist.all_reduce(total)
        values = dict(zip(TERMS, total.tolist()))
        return {"loss": sum(getattr(self.config.loss, name) * value for name, value in values.items()), **values}

    def _record(self, losses: dict[str, float], counts: torch.Tensor) -> None:
        """Append a line of metrics now and then; what is not finite is null there."""
        if dist.get_rank() == 0 and self.position.step % self.config.train.log_every_steps == 0:
            finite = {name: value if math.isfinite(value) else None for name, value in losses.items()}
            line = {"step": self.position.step, "epoch": self.position.epoch, **finite,
                    "learning_rate": self.learning_rate, "num_targets": int(counts[0])}  # fmt: skip
            if self.config.shards.max_bad_shards:
                line["skipped_samples"] = self.position.skipped_samples
            append_line(self.folder / METRICS_NAME, line)

    def _refuse_bad_step(self, loss: float, dataset: MicroBatches, sums: dict[int, list[float]]) -> None:
        """Count a step whose loss or gradients were not finite and which was not applied; name where it came from.

        Errors   ContRecError once there are more than max_bad_steps
        """
        bad_steps = self.position.bad_steps + 1
        step, rank = self.position.epoch_step, dist.get_rank()
        mine = [
            f"rank {rank}, micro-batch {number}, samples {dataset.name_samples(step, number)}"
            for number, terms in sums.items()
            if not all(map(math.isfinite, terms))
        ]
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        places = "; ".join(place for places in found for place in places) or "gradients of all ranks together"
        message = f"step {self.position.step + 1}: loss {loss}, step not applied: {places}"
        allowed = self.config.train.max_bad_steps
        if bad_steps > allowed:
            raise ContRecError(f"{message}. More than train.max_bad_steps={allowed}; the last good checkpoint is kept")
        if dist.get_rank() == 0:
            self.log.warning("%s (%d of %d allowed)", message, bad_steps, allowed)
        self.position = replace(self.position, bad_steps=bad_steps)

    def _checkpoint_if_due(self) -> None:
        if self.position.step % self.config.train.checkpoint_every_steps == 0:
            self._save_checkpoint()
        self._stop_if_asked()

    def _probe_if_due(self, *, at_end: bool = False) -> None:
        self.monitor.probe_if_due(self.position.step, self._leave_probe, at_end=at_end)

    def _leave_probe(self) -> bool:
        """Asked in front of every part of a probe: whether the run is to stop."""
        self.watchdog.beat(f"part of the probe at step {self.position.step}")
        return bool(self.stop.agree(self.engine.device))

    def _save_checkpoint(self) -> None:
        if self.saved_step != self.position.step:
            with self.monitor.pausing():
                save_checkpoint(self.engine, self.folder, self.position, self.config.train.keep_last_n, self.base)
            self.saved_step = self.position.step
            self.watchdog.beat(f"checkpoint of step {self.position.step}")

    def _stop_if_asked(self) -> None:
        """All ranks together: save and end where one of them was asked to."""
        reason = self.stop.agree(self.engine.device)
        if reason:
            self._save_checkpoint()
            self.stop.honour()
            step, code = self.position.step, self.config.launch.requeue_exit_code
            raise StageStopped(f"stopped at step {step} by {reason}; run the same command again to go on", code)

    def _steps_exhausted(self) -> bool:
        return 0 < self.config.train.max_steps <= self.position.step


def num_loader_workers(config: Config, device: torch.device) -> int:
    """Loader processes of a rank. Building a batch takes some milliseconds: much beside a GPU's step, nothing beside a CPU's."""
    wanted = config.launch.loader_workers
    return wanted if wanted >= 0 else 2 * (device.type == "cuda")


def _draw_seed(seed: int, step: int, number: int) -> int:
    """A 63-bit seed for one micro-batch, the same on any number of ranks."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 65_537 + number)
    return int(torch.randint(2**63 - 1, (), generator=generator))

"""The training scheme of the paper's own code, written plainly on our model: what packing and many targets are measured against.

    one target a sample     a user's newest window, its last item supervised ("suffix augmentation" repeats that target)
    padded prompts          every sample has 1,024 positions of its own, history cut to the newest 20 items
    insertion by loops      continuous tokens are written into the embeddings sample by sample, slot by slot
    logits everywhere       the output layer and its fp32 softmax run over all 1,024 positions, all but the text ignored

Backbone, inputs, diffusion head with its losses, data, precision and optimizer are ours, so on one sample with one target
losses and hidden states are equal (tests/benchmarks). Where the original is slower for other reasons it is given our speed: its
prompts are tokenised beforehand, its attention is the fused kernel, its batches are tried in several sizes, anomaly
detection is off, the catalogue's cross-entropy (which it does not have) is not computed, and no engine stands around it.
Source   arXiv 2504.12007, the authors' repository
"""

import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from contrec_dist.config import Config
from contrec_dist.data.batches import EpochPlan, TrainingRows
from contrec_dist.data.prompts import SampleLayout, lay_out
from contrec_dist.model.backbone import causal_lm
from contrec_dist.model.continuous_inputs import MARKER_ITEM
from contrec_dist.model.contrec import ContRec
from contrec_dist.training.rank import TrainingData
from contrec_dist.training.zero3 import parameter_groups

PROMPT_TOKENS = 1024
MAX_HISTORY = 20
IGNORED = -100


@dataclass(frozen=True)
class PeerSample:
    """One user: `items` (n + 1,) and `latents` (n + 1, K, Z) of the history and, last, of the only target."""

    layout: SampleLayout
    items: np.ndarray
    latents: np.ndarray


class PeerSamples:
    """A user's newest training window as a sample with one target."""

    def __init__(self, config: Config, rows: TrainingRows):
        prompt = replace(config.prompt, max_history=MAX_HISTORY, response_drop=0.0, user_tokens=False)
        train = replace(config.train, row_tokens=PROMPT_TOKENS)
        self.rows = TrainingRows(replace(config, prompt=prompt, train=train), rows.reader, rows.texts, None)
        self.plan: EpochPlan = self.rows.plan(0)
        newest = self.plan.stop == rows.reader.num_train[self.plan.user]
        self.order = np.random.default_rng(config.seed).permutation(np.flatnonzero(newest))

    def read(self, number: int) -> PeerSample:
        """Sample `number` of an endless epoch."""
        return self.read_window(int(self.order[number % len(self.order)]))

    def read_window(self, window: int) -> PeerSample:
        """The sample of one window of the plan."""
        plan, texts, reader = self.plan, self.rows.texts, self.rows.reader
        start, stop = int(plan.start[window]), int(plan.stop[window])
        tokens = reader.read(int(plan.user[window]))
        layout = lay_out(
            texts, tokens.items[start : stop - 1], num_item_tokens=reader.num_item_tokens, num_user_tokens=0,
            response=texts.response_tokens(int(plan.term[window]), int(plan.brand[window])), with_final_marker=True,
        )  # fmt: skip
        return PeerSample(layout, tokens.items[start:stop].astype(np.int64), tokens.latents[start:stop].astype(np.float32))


@dataclass
class PeerBatch:
    """Padded prompts: tokens, attended and labels (B, 1024)."""

    samples: list[PeerSample]
    tokens: Tensor
    attended: Tensor
    labels: Tensor

    @classmethod
    def of(cls, samples: list[PeerSample], device: torch.device) -> "PeerBatch":
        shape = (len(samples), PROMPT_TOKENS)
        tokens, attended = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        for row, sample in enumerate(samples):
            layout = sample.layout
            tokens[row, : layout.length] = layout.tokens
            attended[row, : layout.length] = 1
            first = layout.response_start - 1
            labels[row, first : first + len(layout.response)] = layout.response
        return cls(samples, *(torch.from_numpy(one).to(device) for one in (tokens, attended, labels)))


def peer_losses(model: ContRec, batch: PeerBatch, seed: int) -> dict[str, Tensor]:
    """{"lm": sum, "diffusion", "dispersive": means over the targets, "logits" (B, 1024, V), "condition" (B, D)}."""
    device = batch.tokens.device
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    language = causal_lm(model.backbone)
    with model.autocast(device):
        embeddings = insert_by_loops(model, language.get_input_embeddings()(batch.tokens), batch.samples)
        hidden = language.base_model(
            inputs_embeds=embeddings, attention_mask=batch.attended, use_cache=False
        ).last_hidden_state  # (B, 1024, D)
        logits = language.get_output_embeddings()(hidden)  # (B, 1024, V)
        lm = functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), reduction="sum", ignore_index=IGNORED)
        last = torch.tensor([sample.layout.length - 1 for sample in batch.samples], device=device)
        condition = hidden[torch.arange(len(last), device=device), last]  # (B, D)
        targets = torch.from_numpy(np.stack([sample.latents[-1] for sample in batch.samples])).to(device)
        chosen = torch.randperm(len(last), generator=generator, device=device)  # as ours, which draws its targets
        head_losses = model.head.losses(
            condition[chosen], model.normalise(targets)[chosen].flatten(1), model.loss_config.dispersive_tau, generator
        )
    return {"lm": lm, **head_losses, "logits": logits, "condition": condition}


def insert_by_loops(model: ContRec, embeddings: Tensor, samples: list[PeerSample]) -> Tensor:
    """Continuous tokens and markers written into (B, 1024, D), one sample and one slot after the other."""
    device = embeddings.device
    for row, sample in enumerate(samples):
        items = torch.from_numpy(sample.items[:-1]).to(device)
        latents = model.normalise(torch.from_numpy(sample.latents[:-1]).to(device))
        vectors, _ = model.items(latents.flatten(1), items)
        tokens = model.embed_items(latents, vectors)  # (n, K, D)
        slots, markers = (torch.from_numpy(one).to(device) for one in (sample.layout.slots, sample.layout.markers))
        embeddings[row, markers] = model.inputs.embed_marker(MARKER_ITEM, len(markers)).to(embeddings.dtype)
        for slot in range(slots.shape[1]):
            embeddings[row, slots[:, slot]] = tokens[:, slot].to(embeddings.dtype)
    return embeddings


def measure_peer(
    config: Config, data: TrainingData, *, batch_sizes: list[int], num_steps: int, num_repeats: int, num_warmup: int
) -> dict:
    """Targets/s of the scheme for every batch size, medians over the repeats, and the best of them."""
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = data.build_model(config).to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config.train.weight_decay), lr=1e-4, betas=(0.9, 0.98))
    samples = PeerSamples(config, data.rows)
    sizes = {}
    for size in batch_sizes:
        rates = []
        for repeat in range(num_repeats + 1):
            steps = num_steps if repeat else num_warmup
            start = time.perf_counter()
            for step in range(steps):
                _train_step(config, model, optimizer, samples, first=step * size, size=size, device=device)
            _wait_for(device)
            rates.append(steps * size / (time.perf_counter() - start))
        sizes[size] = {"targets_per_second": statistics.median(rates[1:]), "rates": rates[1:]}
    best = max(sizes, key=lambda size: sizes[size]["targets_per_second"])
    padding = 1 - np.mean([samples.read(number).layout.length for number in range(200)]) / PROMPT_TOKENS
    return {
        "targets_per_second": sizes[best]["targets_per_second"], "batch_size": best, "padding_share": float(padding),
        "prompt_tokens": PROMPT_TOKENS, "by_batch_size": {str(size): values for size, values in sizes.items()},
    }  # fmt: skip


def _train_step(config, model, optimizer, samples: PeerSamples, *, first: int, size: int, device) -> None:
    batch = PeerBatch.of([samples.read(number) for number in range(first, first + size)], device)
    out = peer_losses(model, batch, first)
    weights, num_texts = config.loss, (batch.labels != IGNORED).sum()
    loss = weights.lm * out["lm"] / num_texts + weights.diffusion * out["diffusion"] + weights.dispersive * out["dispersive"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

"""A training step without data: the model's own forward and backward on tensors that have a shape and no memory.

Stage    none: `contrec estimate` asks it what a micro-batch needs beside weights, gradients and optimizer.
Method   The model is built on torch's meta device and run under FakeTensorMode; a dispatch mode counts the bytes of every
         storage from the operator that made it until nothing holds it. So the count follows the code that will run: autocast
         copies of weights, recomputed activations, adapters, the softmax over the catalogue in its chunks.
Limits   What a kernel takes inside itself is not seen. How many different items a sampled softmax meets is data: all are
         taken to be different. Where nothing but the CPU is at hand, a GPU's step is traced with the CPU's kernels.
Cost     seconds, whatever the size of the model.
"""

import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contrec_dist.config import Config
from contrec_dist.data.packed_batch import PackedBatch
from contrec_dist.data.prompts import ItemLayout
from contrec_dist.errors import ConfigError
from contrec_dist.model.backbone import causal_lm, empty_backbone
from contrec_dist.model.contrec import ContRec
from contrec_dist.model.export import build_model
from contrec_dist.model.packed_attention import PACKED

INSTRUCTION_BYTES_PER_TOKEN = 3
"bytes of English a token of the instruction stands for"
RESPONSE_TOKENS = 16
"tokens of a reasoning text (16.5 on Beauty with its own tokenizer)"


@dataclass(frozen=True, kw_only=True)
class DataSizes:
    """What the data decides: items of the catalogue, entries of the text tokenizer, and items of the training samples."""

    num_items: int
    vocab_size: int
    sample_items: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DryStep:
    """Most bytes alive during the forward and backward pass of one micro-batch, beside weights and inputs.

    `parts` says where they were made. `with_gradients` is the same when every weight's gradient stays, as without ZeRO.
    """

    parts: dict[str, int]
    with_gradients: int

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def build_empty_model(config: Config, sizes: DataSizes) -> ContRec:
    """The model of the config on the meta device: every parameter's shape and dtype, none of its memory."""
    shape = (config.tokenizer.num_item_tokens, config.tokenizer.latent_dim)
    with torch.device("meta"):
        return build_model(
            config,
            backbone=empty_backbone(config.backbone, sizes.vocab_size),
            vocab_size=sizes.vocab_size,
            item_latents=torch.zeros(sizes.num_items, *shape),
            num_items=sizes.num_items,
            latent_mean=torch.zeros(shape),
            latent_std=torch.ones(shape),
            log_popularity=torch.zeros(sizes.num_items),
            latent_noise=config.tokenizer.sigma,
        )


def run_dry_step(config: Config, sizes: DataSizes) -> DryStep:
    """Forward and backward of one micro-batch of the config."""
    model = build_empty_model(config, sizes)
    segments, samples = _lay_out_rows(config, sizes)
    apart = model._keep_apart(segments)  # spans of packed attention are decided by numbers, which fake tensors have not
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        model.to_empty(device="cpu").train()
        causal_lm(model.backbone).tie_weights()  # to_empty gave each its own
        model._catalogue = torch.zeros(model._catalogue.shape)
        if causal_lm(model.backbone).config._attn_implementation == PACKED:
            model._keep_apart = lambda segments: apart
        batch = _make_batch(config, samples)
        tracker = _LiveBytes(model)
        with tracker:
            losses = model(batch, 0)
            sum(losses[name] for name in ("lm", "negative", "diffusion", "dispersive")).backward()
    return DryStep(parts=dict(tracker.parts_at_peak), with_gradients=tracker.peak_with_gradients)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Elements by part of the model: {part: (trainable, frozen)}; tied weights once."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        trainable, frozen = counts.get(part, (0, 0))
        if parameter.requires_grad:
            counts[part] = (trainable + parameter.numel(), frozen)
        else:
            counts[part] = (trainable, frozen + parameter.numel())
    return counts


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is active, by the part of the model that was at work."""

    def __init__(self, model: ContRec):
        super().__init__()
        self.live, self.parts_at_peak = Counter(), Counter()
        self.total = self.peak = self.gradients = self.peak_with_gradients = 0
        self.part = "text logits, losses"
        self.seen: weakref.WeakSet = weakref.WeakSet()
        self._name_parts(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._unique2.default and isinstance(args[0], FakeTensor):
            out = _all_different(args[0])
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.live[self.part] += size
        self.total += size
        weakref.finalize(storage, self._free, size, self.part)
        if self.total > self.peak:
            self.peak, self.parts_at_peak = self.total, +self.live
        self.peak_with_gradients = max(self.peak_with_gradients, self.total + self.gradients)

    def _free(self, size: int, part: str) -> None:
        self.live[part] -= size
        self.total -= size

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        self.gradients += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    def _name_parts(self, model: ContRec) -> None:
        """Have the model's calls say which part is at work."""
        self._name(model, "_encode_rows", "backbone")
        self._name(model.head, "losses", "noise draws")
        make_table = model._training_table

        def named_table(*arguments):
            with self._at_work("item vectors"):
                table = make_table(*arguments)
            self._name(table, "cross_entropy", "softmax over items")
            return table

        model._training_table = named_table

    def _name(self, owner: object, method: str, part: str) -> None:
        original = getattr(owner, method)

        def named(*arguments):
            with self._at_work(part):
                return original(*arguments)

        setattr(owner, method, named)

    @contextmanager
    def _at_work(self, part: str):
        before, self.part = self.part, part
        yield
        self.part = before


def _all_different(wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.unique gives when no number stands twice."""
    return torch.empty_like(wanted), torch.empty_like(wanted), wanted.new_empty(0)


def _sample_positions(config: Config, num_items: int) -> tuple[int, int]:
    """Positions of a sample of so many items, and those of its text: -> (all, text)."""
    prompt, inputs = config.prompt, num_items - 1
    titled = inputs if prompt.titled_items < 0 else min(inputs, prompt.titled_items)
    text = round((1 - prompt.response_drop) * min(prompt.max_response_tokens, RESPONSE_TOKENS))
    instruction = -(-len(prompt.instruction.encode()) // INSTRUCTION_BYTES_PER_TOKEN)
    users = config.tokenizer.num_item_tokens if prompt.user_tokens else 0
    item = ItemLayout.of(config.prompt, config.tokenizer.num_item_tokens)
    items = inputs * item.size + titled * prompt.max_title_tokens
    return instruction + users + items + text + int(item.count_final_markers(np.int64(text))), text


def _lay_out_rows(config: Config, sizes: DataSizes) -> tuple[Tensor, list[int]]:
    """A micro-batch as full as it gets with such samples: segments (R, L) int64, and the items of every sample in it.

    Errors   ConfigError when a sample does not fit a row
    """
    row_tokens = config.train.row_tokens
    lengths = [_sample_positions(config, items)[0] for items in sizes.sample_items]
    if max(lengths) > row_tokens:
        expected = f"at least about {max(lengths)}, for a sample of {max(sizes.sample_items)} items"
        raise ConfigError("train.row_tokens", row_tokens, expected)
    segments = torch.zeros(config.train.micro_batch_rows, row_tokens, dtype=torch.int64)
    placed: list[int] = []
    for row in segments:
        start = number = 0
        while start + lengths[len(placed) % len(lengths)] <= row_tokens:
            end, number = start + lengths[len(placed) % len(lengths)], number + 1
            row[start:end] = number
            placed.append(sizes.sample_items[len(placed) % len(lengths)])
            start = end
    return segments, placed


def _make_batch(config: Config, samples: list[int]) -> PackedBatch:
    """A micro-batch with the counts that these samples have; its numbers are of no account."""
    num_tokens, latent_dim = config.tokenizer.num_item_tokens, config.tokenizer.latent_dim
    item = ItemLayout.of(config.prompt, num_tokens)
    rows = (config.train.micro_batch_rows, config.train.row_tokens)
    inputs = sum(samples) - len(samples)
    texts = sum(_sample_positions(config, items)[1] for items in samples)
    users = len(samples) if config.prompt.user_tokens else 0
    numbers = lambda *shape: torch.zeros(shape, dtype=torch.int64)  # noqa: E731
    latents = lambda count: torch.zeros(count, num_tokens, latent_dim)  # noqa: E731
    return PackedBatch(
        tokens=numbers(*rows), segments=numbers(*rows), places=numbers(*rows),
        slots=numbers(*item.slots(np.zeros(inputs, np.int64)).shape), item_idx=numbers(inputs), latents=latents(inputs),
        markers=numbers(len(item.markers(np.zeros(inputs))) + len(samples)), targets=numbers(inputs), target_idx=numbers(inputs),
        target_latents=latents(inputs), user_slots=numbers(users, num_tokens), user_latents=latents(users),
        text_positions=numbers(texts), text_labels=numbers(texts),
    )  # fmt: skip

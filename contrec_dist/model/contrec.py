"""The fused model: batch -> losses in training, prompt -> condition, text and latents in scoring.

One nn.Module holds the backbone, the continuous inputs, the item table and the diffusion head, so that one DeepSpeed
engine partitions and trains them together. `model` knows no files but its own export (export.py).
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from contrec_dist.config import BackboneConfig, HeadConfig, LossConfig
from contrec_dist.data.packed_batch import PackedBatch
from contrec_dist.model.backbone import causal_lm, has_fast_bf16
from contrec_dist.model.continuous_inputs import MARKER_ITEM, MARKER_USER, ContinuousInputs, ItemTable, TurnedLatents
from contrec_dist.model.diffusion_head import DiffusionHead, HeadAverage
from contrec_dist.model.losses import catalogue_cross_entropy, sampled_cross_entropy, token_cross_entropy
from contrec_dist.model.packed_attention import PACKED, PackedSpans

LATENT_NOISE_SCALE = 0.8
"E|n| of a standard normal n is 0.8, so s = sigma * n / 0.8 has E|s| = sigma"


class ContRec(nn.Module):
    """An LLM that reads continuous tokens and a diffusion head that generates them.

    `item_latents` (N, K, Z) are the catalogue's raw latents: a plain tensor, not trained, not saved with the weights and
    not needed (None) to read histories, which bring their own latents. With `head.latents: trained` a learned shift an item turns
    them in training; an export holds the turned ones, and its model takes latents as they come. `new_item_latents` (N, K, Z), raw:
    what the tokenizer makes of the items without their collaborative part; training alone reads them (`head.residual_drop`).
    `latent_mean`, `latent_std` (K, Z) normalise all latents to unit variance.
    `fused_items`: an item is one position of the LLM (prompt.item_layout).
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        backbone_config: BackboneConfig,
        head: HeadConfig,
        loss: LossConfig,
        item_latents: Tensor | None,
        num_items: int,
        latent_mean: Tensor,
        latent_std: Tensor,
        log_popularity: Tensor,
        latent_noise: float,
        user_tokens: bool,
        fused_items: bool = False,
        new_item_latents: Tensor | None = None,
    ):
        super().__init__()
        num_tokens, latent_dim = latent_mean.shape
        width = causal_lm(backbone).config.get_text_config().hidden_size
        self.head_config, self.loss_config, self.backbone_config = head, loss, backbone_config
        self.latent_noise, self.num_items, self.fused_items = latent_noise, num_items, fused_items
        self.backbone = backbone
        self.register_buffer("latent_mean", latent_mean.clone())
        self.register_buffer("latent_std", latent_std.clone())
        self._catalogue, self._new_catalogue = item_latents, new_item_latents
        self.inputs = ContinuousInputs(
            num_item_tokens=1 if fused_items else num_tokens,
            latent_dim=num_tokens * latent_dim if fused_items else latent_dim,
            query_dim=head.query_dim,
            user_dim=latent_dim if user_tokens else 0,
            width=width,
            dropout=head.dropout,
        )
        self.items = ItemTable(
            num_items=num_items,
            latent_width=num_tokens * latent_dim,
            query_dim=head.query_dim,
            residual=head.item_residual,
            log_popularity=log_popularity,
        )
        self.turned = TurnedLatents(num_items=num_items, latent_width=num_tokens * latent_dim) if head.latents == "trained" else None
        self.head = DiffusionHead(head, condition_width=width, latent_width=num_tokens * latent_dim)
        self.average = HeadAverage(dict(self.head.named_parameters()), head.ema_decay) if head.ema_decay else None

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, item_latents: Tensor | None = None) -> "ContRec":
        """The exported model, in eval mode on the CPU; load_export gives its text tokenizer too.

        Errors   ArtifactError naming the file that is missing or does not fit
        """
        from contrec_dist.model.export import load_export  # which builds a ContRec

        return load_export(folder, item_latents=item_latents)[0]

    # -- training ------------------------------------------------------------------------------------------------

    def forward(self, batch: PackedBatch, seed: int) -> dict[str, Tensor]:
        """Sums of the losses of a micro-batch, with what they count.

        `seed` decides every draw of this call (latent noise, dropout, noise levels), whatever ran before.
        Returns {"lm": sum over text labels, "negative": sum over targets, "diffusion", "dispersive": means over the drawn
        targets, "num_targets", "num_texts"}, all () float32.
        """
        device = batch.tokens.device
        torch.manual_seed(seed)
        generator = torch.Generator(device).manual_seed(seed)
        with self.autocast(device):
            latents = self._turn(self.normalise(batch.latents), batch.item_idx)
            target_latents = self._turn(self.normalise(batch.target_latents), batch.target_idx).detach()
            table = self._training_table(batch, generator)
            noisy = self._add_latent_noise(latents, generator)
            hidden = self._encode_rows(batch, noisy, table.vectors[table.input_rows])
            condition = hidden[batch.targets]  # (P, D)
            query = self.head.query(condition)
            chosen = self._choose_targets(len(condition), generator)
            head_losses = self.head.losses(
                condition[chosen], target_latents[chosen].flatten(1), self.loss_config.dispersive_tau, generator
            )
            logits = causal_lm(self.backbone).get_output_embeddings()(hidden[batch.text_positions])
            return {
                "lm": token_cross_entropy(logits, batch.text_labels),
                "negative": table.cross_entropy(query, batch.target_idx, self.num_items),
                **head_losses,
                "num_targets": condition.new_tensor(float(len(condition)), dtype=torch.float32),
                "num_texts": condition.new_tensor(float(len(batch.text_labels)), dtype=torch.float32),
            }

    def _training_table(self, batch: PackedBatch, generator: torch.Generator) -> "TrainingTable":
        """Item vectors of the whole catalogue, or of the inputs, targets and drawn negatives of this micro-batch."""
        device = batch.tokens.device
        if self.loss_config.num_negatives == 0:
            vectors, bias = self._describe(torch.arange(self.num_items, device=device))
            return TrainingTable(vectors, bias, batch.item_idx, batch.target_idx, None, None)
        negatives = torch.randint(
            self.num_items, (self.loss_config.num_negatives,), generator=generator, device=device
        )
        wanted = torch.cat([batch.item_idx, batch.target_idx, negatives])
        rows, place = torch.unique(wanted, return_inverse=True)
        vectors, bias = self._describe(rows)
        inputs, targets, drawn = place.split([len(batch.item_idx), len(batch.target_idx), len(negatives)])
        return TrainingTable(vectors, bias, inputs, targets, drawn, negatives)

    def _encode_rows(self, batch: PackedBatch, latents: Tensor, vectors: Tensor) -> Tensor:
        """Hidden states of packed rows, flat. -> (R * L, D)"""
        embeddings = causal_lm(self.backbone).get_input_embeddings()(batch.tokens)  # (R, L, D)
        num_rows, row_tokens, width = embeddings.shape
        embeddings = self._insert(
            embeddings.flatten(0, 1), batch.slots, self.embed_items(latents, vectors), batch.markers,
            batch.user_slots, self.normalise(batch.user_latents),
        )  # fmt: skip
        hidden = causal_lm(self.backbone).base_model(
            inputs_embeds=embeddings.view(num_rows, row_tokens, width),
            position_ids=batch.places,
            use_cache=False,
            **self._keep_apart(batch.segments),
        ).last_hidden_state
        return hidden.flatten(0, 1)

    def embed_items(self, latents: Tensor, vectors: Tensor) -> Tensor:
        """What the LLM sees of items. latents (n, K, Z) normalised, vectors (n, Q) -> (n, K, D), fused (n, 1, D)"""
        return self.inputs.embed_items(latents.flatten(1)[:, None] if self.fused_items else latents, vectors)

    def _insert(
        self, flat: Tensor, slots: Tensor, items: Tensor, markers: Tensor, user_slots: Tensor, user_latents: Tensor
    ) -> Tensor:
        """Put continuous tokens and markers at their flat positions; text elsewhere. (R * L, D) -> (R * L, D)"""
        positions, values = [slots.flatten(), markers], [items.flatten(0, 1), self.inputs.embed_marker(MARKER_ITEM, len(markers))]
        if self.inputs.project_user is not None:
            user_tokens = self.inputs.embed_users(user_latents) + self.inputs.embed_marker(MARKER_USER, 1)
            positions.append(user_slots.flatten())
            values.append(user_tokens.flatten(0, 1))
        place, value = torch.cat(positions), torch.cat([one.to(flat.dtype) for one in values])
        return flat.index_copy(0, place, value)

    def _keep_apart(self, segments: Tensor) -> dict:
        """What the backbone needs so that no position looks into another sample of its row."""
        if causal_lm(self.backbone).config._attn_implementation != PACKED:
            return {"attention_mask": self._packed_mask(segments)}
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=segments.device)  # else transformers makes a causal one
        return {"attention_mask": unused, "packed_spans": PackedSpans.of(segments)}

    def _packed_mask(self, segments: Tensor) -> Tensor:
        """True where a position may look: its own sample, itself and before. (R, L) -> (R, 1, L, L)"""
        row_tokens = segments.shape[1]
        same = segments[:, :, None] == segments[:, None, :]
        causal = torch.ones(row_tokens, row_tokens, dtype=torch.bool, device=segments.device).tril()
        return self._as_mask((same & causal)[:, None])

    def _as_mask(self, allowed: Tensor) -> Tensor:
        """Eager attention adds the mask to its scores; the others take booleans."""
        if self.backbone_config.attention != "eager":
            return allowed
        return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def _add_latent_noise(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """z + s * eps, s drawn anew for every item (LatentLM), in units of the normalised latent. (n, K, Z)"""
        if not self.training or self.latent_noise == 0.0:
            return latents
        scale = torch.randn(len(latents), 1, 1, generator=generator, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        return latents + self.latent_noise / LATENT_NOISE_SCALE * scale * noise

    def _choose_targets(self, count: int, generator: torch.Generator) -> Tensor:
        """Targets that meet the diffusion loss: all, or `head.max_targets` drawn at random."""
        limit, device = self.head_config.max_targets, self.latent_mean.device
        order = torch.randperm(count, generator=generator, device=device)
        return order[:limit] if limit else order

    # -- both ----------------------------------------------------------------------------------------------------

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents to zero mean and unit variance, fp32. (..., K, Z) -> (..., K, Z)"""
        return (latents.float() - self.latent_mean) / self.latent_std

    def catalogue(self, device: torch.device) -> Tensor:
        """Normalised latents of every item, as they are now. -> (N, K, Z) float32"""
        latents = self.normalise(self._catalogue.to(device))
        return self._turn(latents, torch.arange(len(latents), device=device))

    @torch.no_grad()
    def raw_catalogue(self) -> Tensor:
        """The catalogue's latents as they are now, in the tokenizer's units, on the CPU. -> (N, K, Z) float32"""
        if self.turned is None:
            return self._catalogue
        return (self.catalogue(self.latent_mean.device) * self.latent_std + self.latent_mean).cpu()

    def _describe(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and biases of some items; in training a share of them, drawn anew, as if nobody had met them.

        Those have the latents of the tokenizer, made without their collaborative part where there are such, and no residual.
        Shapes   rows (n,), rising, each once -> (n, Q), (n,)
        """
        share, as_new = self.head_config.residual_drop if self.training else 0.0, None
        latents = self._pick(self._catalogue, rows)
        if share:
            as_new = torch.rand(len(rows), device=rows.device) < share
            if self._new_catalogue is not None:
                latents = torch.where(as_new[:, None, None], self._pick(self._new_catalogue, rows), latents)
        return self.items(self._turn(latents, rows, as_new).flatten(1), rows, as_new)

    def _pick(self, table: Tensor, rows: Tensor) -> Tensor:
        """Normalised rows of a raw table (N, K, Z), rising and each once, without a copy where they are all. -> (n, K, Z)"""
        return self.normalise((table if len(rows) == len(table) else table[rows.cpu()]).to(rows.device))

    def _turn(self, latents: Tensor, item_idx: Tensor, as_new: Tensor | None = None) -> Tensor:
        """Normalised latents as training has turned them. (n, K, Z), (n,), (n,) bool -> (n, K, Z)"""
        return latents if self.turned is None else self.turned(latents, item_idx, as_new)

    def autocast(self, device: torch.device):
        """bf16 matrix products where the config and the hardware say so."""
        wanted = self.backbone_config.precision
        if wanted == "bf16" or (wanted == "auto" and has_fast_bf16(device)):
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()

    @torch.no_grad()
    def item_vectors(self, chunk_rows: int = 65536) -> Tensor:
        """What a query is compared with: vectors and, last, the bias. -> (N, Q + 1) float32"""
        device = self.latent_mean.device
        parts = []
        for start in range(0, self.num_items, chunk_rows):
            rows = torch.arange(start, min(start + chunk_rows, self.num_items), device=device)
            vectors, bias = self._describe(rows)
            parts.append(torch.cat([vectors, bias[:, None]], dim=1).float())
        return torch.cat(parts)


class TrainingTable:
    """Item vectors of one micro-batch: rows of the inputs, rows of the targets, and what the targets compete with."""

    def __init__(self, vectors, bias, input_rows, target_rows, negative_rows, negative_idx):
        self.vectors, self.bias = vectors, bias
        self.input_rows, self.target_rows = input_rows, target_rows
        self.negative_rows, self.negative_idx = negative_rows, negative_idx

    def cross_entropy(self, query: Tensor, target_idx: Tensor, num_items: int) -> Tensor:
        """Sum of the negative term over the targets. query (P, Q), target_idx (P,) -> ()"""
        if self.negative_rows is None:
            return catalogue_cross_entropy(query, self.vectors, self.bias, target_idx)
        return sampled_cross_entropy(
            query, self.vectors[self.target_rows], self.bias[self.target_rows], target_idx,
            self.vectors[self.negative_rows], self.bias[self.negative_rows], self.negative_idx, num_items,
        )  # fmt: skip

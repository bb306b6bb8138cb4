"""The exported model: a folder in Hugging Face style that loads without DeepSpeed.

    config.json           what the model was built with, the hashes of what it belongs to, the bias of new items
    backbone/             the whole LLM (save_pretrained) and its text tokenizer; with adapters: the tokenizer alone
    adapter/              the LoRA adapter (only with adapters; the base is loaded from its own path)
    head.safetensors      continuous inputs, item table, diffusion head (moving average applied), latent statistics
    item_latents.npy      the catalogue's latents (N, K, Z) float32, in the tokenizer's units (only with head.latents: trained)
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contrec_dist.config import BackboneConfig, Config, HeadConfig, LoraConfig, LossConfig, ShapeConfig
from contrec_dist.data.latents import ITEM_LATENTS
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import write_json
from contrec_dist.model.backbone import causal_lm, load_backbone, load_text_tokenizer
from contrec_dist.model.continuous_inputs import TurnedLatents
from contrec_dist.model.contrec import ContRec

BACKBONE_PREFIX = "backbone."
TURNED_PREFIX = "turned."
CHUNK_ITEMS = 65_536


def build_model(
    config: Config, *, vocab_size: int, item_latents: Tensor | None, num_items: int, latent_mean: Tensor,
    latent_std: Tensor, log_popularity: Tensor, latent_noise: float, backbone: nn.Module | None = None,
    new_item_latents: Tensor | None = None,
) -> ContRec:
    """A fresh model of the config, around `backbone` or the one of the config.

    latent_noise: C_sigma of the tokenizer, in units of the normalised latent.
    """
    return ContRec(
        backbone=load_backbone(config.backbone, vocab_size) if backbone is None else backbone,
        backbone_config=config.backbone,
        head=config.head,
        loss=config.loss,
        item_latents=item_latents,
        num_items=num_items,
        latent_mean=latent_mean,
        latent_std=latent_std,
        log_popularity=log_popularity,
        latent_noise=latent_noise,
        user_tokens=config.prompt.user_tokens,
        fused_items=config.prompt.item_layout == "fused",
        new_item_latents=new_item_latents,
    )


def save_export(model: ContRec, state: dict[str, Tensor], tokenizer, folder: Path, facts: dict) -> None:
    """Write the folder from whole (gathered) weights, read every file back, and refuse empty tensors.

    `state` holds every parameter and buffer of the model by its name.
    Errors   ArtifactError naming the file and tensor that came out empty
    """
    folder = Path(folder)
    backbone = {name[len(BACKBONE_PREFIX) :]: value for name, value in state.items() if name.startswith(BACKBONE_PREFIX)}
    head = {name: value.contiguous() for name, value in _with_average(state).items()}
    save_file(head, folder / "head.safetensors", metadata={"format": "pt"})
    if model.turned is not None:
        _save_turned_latents(model, state, folder / ITEM_LATENTS)
    tokenizer.save_pretrained(folder / "backbone")
    target = folder / ("adapter" if model.backbone_config.lora.rank else "backbone")
    model.backbone.save_pretrained(target, state_dict=backbone, safe_serialization=True)
    write_json(folder / "config.json", {**_describe(model), **facts})
    for path in sorted(folder.rglob("*.safetensors")):
        refuse_empty(path)


@torch.no_grad()
def _save_turned_latents(model: ContRec, state: dict[str, Tensor], path: Path) -> None:
    """The catalogue's latents as training left them, a chunk at a time."""
    shift = state[TURNED_PREFIX + "shift.weight"]
    mean, std = state["latent_mean"], state["latent_std"]
    turned = TurnedLatents(num_items=len(shift), latent_width=shift.shape[1])
    turned.shift.weight.copy_(shift)
    raw = model._catalogue.cpu()
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=tuple(raw.shape))
    for rows in torch.arange(len(raw)).split(CHUNK_ITEMS):
        array[rows.numpy()] = (turned((raw[rows].float() - mean) / std, rows) * std + mean).numpy()
    array.flush()


def _with_average(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything but the backbone, the head's parameters replaced by their moving average."""
    head = {}
    for name, value in state.items():
        if name.startswith((BACKBONE_PREFIX, TURNED_PREFIX, "average.")):
            continue
        average = "average." + name.removeprefix("head.").replace(".", "__")
        head[name] = state[average] if name.startswith("head.") and average in state else value
    return head


def _describe(model: ContRec) -> dict:
    return {
        "backbone": dataclasses.asdict(model.backbone_config),
        "head": dataclasses.asdict(model.head_config),
        "loss": dataclasses.asdict(model.loss_config),
        "num_items": model.num_items,
        "num_item_tokens": model.latent_mean.shape[0],
        "latent_dim": model.latent_mean.shape[1],
        "latent_noise": model.latent_noise,
        "user_tokens": model.inputs.project_user is not None,
        "fused_items": model.fused_items,
        "vocab_size": causal_lm(model.backbone).config.get_text_config().vocab_size,
    }


def refuse_empty(path: Path) -> None:
    """Raise ArtifactError naming the tensors of a safetensors file that came out empty."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        empty = [name for name in names if 0 in file.get_slice(name).get_shape()]
    if empty or not names:
        raise ArtifactError(path, f"empty tensors {empty}" if names else "no tensors", "whole weights")


def load_export(folder: str | Path, *, item_latents: Tensor | None = None):
    """Load (model in eval mode, text tokenizer) from an exported folder, on the CPU, without DeepSpeed.

    Errors   ArtifactError naming the file that is missing or does not fit
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ArtifactError(folder, "no config.json", "a folder written by the train stage")
    described = json.loads((folder / "config.json").read_text())
    backbone_config = _backbone_config(described["backbone"], folder)
    latent_shape = (described["num_item_tokens"], described["latent_dim"])
    tokenizer = load_text_tokenizer(folder / "backbone")
    model = ContRec(
        backbone=_load_trained_backbone(backbone_config, folder),
        backbone_config=backbone_config,
        head=dataclasses.replace(HeadConfig(**described["head"]), ema_decay=0.0, latents="frozen"),  # the folder's are turned
        loss=LossConfig(**described["loss"]),
        item_latents=item_latents,
        num_items=described["num_items"],
        latent_mean=torch.zeros(latent_shape),
        latent_std=torch.ones(latent_shape),
        log_popularity=torch.zeros(described["num_items"]),
        latent_noise=described["latent_noise"],
        user_tokens=described["user_tokens"],
        fused_items=described.get("fused_items", False),  # an export of before
    )
    model.items.new_item_bias = described.get("new_item_bias")
    missing, unexpected = model.load_state_dict(load_file(folder / "head.safetensors"), strict=False)
    missing = [name for name in missing if not name.startswith(BACKBONE_PREFIX)]
    if missing or unexpected:
        raise ArtifactError(folder / "head.safetensors", f"missing {missing}, unknown {unexpected}", "the model's weights")
    return model.eval(), tokenizer


def _backbone_config(described: dict, folder: Path) -> BackboneConfig:
    lora, shape = LoraConfig(**described.pop("lora")), ShapeConfig(**described.pop("shape"))
    return BackboneConfig(**{**described, "lora": lora, "shape": shape, "activation_checkpointing": False})


def _load_trained_backbone(config: BackboneConfig, folder: Path):
    """The exported backbone; with adapters the base from its own path and the adapter on it."""
    if not config.lora.rank:
        return load_backbone(dataclasses.replace(config, path=str(folder / "backbone")), vocab_size=0)
    from peft import PeftModel

    base = load_backbone(dataclasses.replace(config, lora=LoraConfig(rank=0)), vocab_size=0)
    return PeftModel.from_pretrained(base, folder / "adapter")

"""The LLM: any causal LM that transformers loads, or a small one from a shape, trained from scratch.

Under ZeRO-3 a `HfDeepSpeedConfig` must be alive while `load_backbone` runs, so that a large model is born partitioned.
"""

from pathlib import Path
from typing import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging

from contrec_dist.config import BackboneConfig, LoraConfig, ShapeConfig
from contrec_dist.errors import ConfigError
from contrec_dist.model.dropout import dropout
from contrec_dist.model.packed_attention import PACKED

logging.disable_progress_bar()  # bars for writing and reading a model, once a rank and a worker, bury the stages' logs
MAX_POSITIONS = 4096
END_OF_TEXT = "<|end|>"


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned on the catalogue's texts; any text can be written with it.

    Errors   ConfigError when vocab_size is below the 256 bytes and the special token.
    """
    if vocab_size < 300:
        raise ConfigError("backbone.shape.vocab_size", vocab_size, "at least 300 (256 bytes, merges, special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def load_text_tokenizer(folder: str | Path):
    """The tokenizer that lies beside a model. Errors   ConfigError when it has no end token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ConfigError("backbone.path", str(folder), "a model whose tokenizer has an end-of-text token")
    return tokenizer


def load_backbone(config: BackboneConfig, vocab_size: int) -> nn.Module:
    """The causal LM of the config in fp32, with adapters where asked; from `path`, or from scratch by `shape`.

    Errors   ConfigError for adapters without `path`: a base of random weights would be frozen, and is not exported
    """
    if not config.path:
        return empty_backbone(config, vocab_size)
    model = AutoModelForCausalLM.from_pretrained(
        config.path, dtype=torch.float32, attn_implementation=attention_kernel(config.attention)
    )
    return _prepare(model, config)


def empty_backbone(config: BackboneConfig, vocab_size: int) -> nn.Module:
    """The same modules with fresh weights: of `path` only its config.json is read (under torch.device("meta"): no weights).

    Errors   ConfigError as load_backbone, and when transformers finds no config at `path`
    """
    if config.lora.rank and not config.path:
        raise ConfigError("backbone.lora.rank", config.lora.rank, "0 where backbone.path is empty: adapters need a trained base")
    try:
        shape = AutoConfig.from_pretrained(config.path) if config.path else shape_to_config(config.shape, vocab_size)
    except OSError as error:
        raise ConfigError("backbone.path", config.path, f"a folder or hub name that is there ({error})") from None
    model = AutoModelForCausalLM.from_config(
        shape, dtype=torch.float32, attn_implementation=attention_kernel(config.attention)
    )
    if not config.path and config.shape.hidden_dropout:
        add_hidden_dropout(model, config.shape.hidden_dropout)
    return _prepare(model, config)


def _prepare(model: nn.Module, config: BackboneConfig) -> nn.Module:
    model.config.use_cache = False
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return add_adapters(model, config.lora) if config.lora.rank else model


def attention_kernel(attention: str) -> str:
    """transformers' name of the kernel; `auto` works sample by sample on CPUs and leaves GPUs their fused kernel."""
    if attention == "auto":
        attention = "sdpa" if torch.cuda.is_available() else "packed"
    return PACKED if attention == "packed" else attention


def shape_to_config(shape: ShapeConfig, vocab_size: int):
    """transformers' config of a small backbone. Errors   ConfigError when the heads do not divide the width."""
    if shape.hidden_size % shape.num_heads:
        raise ConfigError("backbone.shape.hidden_size", shape.hidden_size, f"a multiple of num_heads={shape.num_heads}")
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape.family]
    return kind(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=MAX_POSITIONS,
        attention_dropout=shape.attention_dropout,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def add_adapters(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """Freeze the backbone and add LoRA to the named layers.

    Errors   ConfigError when no layer has one of the names.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if not names & set(lora.target_modules):
        raise ConfigError("backbone.lora.target_modules", lora.target_modules, f"names among {sorted(names)}")
    peft_config = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, peft_config, autocast_adapter_dtype=False)


def add_hidden_dropout(model: nn.Module, share: float) -> None:
    """Dropout on both branches of every layer while it trains; transformers' Llama and Qwen have none there."""

    def drop(module: nn.Module, _, output: Tensor) -> Tensor:
        return dropout(output, share, module.training)

    for layer in model.base_model.layers:
        for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
            branch.register_forward_hook(drop)


def causal_lm(backbone: nn.Module) -> nn.Module:
    """The transformers model inside, with or without adapters (which are injected in place)."""
    return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 run on hardware: a GPU that supports them, or a CPU with bf16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

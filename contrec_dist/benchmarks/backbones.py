"""Backbones of known shapes with random weights: what a large model costs to train does not depend on what it knows.

A folder in Hugging Face style is written, so that the benchmark loads it as it would load the real one (adapters and
ZeRO-3's partitioned loading included).
"""

import json
from pathlib import Path

import polars as pl

from contrec_dist.config import Config
from contrec_dist.errors import ConfigError

SHAPES = {
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip


def read_shape(named: str) -> dict:
    """Settings of a named shape, or of a transformers config.json.

    Errors   ConfigError when it is neither
    """
    if named in SHAPES:
        return dict(SHAPES[named])
    try:
        shape = json.loads(Path(named).read_text())
    except (OSError, ValueError) as error:
        expected = f"one of {sorted(SHAPES)}, or a transformers config.json with a model_type"
        raise ConfigError("--random_backbone", f"{named} ({error})", expected) from None
    if "model_type" not in shape:
        raise ConfigError("--random_backbone", f"{named} without model_type", "a transformers config.json")
    return shape


def write_random_backbone(named: str, config: Config, folder: Path) -> Path:
    """Random bf16 weights of the shape, and a text tokenizer learned on the catalogue (smaller than the vocabulary)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from contrec_dist.model.backbone import train_text_tokenizer

    shape = read_shape(named)
    settings = AutoConfig.for_model(shape.pop("model_type"), **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, **shape})
    titles = pl.read_parquet(config.folder("catalog") / "items.parquet")["title"].to_list()
    vocab_size = min(config.backbone.shape.vocab_size, settings.get_text_config().vocab_size)
    tokenizer = train_text_tokenizer([config.prompt.instruction, *titles], vocab_size)
    torch.manual_seed(config.seed)
    AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

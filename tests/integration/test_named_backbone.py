"""A backbone folder as people have it: small Llama and Qwen2 models saved by transformers with a tokenizer, adapted with
LoRA under ZeRO-3 on two ranks, exported, loaded without DeepSpeed and scored.
"""

import json
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from launched import copy_run, file_hashes, run_several
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from contrec_dist.__main__ import main
from contrec_dist.config import Config, LoraConfig
from contrec_dist.manifest import stage_identity
from contrec_dist.model.backbone import train_text_tokenizer
from contrec_dist.model.export import load_export
from contrec_dist.retrieval.user_views import UserViews
from contrec_dist.training.train import STAGE

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's call
]
INPUTS = ("catalog", "embeddings", "tokenizer", "tokens")
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config}
RUNS = {"llama": ("llama", 3), "qwen2": ("qwen2", 3), "llama_stage2": ("llama", 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("backbones")


@pytest.fixture(scope="module")
def requests() -> list[str]:
    """Requests that reached the only model hub there is, which knows nothing."""
    return []


@pytest.fixture(scope="module")
def trained(run_config, reference, folder, requests) -> dict[str, Config]:
    """Both backbones adapted under ZeRO-3, and Llama under stage 2, where nothing is partitioned."""
    configs = {}
    for family, kind in FAMILIES.items():
        _save_backbone(kind, run_config, reference[0], folder / f"{family}_base")
    for name, (family, stage) in RUNS.items():
        config = replace(
            run_config,
            run_dir=str(folder / name),
            backbone=replace(run_config.backbone, path=str(folder / f"{family}_base"), lora=LoraConfig(rank=4)),
            zero=replace(run_config.zero, stage=stage, persistence_threshold=0),
            train=replace(run_config.train, num_epochs=1),
        )
        configs[name] = copy_run(reference[0], config, *INPUTS)
    for name in ("cut", "moved"):
        config = replace(configs["llama"], run_dir=str(folder / name))
        configs[name] = copy_run(reference[0], config, *INPUTS)
    configs["cut_again"] = configs["cut"]
    configs["other_base"] = _on_another_base(configs["llama"], reference[0], folder)
    hub = _start_hub(requests)
    try:
        stops = ("--stop=cut=3", "--stop=moved=3")
        run_several(configs, folder, *stops, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_OFFLINE="0")
    finally:
        hub.shutdown()
        hub.server_close()
    return configs


@pytest.mark.parametrize("family", FAMILIES)
def test_named_backbone_is_born_partitioned(trained, folder, family):
    for rank in (0, 1):
        seen = json.loads((folder / f"{family}-rank{rank}.json").read_text())
        assert seen["error"] == ""
        assert seen["here"] == seen["adapters"] > 0  # of the base nothing is whole on a rank, adapters are new
        assert seen["whole"] > 10 * seen["adapters"]


def test_partitioned_backbone_has_the_weights_of_its_folder(trained):
    """Stage 2 loads the base whole: losses that equal those of stage 3 come from the same weights."""
    partitioned, whole = (_losses(trained[name]) for name in ("llama", "llama_stage2"))
    np.testing.assert_allclose(partitioned, whole, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_adapter_is_whole_and_learned(trained, family):
    adapter = load_file(trained[family].folder("model") / "adapter" / "adapter_model.safetensors")
    targets = len(LoraConfig().target_modules)
    assert len(adapter) == 2 * targets  # A and B of every adapted matrix of the one layer
    assert all(value.numel() > 0 and torch.isfinite(value).all() for value in adapter.values())
    learned = [name for name, value in adapter.items() if "lora_B" in name and value.abs().max() > 0]  # B starts at 0
    assert len(learned) == targets


@pytest.mark.parametrize("family", FAMILIES)
def test_export_loads_without_deepspeed_and_reads_histories(trained, family):
    config = trained[family]
    model, tokenizer = load_export(config.folder("model"))
    base = AutoModelForCausalLM.from_pretrained(config.backbone.path)
    name = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(
        model.backbone.get_base_model().get_submodule(name).base_layer.weight, base.get_submodule(name).weight
    )
    views = UserViews.open(config, model, tokenizer)
    users = np.arange(8)
    reading = views.read(users, "validation", reasoning=True)
    assert reading.condition.shape == (8, config.backbone.shape.hidden_size)
    assert torch.isfinite(reading.condition).all() and len(reading.reasons) == 8
    vectors = np.load(config.folder("model") / "item_vectors.npy")
    assert np.isfinite(views.queries(reading.condition).numpy() @ vectors.T).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_merged_into_its_base_reads_histories_as_the_run_does(trained, folder, family):
    config, target = trained[family], folder / f"{family}_merged"
    assert main(["export", "--merge", "--output", str(target), "--config", str(folder / f"{family}.yaml")]) == 0
    conditions = []
    for place in (config.folder("model"), target):
        model, tokenizer = load_export(place)
        views = UserViews.open(config, model, tokenizer)
        conditions.append(views.read(np.arange(8), "validation", reasoning=False).condition)
    torch.testing.assert_close(*conditions, atol=1e-5, rtol=1e-5)
    assert not hasattr(model.backbone, "peft_config")


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_adapters_are_complete(trained, family):
    assert list(Path(trained[family].run_dir).glob("checkpoints/*/step-*/complete.json"))


def test_checkpoint_of_adapters_holds_no_base(trained):
    """Neither under its first names nor under those of tied weights, in any rank's files."""
    checkpoint = max(Path(trained["llama_stage2"].run_dir).glob("checkpoints/*/step-*"))
    base = load_export(trained["llama_stage2"].folder("model"))[0].backbone.get_base_model()
    state = torch.load(checkpoint / "state" / "mp_rank_00_model_states.pt", weights_only=False)
    assert not [name for name in state["module"] if name.startswith("backbone.") and "lora_" not in name]
    assert state["frozen_param_fragments"] is None
    num_base = sum(value.numel() for value in base.state_dict().values() if value.is_floating_point())
    kept = sum(value.numel() for name, value in state["module"].items() if "lora_" in name)
    assert 0 < 10 * kept < num_base


def test_adapters_stopped_and_run_again_equal_uninterrupted_to_the_bit(trained, folder):
    assert "stopped at step 3 " in json.loads((folder / "cut-rank0.json").read_text())["error"]
    assert file_hashes(trained["cut_again"], "model") == file_hashes(trained["llama"], "model")


def test_adapters_go_on_with_another_number_of_ranks(trained, folder):
    """The universal form, too, is made of a checkpoint without the base."""
    run_several({"moved": trained["moved"]}, folder, num_ranks=1)
    assert "resumed at step 3 " in (folder / "several_on_1.log").read_text()
    np.testing.assert_allclose(_losses(trained["moved"]), _losses(trained["llama"]), rtol=1e-5)


def test_adapters_are_not_put_on_another_base(trained, folder):
    for rank in (0, 1):
        error = json.loads((folder / f"other_base-rank{rank}.json").read_text())["error"]
        assert f"adapters of the base {trained['llama'].backbone.path} (sha256 " in error
        assert f"expected those of the base {trained['other_base'].backbone.path} (sha256 " in error


def test_training_and_export_ask_no_hub(trained, requests):
    assert requests == []


def _save_backbone(kind: type, config: Config, source: Config, folder: Path) -> None:
    """A folder that transformers' save_pretrained wrote: model and tokenizer."""
    titles = pl.read_parquet(source.folder("catalog") / "items.parquet")["title"].to_list()
    tokenizer = train_text_tokenizer([config.prompt.instruction, *titles], 400)
    torch.manual_seed(1)
    shape = config.backbone.shape
    model = AutoModelForCausalLM.from_config(kind(
        vocab_size=len(tokenizer), hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    ))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _on_another_base(config: Config, source: Config, folder: Path) -> Config:
    """The same run over a base of the same shape and other weights, told to go on from the first one's checkpoint."""
    path = folder / "other_llama_base"
    shutil.copytree(config.backbone.path, path)
    weights = load_file(path / "model.safetensors")
    save_file({name: value + 0.1 for name, value in weights.items()}, path / "model.safetensors", {"format": "pt"})
    identity, _, _ = stage_identity(config, STAGE["sections"], STAGE["inputs"])
    named = config.folder("checkpoints") / identity[:12] / "step-00000004"
    other = replace(
        config, run_dir=str(folder / "other"), backbone=replace(config.backbone, path=str(path)),
        launch=replace(config.launch, resume=str(named)),
    )  # fmt: skip
    return copy_run(source, other, *INPUTS)


def _losses(config: Config) -> list[float]:
    lines = (config.folder("model") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _start_hub(requests: list[str]) -> ThreadingHTTPServer:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return hub

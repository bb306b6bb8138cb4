"""model/standalone.py: what `contrec export` writes loads anywhere and is the run's model, or is not there."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from contrec_dist.__main__ import main
from contrec_dist.config import BackboneConfig, LoraConfig
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import run_stage
from contrec_dist.model.backbone import causal_lm, load_backbone
from contrec_dist.model.contrec import ContRec
from contrec_dist.model.export import save_export
from contrec_dist.model.standalone import write_standalone

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's call


@pytest.fixture
def run(make_world, tmp_path, monkeypatch):
    """A run in the current folder whose model/ is complete: a saved base, named by a relative path, with learned adapters."""
    monkeypatch.chdir(tmp_path)
    world = make_world([[1, 4, 7, 10]])
    load_backbone(world.config.backbone, len(world.tokenizer)).save_pretrained("base")
    lora = LoraConfig(rank=3, target_modules=["q_proj", "down_proj"])
    world.config.backbone = BackboneConfig(path="base", precision="fp32", lora=lora)
    return finish(world)


def finish(world):
    """Give the world's run a complete model/ whose adapters change what the base says."""
    model = world.build_model()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3, generator=draw)

    def build(config, work):
        save_export(model, model.state_dict(), world.tokenizer, work, {"tokens_hash": "abc"})
        np.save(work / "item_vectors.npy", model.item_vectors().numpy())
        return {}

    run_stage(world.config, stage="train", folder="model", sections=(), inputs=(), build=build)
    return world.config


def read(folder) -> torch.Tensor:
    """Hidden states of a fixed text."""
    lm = causal_lm(ContRec.from_pretrained(folder).backbone)
    with torch.no_grad():
        return lm.base_model(input_ids=torch.arange(40)[None] % 30, use_cache=False).last_hidden_state


def test_a_merged_folder_has_whole_weights_and_needs_neither_run_nor_base(run, tmp_path):
    expected, base = read(run.folder("model")), read_base(tmp_path / "base")
    write_standalone(run.folder("model"), tmp_path / "out" / "merged", merge=True)
    shutil.rmtree("base")
    shutil.rmtree(run.folder("model"))
    folder = tmp_path / "out" / "merged"
    assert not (folder / "adapter").exists()
    assert json.loads((folder / "config.json").read_text())["backbone"]["lora"]["rank"] == 0
    with safe_open(folder / "backbone" / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(read(folder), expected, atol=1e-5, rtol=1e-5)
    assert (read(folder) - base).abs().max() > 1e-2  # the adapters were not simply dropped


def read_base(folder) -> torch.Tensor:
    lm = load_backbone(BackboneConfig(path=str(folder)), 0)
    with torch.no_grad():
        return lm.base_model(input_ids=torch.arange(40)[None] % 30, use_cache=False).last_hidden_state


def test_an_unmerged_folder_keeps_adapter_and_base_apart_and_loads_from_any_place(run, tmp_path, monkeypatch):
    expected = read(run.folder("model"))
    write_standalone(run.folder("model"), tmp_path / "apart", merge=False)
    shutil.rmtree(run.folder("model"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    described = json.loads((tmp_path / "apart" / "config.json").read_text())
    assert described["backbone"]["path"] == str(tmp_path / "base") and described["backbone"]["lora"]["rank"] == 3
    assert (tmp_path / "apart" / "adapter" / "adapter_model.safetensors").is_file()
    torch.testing.assert_close(read(tmp_path / "apart"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("merge", [False, True])
def test_a_model_without_adapters_is_exported_whole(make_world, tmp_path, merge):
    config = finish(make_world([[1, 4, 7, 10]]))
    expected = read(config.folder("model"))
    write_standalone(config.folder("model"), tmp_path / "whole", merge=merge)
    torch.testing.assert_close(read(tmp_path / "whole"), expected, rtol=0, atol=0)


def test_a_folder_that_is_there_is_not_touched(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert main(["export", "--output", str(tmp_path / "mine"), "name=toy", f"run_dir={run.run_dir}"]) == 1
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_damaged_model_is_refused_by_the_name_of_its_file(run, tmp_path):
    path = run.folder("model") / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="head.safetensors.*other content"):
        write_standalone(run.folder("model"), tmp_path / "out", merge=False)
    assert not (tmp_path / "out").exists()


def test_what_differs_from_the_run_never_gets_its_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)  # loses the adapters
    with pytest.raises(ArtifactError, match="conditions that differ"):
        write_standalone(run.folder("model"), tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_the_folder(run, tmp_path):
    assert main(["export", "--output", str(tmp_path / "out"), "--merge", "name=toy", f"run_dir={run.run_dir}"]) == 0
    ContRec.from_pretrained(tmp_path / "out")

"""model/export.py: what is saved is what is loaded, with and without adapters; anything less is refused by name."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from contrec_dist.config import BackboneConfig, LoraConfig
from contrec_dist.errors import ArtifactError
from contrec_dist.model.backbone import load_backbone
from contrec_dist.model.contrec import ContRec
from contrec_dist.model.export import load_export, save_export
from contrec_dist.model.history_reader import HistoryBatch, HistoryReader
from contrec_dist.training.zero3 import parameter_groups

HISTORIES = [[1, 4, 7, 10, 13, 2, 5], [3, 6, 9, 12]]


def whole_state(model):
    """What gather_state gives on one rank: parameters, and the buffers that are saved."""
    saved = model.state_dict()
    state = {name: value.detach().clone() for name, value in model.named_parameters()}
    return state | {name: value.clone() for name, value in model.named_buffers() if name in saved}


def use_average(model) -> None:
    """What an export promises of the head: its moving average in the place of its parameters."""
    averages = dict(model.average.named_buffers())
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            parameter.copy_(averages[name.replace(".", "__")])


def results(model, world) -> list[torch.Tensor]:
    """Hidden states, queries, samples and item vectors."""
    reader = HistoryReader(model, world.texts, world.tokenizer)
    users = None if world.user_latents is None else world.user_latents[: len(HISTORIES)]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in HISTORIES])])
    items = np.concatenate(HISTORIES)
    condition = reader.read(HistoryBatch(items, offsets, world.item_latents[items], users), reasoning=True).condition
    with torch.no_grad():
        query = model.head.query(condition)
    settings = {"num_steps": 3, "solver": "dpm", "guidance": 1.0}
    samples = model.head.sample(condition, **settings, generator=torch.Generator().manual_seed(0))
    return [condition, query, samples, model.item_vectors()]


def move_average(model) -> None:
    """Give the moving average values of its own."""
    model.average.update({name: value + 0.3 for name, value in model.head.named_parameters()})


def save(model, world, folder):
    folder.mkdir()
    save_export(model, whole_state(model), world.tokenizer, folder, {"tokens_hash": "abc"})
    return folder


def load(folder, world):
    return load_export(folder, item_latents=torch.from_numpy(world.item_latents))


@pytest.fixture(params=["llama", "qwen2"])
def world(make_world, request):
    world = make_world(HISTORIES, user_tokens=request.param == "qwen2", titled_items=1)
    world.config.backbone.shape.family = request.param
    return world


def test_an_exported_model_loads_back_equal_with_the_moving_average_applied(world, tmp_path):
    model = world.build_model()
    move_average(model)
    folder = save(model, world, tmp_path / "model")
    before = results(model, world)
    use_average(model)
    loaded, tokenizer = load(folder, world)
    expected = results(model, world)
    torch.testing.assert_close(results(loaded, world), expected, atol=1e-6, rtol=1e-6)
    assert (before[1] - expected[1]).abs().max() > 1e-3  # the average is another head
    assert tokenizer("Red thing")["input_ids"] == world.tokenizer("Red thing")["input_ids"]
    assert not loaded.training and loaded.average is None


def test_from_pretrained_gives_the_exported_model(world, tmp_path):
    model = world.build_model()
    folder = save(model, world, tmp_path / "model")
    latents = torch.from_numpy(world.item_latents)
    use_average(model)
    torch.testing.assert_close(results(ContRec.from_pretrained(folder, item_latents=latents), world), results(model, world))
    assert ContRec.from_pretrained(folder).latent_mean.shape == (2, 4)  # histories bring their own latents


def test_an_export_is_a_function_of_the_weights(world, tmp_path):
    folders = [save(world.build_model(), world, tmp_path / name) for name in "ab"]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in folders]
    assert files[0] == files[1] and "head.safetensors" in map(str, files[0])
    for name in files[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_an_export_says_what_it_belongs_to_and_is_in_hugging_face_layout(world, tmp_path):
    folder = save(world.build_model(), world, tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())
    assert described["tokens_hash"] == "abc" and described["num_items"] == 30
    plain = load_backbone(BackboneConfig(path=str(folder / "backbone")), vocab_size=0)
    assert plain.config.model_type == world.config.backbone.shape.family


@pytest.mark.parametrize("name", ["items.residual.weight", "head.denoiser.output.weight", "backbone.model.norm.weight"])
def test_an_empty_tensor_is_refused_by_name(world, tmp_path, name):
    """What ZeRO-3 gives for weights that were not gathered."""
    model = world.build_model()
    state = whole_state(model)
    state[name] = torch.zeros(0)
    state["average." + name.removeprefix("head.").replace(".", "__")] = torch.zeros(0)
    with pytest.raises(ArtifactError, match=name.removeprefix("backbone.").replace(".", r"\.")):
        save_export(model, state, world.tokenizer, tmp_path, {})


def test_a_missing_or_foreign_weight_is_a_named_error(world, tmp_path):
    folder = save(world.build_model(), world, tmp_path / "model")
    weights = load_file(folder / "head.safetensors")
    weights["stranger"] = weights.pop("items.bias.weight")
    save_file(weights, folder / "head.safetensors")
    with pytest.raises(ArtifactError, match="items.bias.weight.*stranger"):
        load_export(folder)


def test_a_folder_that_is_no_export_is_a_named_error(tmp_path):
    with pytest.raises(ArtifactError, match="no config.json"):
        load_export(tmp_path)


def make_adapted_world(make_world, tmp_path):
    """A world whose backbone is a saved folder with adapters on it."""
    world = make_world(HISTORIES, response_drop=0.0)
    load_backbone(world.config.backbone, len(world.tokenizer)).save_pretrained(tmp_path / "base")
    lora = LoraConfig(rank=3, dropout=0.0, target_modules=["q_proj", "v_proj"])
    world.config.backbone = BackboneConfig(path=str(tmp_path / "base"), precision="fp32", lora=lora)
    return world


def train_some_steps(world, model, num_steps=3) -> None:
    rows = world.rows
    plan = rows.plan(0)
    batch = rows.build(plan, np.arange(len(plan.rows)), len(plan.rows))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2)
    for seed in range(num_steps):
        out = model.train()(batch, seed)
        optimizer.zero_grad()
        (out["lm"] + out["negative"] + out["diffusion"]).backward()
        optimizer.step()
    model.eval()


def test_with_adapters_only_they_and_the_heads_train(make_world, tmp_path):
    world = make_adapted_world(make_world, tmp_path)
    model = world.build_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    train_some_steps(world, model)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    in_backbone = {name for name in moved if name.startswith("backbone.")}
    assert in_backbone == {name for name in before if "lora_" in name} and len(in_backbone) == 2 * 2 * 2
    assert moved - in_backbone >= {"inputs.project.weight", "items.residual.weight", "head.direct_query.weight"}


def test_an_adapter_is_exported_alone_and_whole_and_loads_back_equal(make_world, tmp_path):
    world = make_adapted_world(make_world, tmp_path)
    model = world.build_model()
    train_some_steps(world, model)
    folder = save(model, world, tmp_path / "model")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 8 and all("lora_" in name and value.numel() for name, value in adapter.items())
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    assert not list((folder / "backbone").glob("*.safetensors"))
    use_average(model)
    loaded, _ = load(folder, world)
    torch.testing.assert_close(results(loaded, world), results(model, world), atol=1e-6, rtol=1e-6)

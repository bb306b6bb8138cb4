"""A trained model as a folder of its own: loads with `ContRec.from_pretrained(folder)`, without DeepSpeed and without its run.

Guarantee  The folder appears under its name only after it was opened again and gave the conditions, queries and text logits of
           the run's model (relative to the largest of each, 1e-5; merged adapters differ by rounding).
Cost       Reading and writing the weights once or twice; one model in memory at a time, in fp32.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from contrec_dist.data.latents import ITEM_LATENTS
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, write_json
from contrec_dist.model.backbone import causal_lm
from contrec_dist.model.export import load_export, refuse_empty

TOLERANCE = 1e-5
PROBE_SHAPE = (2, 48)
"rows and positions of the text on which the folder is compared with the run's model"
COPIED = ("backbone", "adapter", "head.safetensors", "config.json", "item_vectors.npy", ITEM_LATENTS)


def write_standalone(source: Path, target: Path, *, merge: bool) -> None:
    """Write the trained model of `source` (a run's model/) to `target`, which must not exist.

    Without `merge` adapters stay separate and the base is loaded from its own path; with it they are added into the base and
    the folder holds the whole backbone.

    Errors   ArtifactError when the source is not what its manifest says, the target exists, or what was written differs
    """
    if target.exists():
        raise ArtifactError(target, "something that is there already", "a folder that does not exist yet")
    Manifest.load(source).check_files(source, deep=True)
    work = target.with_name(f".{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    expected = _write_merged(source, work) if merge else _write_copy(source, work)
    for path in sorted(work.rglob("*.safetensors")):
        refuse_empty(path)
    _compare(work, expected)
    os.replace(work, target)


def _write_copy(source: Path, work: Path) -> dict[str, Tensor]:
    for name in COPIED:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, work / name)
        elif path.is_file():
            shutil.copyfile(path, work / name)
    described = json.loads((source / "config.json").read_text())
    if Path(described["backbone"]["path"]).is_dir():  # else a hub name, or nothing
        described["backbone"]["path"] = str(Path(described["backbone"]["path"]).resolve())
    write_json(work / "config.json", described)
    return _outputs(load_export(source)[0])


def _write_merged(source: Path, work: Path) -> dict[str, Tensor]:
    model, tokenizer = load_export(source)
    expected = _outputs(model)
    described = json.loads((source / "config.json").read_text())
    if model.backbone_config.lora.rank:
        model.backbone = model.backbone.merge_and_unload(safe_merge=True)
        whole = dataclasses.replace(model.backbone_config.lora, rank=0)
        described["backbone"]["lora"] = dataclasses.asdict(whole)
    model.backbone.save_pretrained(work / "backbone", safe_serialization=True)
    tokenizer.save_pretrained(work / "backbone")
    for name in ("head.safetensors", "item_vectors.npy", ITEM_LATENTS):
        if (source / name).is_file():
            shutil.copyfile(source / name, work / name)
    write_json(work / "config.json", described)
    return expected


@torch.no_grad()
def _outputs(model) -> dict[str, Tensor]:
    """What the model makes of a fixed text: conditions (hidden states), the head's queries, text logits. fp32 on the CPU."""
    lm = causal_lm(model.backbone)
    vocab_size = lm.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocab_size, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    hidden = lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    queries, logits = model.head.query(hidden.flatten(0, 1)), lm.get_output_embeddings()(hidden)
    return {"conditions": hidden.float(), "queries": queries.float(), "logits": logits.float()}


def _compare(folder: Path, expected: dict[str, Tensor]) -> None:
    found = _outputs(load_export(folder)[0])
    for name, value in expected.items():
        difference = float((found[name] - value).abs().max() / value.abs().max())
        if not difference <= TOLERANCE:
            raise ArtifactError(folder, f"{name} that differ by {difference:.1e} of their size", f"at most {TOLERANCE:.0e}")

"""retrieval/pairing.py: a run in which any one folder was replaced is refused, with both hashes."""

import json

import pytest

from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, run_stage, write_json
from contrec_dist.retrieval.current_index import current_version
from contrec_dist.retrieval.pairing import CHAIN, check_pairing

INPUTS = {
    "catalog": (),
    "embeddings": ("catalog",),
    "tokenizer": ("catalog", "embeddings"),
    "tokens": ("catalog", "embeddings", "tokenizer"),
    "model": ("catalog", "tokenizer", "tokens"),
    "index": ("tokens", "model", "catalog"),
}
PAIRS = [(reader, written) for reader, inputs in INPUTS.items() for written in inputs]


@pytest.fixture
def run(tmp_path) -> Config:
    """A run's folders with real manifests, as the stages name their inputs."""
    config = Config(name="toy", run_dir=str(tmp_path / "run"))
    for folder, inputs in INPUTS.items():

        def build(config, work, folder=folder):
            (work / "content").write_text(f"first {folder}")
            hashes = {f"{name}_hash": Manifest.load(config.folder(name)).content_hash for name in ("catalog", "tokens")} \
                if folder == "model" else {}  # fmt: skip
            write_json(work / "config.json", hashes)
            return {space: {"num_items": 3} for space in config.index.spaces} if folder == "index" else {}

        run_stage(config, stage=folder, folder=folder, sections=("index",), inputs=inputs, build=build)
    return config


def change_manifest(config, folder, change) -> None:
    path = config.folder(folder) / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_was_made_together_belongs_together_and_has_versions(run):
    versions = check_pairing(run)
    assert Manifest.load(run.folder("model")).content_hash.startswith(versions.model) and len(versions.model) == 12
    assert (versions.index_number, versions.index) == current_version(run)


@pytest.mark.parametrize("replaced", CHAIN[:-1])
def test_another_folder_in_the_place_of_one_is_refused_with_both_hashes(run, replaced):
    theirs = Manifest.load(run.folder(replaced)).content_hash
    change_manifest(run, replaced, lambda manifest: manifest["files"]["content"].update(sha256="0" * 64))
    ours = Manifest.load(run.folder(replaced)).content_hash
    with pytest.raises(ArtifactError) as error:
        check_pairing(run)
    assert f"made from {replaced} {theirs[:16]}" in str(error.value)
    assert f"{replaced} {ours[:16]} of {run.folder(replaced)}" in str(error.value)


@pytest.mark.parametrize(("reader", "written"), PAIRS)
def test_every_pair_of_folders_is_compared(run, reader, written):
    """Only this one reader was made from something else; it is named."""
    there = Manifest.load(run.folder(written)).content_hash
    change_manifest(run, reader, lambda manifest: manifest["inputs"].update({written: "f" * 64}))
    with pytest.raises(ArtifactError) as error:
        check_pairing(run)
    # What `reader` was made from is part of no content hash, so it is the one that differs.
    assert error.value.path == str(run.folder(reader))
    assert "f" * 16 in str(error.value) and there[:16] in str(error.value)


def test_a_model_copied_from_elsewhere_under_a_fitting_manifest_is_refused(run):
    path = run.folder("model") / "config.json"
    write_json(path, {**json.loads(path.read_text()), "tokens_hash": "e" * 64})
    with pytest.raises(ArtifactError, match=f"config.json: got made from tokens {'e' * 16}"):
        check_pairing(run)


def test_readers_of_a_folder_that_is_not_there_must_agree(run):
    """Serving needs no tokenizer, but tokens and model must come from one."""
    for path in run.folder("tokenizer").iterdir():
        path.unlink()
    check_pairing(run)
    change_manifest(run, "model", lambda manifest: manifest["inputs"].update(tokenizer="d" * 64))
    with pytest.raises(ArtifactError, match=f"made from tokenizer {'d' * 16}"):
        check_pairing(run)

"""The command line as people meet it: help, errors without tracebacks, stages that wait for their input or are done."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launched import ROOT, copy_run, environment, run_contrec

from contrec_dist.__main__ import STAGES, main, run_stage_by_name
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import MANIFEST_NAME, Manifest, hash_file, lock_folder, write_json

pytestmark = pytest.mark.timeout(900)
FIRST_INPUT = {
    "embed": "prepare", "tokenize": "prepare", "precompute": "prepare", "train": "prepare", "index": "precompute",
    "score": "prepare", "evaluate": "prepare",
}  # fmt: skip


def test_help_lists_every_stage_and_an_example():
    command = [sys.executable, "-m", "contrec_dist", "--help"]
    shown = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(stage in shown.stdout for stage in [*STAGES, "pipeline"])
    assert "example: contrec pipeline --config configs/demo.yaml" in shown.stdout


@pytest.mark.parametrize("stage", [*STAGES, "pipeline"])
def test_help_of_a_stage_shows_an_example(stage, capsys):
    with pytest.raises(SystemExit) as ended:
        main([stage, "--help"])
    assert ended.value.code == 0
    assert f"example: contrec {stage} --config" in capsys.readouterr().out


@pytest.mark.parametrize("launcher", ["pipeline", "precompute", "score", "train"])
def test_help_of_a_launcher_exits_with_0(launcher, tmp_path):
    """From a folder that is not the source tree and without the package on the path."""
    own = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "launchers" / f"{launcher}.py"), "--help"]
    shown = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--config" in shown.stdout


def test_unknown_key_ends_with_1_and_names_the_nearest(new_run, tmp_path):
    command = run_contrec("prepare", new_run, tmp_path / "log", "train.num_epoch=3")
    assert command.process.returncode == 1
    assert "config key 'train.num_epoch': got an unknown key" in command.log and "train.num_epochs" in command.log
    assert "Traceback" not in command.log


def test_missing_config_file_ends_with_1(new_run, tmp_path):
    command = run_contrec("prepare", new_run, tmp_path / "log", "--config", "nowhere.yaml")
    assert command.process.returncode == 1
    assert "nowhere.yaml" in command.log and "Traceback" not in command.log


def test_missing_input_file_ends_with_1_and_is_named(new_run, reference, tmp_path):
    copy_run(reference[0], new_run, "catalog", "tokenizer", "tokens")
    (new_run.folder("tokens") / "item_latents.npy").unlink()
    command = run_contrec("train", new_run, tmp_path / "log")
    assert command.process.returncode == 1
    assert f"{new_run.folder('tokens') / 'item_latents.npy'}: got no such file" in command.log
    assert "Traceback" not in command.log


@pytest.mark.parametrize("stage, wanted", FIRST_INPUT.items())
def test_stage_before_its_input_names_the_stage_to_run(new_run, stage, wanted):
    with pytest.raises(ArtifactError, match=f"`contrec {wanted}`; run that first"):
        run_stage_by_name(stage, new_run)


def test_command_before_its_input_ends_with_1(new_run, tmp_path):
    command = run_contrec("train", new_run, tmp_path / "log")
    assert command.process.returncode == 1
    assert "`contrec prepare`; run that first" in command.log and "Traceback" not in command.log


def test_second_writer_of_a_stage_is_refused(new_run, tmp_path):
    with lock_folder(new_run, "catalog"):
        command = run_contrec("prepare", new_run, tmp_path / "log")
    assert command.process.returncode == 1
    assert "another process that writes it" in command.log and "Traceback" not in command.log


def test_second_run_of_everything_skips_every_stage(reference, tmp_path):
    config = reference[0]
    before = {folder: Path(config.run_dir, folder, MANIFEST_NAME).stat().st_mtime_ns for folder in _folders(config)}
    command = run_contrec("pipeline", config, tmp_path / "log")
    assert command.process.returncode == 0, command.log
    for stage in STAGES:
        assert f"contrec.{stage} complete, skipped" in command.log
    assert "deepspeed" not in command.log.lower() and "started" not in command.log
    assert before == {folder: Path(config.run_dir, folder, MANIFEST_NAME).stat().st_mtime_ns for folder in before}


def test_index_of_another_model_is_refused_with_both_hashes(new_run, reference, tmp_path):
    copy_run(reference[0], new_run, "catalog", "embeddings", "tokens", "model", "index")
    theirs = Manifest.load(new_run.folder("model")).content_hash
    _become_another_model(new_run.folder("model"))
    ours = Manifest.load(new_run.folder("model")).content_hash
    command = run_contrec("score", new_run, tmp_path / "log")
    assert command.process.returncode == 1
    assert f"made from model {theirs[:16]}" in command.log and f"model {ours[:16]}" in command.log
    assert "Traceback" not in command.log


def test_wrong_number_of_ranks_ends_with_the_equation(new_run, reference, tmp_path):
    """The error is raised on the ranks: it must come through DeepSpeed's launcher, once and without a traceback."""
    copy_run(reference[0], new_run, "catalog", "embeddings", "tokenizer", "tokens")
    config = replace(new_run, train=replace(new_run.train, global_batch_rows=7))
    command = run_contrec("train", config, tmp_path / "log")
    assert command.process.returncode == 1
    assert "a multiple of train.micro_batch_rows * ranks = 2 * 2 = 4" in command.log
    assert "training ended with exit code 1" in command.log and "Traceback" not in command.log


def _folders(config) -> list[str]:
    return sorted(path.parent.name for path in Path(config.run_dir).glob(f"*/{MANIFEST_NAME}"))


def _become_another_model(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**described, "latent_noise": 2 * described["latent_noise"]})
    manifest = Manifest.load(folder)
    manifest.files["config.json"] |= {
        "sha256": hash_file(folder / "config.json"), "bytes": (folder / "config.json").stat().st_size,
    }  # fmt: skip
    write_json(folder / MANIFEST_NAME, vars(manifest))

"""The driver under which every stage runs: skip, rebuild, resume, kill, second writer, damaged files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from contrec_dist.config import load_config
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, hash_file, load_inputs, lock_folder, run_stage, write_atomically, write_json

ROOT = Path(__file__).resolve().parents[1]


class CountingStage:
    """A stage that writes one part per epoch and remembers which parts it wrote, and that can die before a part."""

    def __init__(self, stage="numbers", folder="numbers", inputs=()):
        self.stage, self.folder, self.inputs = stage, folder, inputs
        self.written, self.runs, self.dies_before = [], 0, None

    def build(self, config, work):
        self.runs += 1
        for part in range(config.train.num_epochs):
            path = work / "parts" / f"{part}.txt"
            if path.is_file():
                continue
            if part == self.dies_before:
                raise KeyboardInterrupt
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, f"part {part} seed {config.seed}\n".encode())
            self.written.append(part)
        return {"num_parts": config.train.num_epochs, "files": {"parts/0.txt": {"rows": 1}}}

    def run(self, config):
        return run_stage(
            config,
            stage=self.stage,
            folder=self.folder,
            sections=("train",),
            inputs=self.inputs,
            build=self.build,
        )


@pytest.fixture
def make_config(tmp_path):
    return lambda *overrides: load_config([], ["name=toy", f"run_dir={tmp_path}/run", "train.num_epochs=3", *overrides])


def visible_names(config):
    """What a user sees in the run's folder."""
    return sorted(path.name for path in Path(config.run_dir).iterdir() if not path.name.startswith("."))


def test_a_complete_output_is_described_by_its_manifest(make_config):
    config, stage = make_config(), CountingStage()
    manifest = stage.run(config)
    folder = config.folder("numbers")
    assert visible_names(config) == ["numbers"]
    assert Manifest.load(folder) == manifest
    assert sorted(manifest.files) == ["parts/0.txt", "parts/1.txt", "parts/2.txt"]
    record = manifest.files["parts/0.txt"]
    assert record == {"sha256": hash_file(folder / "parts/0.txt"), "bytes": 14, "rows": 1}
    assert manifest.facts == {"num_parts": 3} and manifest.stage == "numbers"
    assert manifest.config["train"]["num_epochs"] == 3 and manifest.config["seed"] == 0
    manifest.check_files(folder, deep=True)


def test_a_switch_that_joined_later_counts_only_where_it_is_set(make_config):
    """Finished runs stay finished when train.targets comes to the config; setting it builds them again."""
    stage = CountingStage()
    manifest = stage.run(make_config())
    assert "targets" not in manifest.config["train"]
    assert stage.run(make_config("train.targets=all")) == manifest and stage.runs == 1
    changed = stage.run(make_config("train.targets=last"))
    assert changed.config["train"]["targets"] == "last" and changed.identity != manifest.identity and stage.runs == 2


def test_a_complete_output_is_skipped_and_left_as_it_is(make_config):
    config, stage = make_config(), CountingStage()
    first = stage.run(config)
    stamp = (config.folder("numbers") / "parts/0.txt").stat().st_mtime_ns
    assert stage.run(config) == first and stage.runs == 1
    assert (config.folder("numbers") / "parts/0.txt").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("change", ["train.num_epochs=2", "train.clip_norm=2.0", "seed=1"])
def test_a_changed_setting_that_the_stage_reads_builds_again(make_config, change):
    stage = CountingStage()
    before = stage.run(make_config())
    after = stage.run(make_config(change))
    assert stage.runs == 2 and after.identity != before.identity
    files = sorted(path.name for path in make_config().folder("numbers").rglob("*.txt"))
    assert len(files) == (2 if change == "train.num_epochs=2" else 3)


@pytest.mark.parametrize("change", ["score.k=7", "launch.num_ranks=8", "ray.num_workers=9", "name=other"])
def test_a_changed_setting_that_the_stage_does_not_read_skips(make_config, change):
    stage = CountingStage()
    before = stage.run(make_config())
    assert stage.run(make_config(change)) == before and stage.runs == 1


def test_a_changed_input_builds_again_and_an_equal_one_does_not(make_config):
    source, sink = CountingStage("source", "source"), CountingStage("sink", "sink", inputs=("source",))
    source.run(make_config())
    first = sink.run(make_config("train.num_epochs=1"))
    sink.run(make_config("train.num_epochs=1"))
    assert sink.runs == 1
    source.run(make_config("seed=5"))
    source.run(make_config())  # back to the same content
    assert sink.run(make_config("train.num_epochs=1")) == first and sink.runs == 1
    source.run(make_config("train.num_epochs=2"))
    changed = sink.run(make_config("train.num_epochs=1"))
    assert sink.runs == 2 and changed.inputs != first.inputs


def test_the_same_config_and_inputs_give_the_same_content_hash_in_another_folder(tmp_path, make_config):
    stage = CountingStage()
    here = stage.run(make_config())
    there = stage.run(make_config(f"run_dir={tmp_path}/elsewhere"))
    assert stage.runs == 2 and here.content_hash == there.content_hash


def test_a_missing_input_is_named_before_anything_is_written(make_config):
    config, sink = make_config(), CountingStage("sink", "sink", inputs=("source",))
    with pytest.raises(ArtifactError, match="source.*no manifest"):
        sink.run(config)
    assert sink.runs == 0 and visible_names(config) == []


def test_a_resumed_run_writes_only_what_is_missing_and_equals_an_uninterrupted_one(tmp_path, make_config):
    config, stage = make_config(), CountingStage()
    stage.dies_before = 2
    with pytest.raises(KeyboardInterrupt):
        stage.run(config)
    assert visible_names(config) == [] and stage.written == [0, 1]
    stage.dies_before = None
    resumed = stage.run(config)
    assert stage.written == [0, 1, 2]
    whole = CountingStage().run(make_config(f"run_dir={tmp_path}/whole"))
    assert resumed.content_hash == whole.content_hash


def test_partial_work_of_other_settings_is_thrown_away(make_config):
    stage = CountingStage()
    stage.dies_before = 2
    with pytest.raises(KeyboardInterrupt):
        stage.run(make_config())
    stage.dies_before = None
    manifest = stage.run(make_config("seed=1"))
    assert stage.written == [0, 1, 0, 1, 2]
    assert (make_config().folder("numbers") / "parts/0.txt").read_text() == "part 0 seed 1\n"
    assert len(manifest.files) == 3


def test_a_failed_rebuild_keeps_the_older_complete_output(make_config):
    stage = CountingStage()
    before = stage.run(make_config())
    stage.dies_before = 1
    with pytest.raises(KeyboardInterrupt):
        stage.run(make_config("seed=1"))
    folder = make_config().folder("numbers")
    assert Manifest.load(folder) == before
    before.check_files(folder, deep=True)


KILLED_STAGE = """
import os, signal, sys
from contrec_dist import manifest
from contrec_dist.config import load_config

where, run_dir = sys.argv[1:]
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)

def build(config, work):
    manifest.write_atomically(work / "first.txt", b"first")
    (work / ".second.txt.1.tmp").write_bytes(b"hal")
    if where == "build":
        kill()
    manifest.write_atomically(work / "second.txt", b"second")
    return {}

if where == "describe":
    manifest._describe_files = lambda *_: kill()
if where == "publish":
    manifest._publish = lambda *_: kill()
if where == "swap":  # the older output stepped aside, the new one has no name yet
    replace = os.replace
    def replace_once(source, target):
        replace(source, target)
        if str(target).endswith(".old"):
            kill()
    manifest.os.replace = replace_once
config = load_config([], ["name=toy", f"run_dir={run_dir}"])
extra = {"again": True} if where == "swap" else None
manifest.run_stage(config, stage="toy", folder="toy", sections=(), inputs=(), build=build, extra_identity=extra)
"""


def run_killed_stage(where, run_dir):
    command = [sys.executable, "-c", KILLED_STAGE, where, str(run_dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=120).returncode


@pytest.mark.parametrize("where", ["build", "describe", "publish"])
def test_a_stage_killed_anywhere_leaves_nothing_that_looks_finished(tmp_path, where):
    assert run_killed_stage(where, tmp_path / "run") == -signal.SIGKILL
    config = load_config([], ["name=toy", f"run_dir={tmp_path}/run"])
    assert visible_names(config) == []
    with pytest.raises(ArtifactError, match="no manifest"):
        load_inputs(config, ["toy"])
    assert run_killed_stage("nowhere", tmp_path / "run") == 0
    manifest = Manifest.load(config.folder("toy"))
    assert sorted(manifest.files) == ["first.txt", "second.txt"]
    manifest.check_files(config.folder("toy"), deep=True)
    assert [path.name for path in config.folder("toy").rglob("*.tmp")] == []


def test_a_stage_killed_while_it_replaces_an_older_output_publishes_when_run_again(tmp_path):
    assert run_killed_stage("nowhere", tmp_path / "run") == 0
    config = load_config([], ["name=toy", f"run_dir={tmp_path}/run"])
    old = Manifest.load(config.folder("toy"))
    assert run_killed_stage("swap", tmp_path / "run") == -signal.SIGKILL
    assert visible_names(config) == []
    assert run_killed_stage("nowhere", tmp_path / "run") == 0
    manifest = Manifest.load(config.folder("toy"))
    manifest.check_files(config.folder("toy"), deep=True)
    assert manifest.content_hash == old.content_hash


def test_a_second_writer_is_refused_and_the_first_goes_on(make_config):
    config, stage = make_config(), CountingStage()
    with lock_folder(config, "numbers"):
        with pytest.raises(ArtifactError, match="numbers.*another process"):
            stage.run(config)
        CountingStage("other", "other").run(config)  # another folder is free
    assert stage.runs == 0
    stage.run(config)
    assert stage.runs == 1


def test_the_lock_of_a_dead_writer_does_not_block(tmp_path, make_config):
    assert run_killed_stage("build", tmp_path / "run") == -signal.SIGKILL
    config = make_config()
    assert (Path(config.run_dir) / ".toy.lock").is_file()
    with lock_folder(config, "toy"):
        pass


def damage_by_truncation(path):
    path.write_bytes(path.read_bytes()[:-3])


def damage_by_removal(path):
    path.unlink()


def damage_by_one_byte(path):
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "deep", "message"),
    [
        (damage_by_truncation, False, "11 bytes.*expected 14 bytes"),
        (damage_by_removal, False, "no such file"),
        (damage_by_one_byte, True, "other content.*sha256"),
    ],
)
def test_a_damaged_file_is_named(make_config, damage, deep, message):
    config = make_config()
    manifest = CountingStage().run(config)
    path = config.folder("numbers") / "parts/1.txt"
    damage(path)
    with pytest.raises(ArtifactError, match=message) as caught:
        manifest.check_files(config.folder("numbers"), deep=deep)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_removal])
def test_a_damaged_output_is_built_again_and_a_damaged_input_is_refused(make_config, damage):
    config = make_config()
    source, sink = CountingStage("source", "source"), CountingStage("sink", "sink", inputs=("source",))
    whole = source.run(config)
    damage(config.folder("source") / "parts/1.txt")
    with pytest.raises(ArtifactError, match="parts/1.txt"):
        sink.run(config)
    assert source.run(config).content_hash == whole.content_hash and source.runs == 2
    sink.run(config)
    assert sink.runs == 1


def test_an_unreadable_manifest_is_named(make_config):
    config = make_config()
    CountingStage().run(config)
    path = config.folder("numbers") / "manifest.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ArtifactError, match="manifest.json.*unreadable"):
        Manifest.load(config.folder("numbers"))


def test_an_output_whose_manifest_is_unreadable_is_built_again(make_config):
    config, stage = make_config(), CountingStage()
    whole = stage.run(config)
    path = config.folder("numbers") / "manifest.json"
    path.write_text(path.read_text()[:40])
    assert stage.run(config).content_hash == whole.content_hash and stage.runs == 2


def test_a_partial_folder_with_a_broken_marker_is_thrown_away(make_config):
    config, stage = make_config(), CountingStage()
    partial = Path(config.run_dir) / ".numbers.partial"
    partial.mkdir(parents=True)
    (partial / "identity.json").write_text('{"iden')
    (partial / "stray.txt").write_text("from nobody knows where")
    assert "stray.txt" not in stage.run(config).files


def test_json_is_written_sorted_and_no_temporary_file_stays(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [1, 2]})
    assert (tmp_path / "a.json").read_text() == json.dumps({"a": [1, 2], "b": 1}, indent=2) + "\n"
    assert os.listdir(tmp_path) == ["a.json"]

"""`contrec verify`: everything that is broken in a run is named, with what it is and what it should be, and nothing else is."""

import functools
import http.server
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from contrec_dist.__main__ import main
from contrec_dist.config import Config, IndexConfig
from contrec_dist.manifest import Manifest, hash_file, hash_json, run_stage, write_json
from contrec_dist.retrieval.current_index import LIVE_FOLDER, open_store
from contrec_dist.training.checkpoint_files import TrainingPosition, complete_checkpoint, publish_checkpoint, step_name
from contrec_dist.verify import verify_run
from sharding.faiss_build import build_shards, extend_shards
from sharding.faiss_files import read_layout
from sharding.faiss_versions import Segment
from sharding.token_writer import shard_name

NUM_SHARDS, NUM_ITEMS = 3, 20
CHAIN = {
    "catalog": ("prepare", ()), "tokens": ("precompute", ("catalog",)), "model": ("train", ("catalog", "tokens")),
    "index": ("index", ("model",)), "recommendations-new": ("score", ("model", "index")), "baselines/tiger": ("tiger", ("catalog",)),
}  # fmt: skip
VECTORS = np.random.default_rng(1).standard_normal((NUM_ITEMS, 4)).astype(np.float32)


def write_some(config: Config, folder: str, work: Path) -> dict:
    """What a stage could have written; deterministic."""
    (work / "part").mkdir(exist_ok=True)
    (work / "data.bin").write_bytes(folder.encode() * 100)
    (work / "part" / "more.bin").write_bytes(b"more of " + folder.encode())
    if folder == "tokens":
        (work / "shards").mkdir(exist_ok=True)
        for shard in range(NUM_SHARDS):
            (work / shard_name(shard)).write_bytes(bytes([shard]) * 2000)
        return {"num_shards": NUM_SHARDS}
    if folder == "index":
        build_shards(VECTORS, np.arange(NUM_ITEMS), work / "query", config.index, "inner_product", VECTORS[:5])
        return {"query": {"num_items": NUM_ITEMS}}
    if folder == "model":
        hashes = {f"{name}_hash": Manifest.load(config.folder(name)).content_hash for name in ("catalog", "tokens")}
        write_json(work / "config.json", hashes)
    return {}


def write_folder(config: Config, folder: str) -> Manifest:
    stage, inputs = CHAIN[folder]
    build = lambda config, work: write_some(config, folder, work)  # noqa: E731
    return run_stage(config, stage=stage, folder=folder, sections=("index",), inputs=inputs, build=build)


def write_checkpoint(config: Config, step: int) -> Path:
    folder = config.folder("checkpoints") / "0123456789ab"
    work = folder / ".work"
    (work / "state").mkdir(parents=True)
    for rank in range(2):
        (work / "state" / f"rank{rank}.pt").write_bytes(bytes([step, rank]) * 500)
    complete_checkpoint(work, TrainingPosition(step=step))
    publish_checkpoint(work, folder / step_name(step))
    return folder / step_name(step)


def change_index(config: Config) -> Path:
    """Version 1 of a living index: two items join, one leaves. Returns the live folder."""
    store = open_store(config)
    change = store.begin(store.current())
    base, ids = config.folder("index") / "query", np.array([NUM_ITEMS, NUM_ITEMS + 1])
    extend_shards(base, read_layout(base), VECTORS[:2] + 1, ids, change.new_segment / "query")
    np.save(change.new_segment / "ids.npy", ids)
    files = sorted(path for path in change.new_segment.rglob("*") if path.is_file())
    digest = hash_json({path.relative_to(change.new_segment).as_posix(): hash_file(path) for path in files})
    segments = [change.leave_out(change.version.segments[0], np.arange(NUM_ITEMS), np.array([3])), Segment(change.name, 2, digest)]
    pl.DataFrame({"item_idx": ids}).write_parquet(change.items_path)
    pl.DataFrame({"kind": ["add"]}).write_parquet(change.log_path)
    change.publish(segments, NUM_ITEMS + 2, {"kind": "add", "items": 2})
    return store.folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Config:
    config = Config(name="toy", run_dir=str(tmp_path_factory.mktemp("built") / "run"))
    config.index = IndexConfig(spaces=["query"], factory="Flat", device="cpu")
    for folder in CHAIN:
        write_folder(config, folder)
    for step in (4, 8):
        write_checkpoint(config, step)
    change_index(config)
    return config


@pytest.fixture
def run(built, tmp_path) -> Config:
    """A copy that a test may damage."""
    shutil.copytree(built.run_dir, tmp_path / "run")
    return Config(name="toy", run_dir=str(tmp_path / "run"), index=built.index)


def faults(config: Config, *folders: str, quick: bool = False) -> list[str]:
    return [f"{one.folder}: {fault}" for one in verify_run(config, folders, quick=quick) for fault in one.faults]


def spoil(path: Path) -> None:
    """Another byte; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_good_run_is_ok_folder_by_folder_with_its_files_and_bytes(run, capsys):
    assert main(["verify", "name=toy", f"run_dir={run.run_dir}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.partition(":")[0] for line in lines]
    steps = [f"checkpoints/0123456789ab/{step_name(step)}" for step in (4, 8)]
    assert shown == ["catalog", "tokens", "model", "index", "baselines/tiger", *steps, LIVE_FOLDER, "recommendations-new", "all is good"]
    assert "catalog: ok: 2 files, 715 bytes" in lines
    assert f"{steps[0]}: ok: 2 files, 2,000 bytes" in lines


def test_everything_that_is_broken_is_named_and_not_the_first_alone(run, capsys):
    (run.folder("catalog") / "data.bin").unlink()
    (run.folder("catalog") / "part" / "more.bin").write_bytes(b"x")
    spoil(run.folder("tokens") / shard_name(1))
    spoil(run.folder("baselines/tiger") / "data.bin")
    written = Manifest.load(run.folder("tokens")).files[shard_name(1)]["sha256"]
    found = hash_file(run.folder("tokens") / shard_name(1))
    assert main(["verify", "name=toy", f"run_dir={run.run_dir}"]) == 1
    out = capsys.readouterr().out
    for expected in (
        "catalog: BROKEN: " + str(run.folder("catalog") / "data.bin") + ": got no such file, expected 700 bytes",
        "part/more.bin: got 1 bytes, expected 15 bytes",
        f"000001.tar: got other content, sha256 {found}, expected sha256 {written}",
        "baselines/tiger: BROKEN: ",
        "model: ok: ",
        "4 faults",
    ):
        assert expected in out
    assert "catalog: ok" not in out and "tokens: ok" not in out


def test_quick_sees_presence_and_size_and_not_content(run):
    spoil(run.folder("catalog") / "data.bin")
    assert faults(run, quick=True) == [] and len(faults(run)) == 1
    (run.folder("catalog") / "data.bin").write_bytes(b"short")
    (run.folder("checkpoints") / "0123456789ab" / step_name(4) / "state" / "rank0.pt").unlink()
    (run.folder(LIVE_FOLDER) / "segments" / "000001" / "query" / "shard_000000.faiss").unlink()
    assert len(faults(run, quick=True)) == 3


def test_some_folders_alone_are_looked_at_where_they_are_named(run, capsys):
    spoil(run.folder("catalog") / "data.bin")
    arguments = ["verify", "name=toy", f"run_dir={run.run_dir}", "--folder", "tokens", "--folder", "checkpoints"]
    assert main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    (fault,) = faults(run, "nowhere")
    assert "nowhere: got no manifest" in fault


def test_a_file_that_no_manifest_names_is_a_fault(run):
    (run.folder("tokens") / "shards" / "000003.tar").write_bytes(b"x")
    (run.folder("checkpoints") / "0123456789ab" / step_name(4) / "extra.pt").write_bytes(b"x")
    found = faults(run)
    assert len(found) == 2 and all("got a file, expected none" in fault for fault in found)
    assert "000003.tar" in found[0] and "extra.pt" in found[1]


@pytest.mark.parametrize("text", ["{ half", "[]", '{"stage": "prepare"}', None])
def test_an_unreadable_manifest_is_named_and_the_others_are_looked_at(run, text):
    path = run.folder("catalog") / "manifest.json"
    good = json.loads(path.read_text())
    path.write_text(text if text is not None else json.dumps(good | {"files": {"data.bin": {"bytes": 3}}}))
    spoil(run.folder("tokens") / "data.bin")
    found = faults(run)
    assert "catalog: " in found[0] and "manifest.json: got an unreadable manifest" in found[0]
    assert any("tokens/data.bin: got other content" in fault for fault in found)


def test_a_stage_folder_without_a_manifest_is_a_fault(run):
    (run.folder("catalog") / "manifest.json").unlink()
    assert "catalog: got no manifest" in faults(run)[0]


def test_folders_that_do_not_belong_together_are_named_with_both_hashes(run):
    before = Manifest.load(run.folder("catalog")).content_hash[:16]
    run.seed = 1
    shutil.rmtree(run.folder("catalog"))
    write_folder(run, "catalog")
    after = Manifest.load(run.folder("catalog")).content_hash[:16]
    found = faults(run)
    wanted = f"got made from catalog {before}, expected catalog {after}, which is there now"
    assert [fault.partition(":")[0] for fault in found] == ["tokens", "model", "model", "baselines/tiger"]
    assert all(wanted in fault for fault in found)
    assert "model/config.json: got made from" in found[2]


def test_an_input_that_is_gone_is_a_fault(run):
    shutil.rmtree(run.folder("index"))
    shutil.rmtree(run.folder(LIVE_FOLDER))
    (fault,) = faults(run)
    assert fault.startswith("recommendations-new: ") and fault.endswith("expected a complete index beside it")


def test_every_broken_file_of_a_checkpoint_is_named(run):
    folder = run.folder("checkpoints") / "0123456789ab"
    spoil(folder / step_name(4) / "state" / "rank0.pt")
    (folder / step_name(4) / "state" / "rank1.pt").unlink()
    (folder / step_name(8) / "complete.json").unlink()
    found = faults(run)
    assert ["rank0.pt: got other content" in found[0], "rank1.pt: got no such file, expected sha256" in found[1]] == [True, True]
    assert "no complete.json" in found[2] and len(found) == 3
    (folder / "latest").write_text("step-00000012\n")
    assert "latest: got 'step-00000012', expected a checkpoint that is there" in faults(run)[-1]


def test_checkpoints_that_were_set_aside_are_looked_at_too(run):
    folder = run.folder("checkpoints") / "0123456789ab"
    (folder / "set-aside-1").mkdir()
    shutil.copytree(folder / step_name(4), folder / "set-aside-1" / step_name(4))
    spoil(folder / "set-aside-1" / step_name(4) / "state" / "rank0.pt")
    (fault,) = faults(run)
    assert "set-aside-1/step-00000004: " in fault


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("segments/000001/query/shard_000000.faiss", "other content, in a file that can be read"),
        ("removed/000001-base.npy", "removed/000001-base.npy: got other content, sha256"),
    ],
)
def test_a_changed_file_of_the_living_index_is_named(run, name, expected):
    path = run.folder(LIVE_FOLDER) / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the last vector, of the last id
    (fault,) = faults(run)
    assert fault.startswith(f"{LIVE_FOLDER}: ") and expected in fault


LIVE_FILES = [
    "segments/000001/query/shard_000000.faiss", "segments/000001/query/shard_000000.ids.npy", "segments/000001/ids.npy",
    "removed/000001-base.npy", "items/000001.parquet",
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), [
    *((name, damage) for name in LIVE_FILES for damage in ("cut off", "gone")), ("changes/000001.parquet", "cut off")
])  # fmt: skip
def test_a_torn_or_missing_file_of_the_living_index_is_named(run, name, damage):
    path = run.folder(LIVE_FOLDER) / name
    path.write_bytes(path.read_bytes()[:20]) if damage == "cut off" else path.unlink()
    (fault,) = faults(run)
    assert fault.startswith(f"{LIVE_FOLDER}: ") and str(path) in fault


def test_versions_that_say_something_else_or_nothing_are_faults(run):
    path = run.folder(LIVE_FOLDER) / "versions" / "000001.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"content_hash": "0" * 64}))
    assert f"{path}: got content hash 0000" in faults(run)[0]
    path.write_text("{ half")
    assert "CURRENT: got an unreadable version" in faults(run)[0]
    path.write_text(json.dumps(record))
    assert faults(run) == []


def test_a_living_index_of_another_index_is_a_fault_with_both_hashes(run):
    before = Manifest.load(run.folder("index")).content_hash[:16]
    run.seed = 1
    shutil.rmtree(run.folder("index"))
    write_folder(run, "index")
    (fault,) = faults(run, LIVE_FOLDER)
    assert before in fault and Manifest.load(run.folder("index")).content_hash[:16] in fault


def test_what_is_half_written_is_told_and_is_no_fault(run, capsys):
    for path in (run.folder("report").with_name(".report.partial"), run.folder("baselines") / ".sasrec.partial"):
        path.mkdir()
    (run.folder("checkpoints") / "0123456789ab" / ".step-00000012.partial").mkdir()
    (run.folder(LIVE_FOLDER) / "segments" / "000002").mkdir()
    assert main(["verify", "name=toy", f"run_dir={run.run_dir}"]) == 0
    out = capsys.readouterr().out
    for name in (".report.partial", ".sasrec.partial", ".step-00000012.partial", "segments/000002"):
        assert [line for line in out.splitlines() if name in line and ": note: " in line], name


def test_a_run_that_is_not_there_is_an_error(tmp_path):
    assert main(["verify", "name=toy", f"run_dir={tmp_path / 'nowhere'}"]) == 1


def test_shards_that_lie_elsewhere_are_fetched_and_compared(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(run.folder("tokens") / "shards", elsewhere / "shards")
    assert len(faults(run)) == NUM_SHARDS
    handler = functools.partial(QuietHandler, directory=str(elsewhere))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        run.shards.url, run.shards.retries = f"http://127.0.0.1:{server.server_address[1]}", 0
        assert faults(run) == []
        assert len(list(run.folder("shard_cache").glob("*.tar"))) == NUM_SHARDS
        shutil.rmtree(run.folder("shard_cache"))
        spoil(elsewhere / shard_name(1))
        (fault,) = faults(run)
        assert f"tokens: {run.shards.url}/shards/000001.tar: got 2000 bytes with sha256" in fault
        (note,) = [note for one in verify_run(run, ["tokens"], quick=True) for note in one.notes]
        assert f"3 shards at {run.shards.url} were not looked at" in note
        server.shutdown()
    run.shards.url = str(elsewhere)
    (fault,) = faults(run)
    assert str(elsewhere / shard_name(1)) in fault


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

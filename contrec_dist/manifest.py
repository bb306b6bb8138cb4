"""Manifests, and the one driver under which every stage runs.

A stage writes into `<run_dir>/.<folder>.partial` and the folder gets its name when it is complete, so a killed stage
never leaves something that looks finished. The manifest names what was written and from what. A stage's identity is
the hash of its config sections and of the contents of its inputs: an output with the same identity is skipped, a
partial one with the same identity is resumed, any other is built again.
"""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Sequence

from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError
from contrec_dist.progress import get_logger

MANIFEST_NAME = "manifest.json"
IDENTITY_NAME = "identity.json"
SHARDS = ("shards/",)
WRITTEN_BY = {
    "catalog": "prepare", "embeddings": "embed", "tokenizer": "tokenize", "tokens": "precompute", "model": "train",
    "index": "index", "recommendations": "score", "report": "evaluate",
}  # fmt: skip
PACKAGES = ("contrec_dist", "torch", "deepspeed", "transformers", "peft", "ray", "faiss-cpu", "polars", "numpy")


@dataclass(kw_only=True)
class Manifest:
    """What a stage wrote, and from what.

    `files` maps a path relative to the folder to {"sha256", "bytes"} plus what the stage says of it (rows, shape,
    dtype); `facts` are the stage's own figures; `inputs` maps an input folder to its content hash.
    """

    stage: str
    folder: str
    identity: str
    config: dict
    inputs: dict[str, str]
    files: dict[str, dict]
    facts: dict = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def content_hash(self) -> str:
        """Hash of the identity and of every file's content; free of time and machine."""
        return hash_json({"identity": self.identity, "files": {k: v["sha256"] for k, v in self.files.items()}})

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read a folder's manifest. Raises ArtifactError naming the folder where there is none."""
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            maker = f"`contrec {WRITTEN_BY[path.parent.name]}`" if path.parent.name in WRITTEN_BY else "its stage"
            raise ArtifactError(folder, "no manifest", f"the complete output of {maker}; run that first")
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ArtifactError(path, f"an unreadable manifest ({error})", "JSON as this project writes it") from None

    def check_files(self, folder: Path, *, deep: bool = False, elsewhere: tuple[str, ...] = ()) -> None:
        """Compare the files with the manifest: presence and size, and with `deep` the sha256 too.

        elsewhere  how the names of files begin that need not lie in the folder: whoever reads them checks them
        Errors   ArtifactError naming the first file that differs.
        """
        for name, record in self.files.items():
            if not name.startswith(elsewhere):
                check_file(Path(folder) / name, record, deep=deep)


def check_file(path: Path, record: dict, *, deep: bool) -> None:
    """Compare a file with its record of a manifest: presence and size (where that is known), and with `deep` the sha256 too.

    Errors   ArtifactError that says what it is and what it should be
    """
    if not path.is_file():
        expected = f"{record['bytes']} bytes" if "bytes" in record else f"sha256 {record['sha256']}"
        raise ArtifactError(path, "no such file", expected)
    num_bytes = path.stat().st_size
    if num_bytes != record.get("bytes", num_bytes):
        raise ArtifactError(path, f"{num_bytes} bytes", f"{record['bytes']} bytes")
    sha256 = hash_file(path) if deep else record["sha256"]
    if sha256 != record["sha256"]:
        raise ArtifactError(path, f"other content, sha256 {sha256}", f"sha256 {record['sha256']}")


def hash_json(value: object) -> str:
    """sha256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name in the same folder, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    """Write JSON, indented, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=True, default=str) + "\n").encode())


@contextmanager
def lock_folder(config: Config, folder: str) -> Iterator[None]:
    """Hold the only writer's right on a folder of the run; a second writer gets an ArtifactError."""
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    target = config.folder(folder)  # may lie elsewhere
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(config.folder(folder), "another process that writes it", "one writer at a time") from None
        yield


def load_inputs(config: Config, inputs: Sequence[str]) -> dict[str, Manifest]:
    """Manifests of the input folders, with their files' presence and sizes checked.

    Left out are token shards that lie elsewhere or of which some may be bad: only training reads them, and checks them itself.
    """
    manifests = {}
    for folder in inputs:
        manifests[folder] = Manifest.load(config.folder(folder))
        elsewhere = SHARDS if config.shards.max_bad_shards and folder == "tokens" else lying_elsewhere(config, folder)
        manifests[folder].check_files(config.folder(folder), elsewhere=elsewhere)
    return manifests


def lying_elsewhere(config: Config, folder: str) -> tuple[str, ...]:
    """How the names of files begin that a folder's manifest has and the folder need not: shards of which there is a copy."""
    return SHARDS if config.shards.url and folder == "tokens" else ()


def stage_identity(
    config: Config, sections: Sequence[str], inputs: Sequence[str], extra: dict | None = None
) -> tuple[str, dict, dict[str, str]]:
    """A stage's identity, the config sections that enter it, and the content hashes of its inputs.

    Errors   ArtifactError when an input is missing or incomplete
    """
    hashes = {name: manifest.content_hash for name, manifest in load_inputs(config, inputs).items()}
    used = {name: _plain(getattr(config, name)) for name in (*sections, "seed")}
    return hash_json({"config": used, "inputs": hashes, "extra": extra or {}}), used, hashes


def find_complete(
    config: Config, *, folder: str, sections: Sequence[str], inputs: Sequence[str], extra_identity: dict | None = None, **_
) -> Manifest | None:
    """The manifest of a stage whose output is complete for this config and these inputs."""
    identity, _, _ = stage_identity(config, sections, inputs, extra_identity)
    return _complete_manifest(config.folder(folder), identity, lying_elsewhere(config, folder))


def run_stage(
    config: Config,
    *,
    stage: str,
    folder: str,
    sections: Sequence[str],
    inputs: Sequence[str],
    build: Callable[[Config, Path], dict],
    extra_identity: dict | None = None,
) -> Manifest:
    """Run one stage under the rules of this module and return its manifest.

    `build(config, work_dir) -> facts` writes into work_dir, which may hold what an interrupted run of the same
    identity left there. `facts["files"]`, if given, maps a file to what is said of it (rows, shape, dtype, sha256).
    `sections` are the config fields that the output depends on; `seed` always counts.
    """
    log = get_logger(stage)
    with lock_folder(config, folder):
        identity, used, input_hashes = stage_identity(config, sections, inputs, extra_identity)
        target = config.folder(folder)
        work = target.with_name(f".{target.name}.partial")
        done = _complete_manifest(target, identity, lying_elsewhere(config, folder))
        if done is not None:
            log.info("complete, skipped: %s", target)
            return done
        _open_partial(work, identity)
        if not (work / MANIFEST_NAME).is_file():
            log.info("started: %s", target)
            start = time.monotonic()
            facts = build(config, work)
            notes = facts.pop("files", {})
            manifest = Manifest(
                stage=stage,
                folder=folder,
                identity=identity,
                config=used,
                inputs=input_hashes,
                files=_describe_files(work, notes),
                facts=facts,
                versions=package_versions(),
                seconds=round(time.monotonic() - start, 3),
            )
            write_json(work / MANIFEST_NAME, dataclasses.asdict(manifest))
        _publish(work, target)
        manifest = Manifest.load(target)
        log.info("done in %.1f s: %s", manifest.seconds, target)
        return manifest


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that the results depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _plain(value: object) -> object:
    """A section as JSON, without the fields that say only how it is executed, and without later switches at their default."""
    if not dataclasses.is_dataclass(value):
        return value
    values = {one: getattr(value, one.name) for one in dataclasses.fields(value)}
    return {one.name: _plain(inner) for one, inner in values.items() if _counts(one, inner)}


def _counts(field: dataclasses.Field, value: object) -> bool:
    """Whether a field enters the identity; see NO_IDENTITY and IDENTITY_IF_SET in config.py."""
    counts = field.metadata.get("identity", True)
    if counts != "if set":
        return counts
    return value != (field.default if field.default_factory is dataclasses.MISSING else field.default_factory())


def _complete_manifest(target: Path, identity: str, elsewhere: tuple[str, ...]) -> Manifest | None:
    """The manifest of `target` when it is complete and has this identity."""
    if not (target / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = Manifest.load(target)
        if manifest.identity != identity:
            get_logger(manifest.stage).info("settings or inputs changed: %s is built again", target)
            return None
        manifest.check_files(target, elsewhere=elsewhere)
    except ArtifactError as error:
        get_logger(target.name).warning("built again: %s", error)
        return None
    return manifest


def _open_partial(work: Path, identity: str) -> None:
    """Make `work` ready: keep what the same identity left there, drop anything else."""
    marker = work / IDENTITY_NAME
    try:
        left_by = json.loads(marker.read_text())
    except (OSError, ValueError):
        left_by = None
    if work.is_dir() and left_by != {"identity": identity}:
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    if not marker.is_file():
        write_json(marker, {"identity": identity})


def _describe_files(work: Path, notes: dict[str, dict]) -> dict[str, dict]:
    """Size and sha256 of everything in `work`; temporary leftovers of a killed run are removed."""
    for leftover in work.rglob(".*.tmp"):
        leftover.unlink()
    files = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file() and p.name not in (MANIFEST_NAME, IDENTITY_NAME)):
        name = path.relative_to(work).as_posix()
        said = notes.get(name, {})  # a stage that hashed a file when it wrote it says so: large outputs are read once
        files[name] = {"sha256": said.get("sha256") or hash_file(path), "bytes": path.stat().st_size, **said}
    return files


def _publish(work: Path, target: Path) -> None:
    """Give the complete folder its name; an older output steps aside first."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(work, target)
    shutil.rmtree(old, ignore_errors=True)

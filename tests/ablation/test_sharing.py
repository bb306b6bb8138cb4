"""ablation/sharing.py: folders that fit are linked, others are not, and no run's rebuild reaches into another's files."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from contrec_dist.ablation import sharing
from contrec_dist.ablation.sharing import fits, take_over
from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, lock_folder, run_stage, write_atomically


class Chain:
    """Two stages, the second made from the first, and the folders that they built."""

    def __init__(self):
        self.built: list[str] = []

    def run(self, config: Config, folder: str, **more) -> Manifest:
        sections, inputs = {"catalog": (("source",), ()), "embeddings": (("embed",), ("catalog",))}[folder]

        def build(_config, work):
            self.built.append(f"{Path(config.run_dir).name}/{folder}")
            (work / "parts").mkdir(exist_ok=True)
            write_atomically(work / "parts" / "0.txt", f"{config.source} {config.embed}".encode())
            return {}

        return run_stage(config, stage=folder, folder=folder, sections=sections, inputs=inputs, build=build, **more)

    def run_all(self, config: Config, donors: list[Config]) -> None:
        for folder in ("catalog", "embeddings"):
            take_over(config, folder, donors)
            self.run(config, folder)


@pytest.fixture
def chain():
    return Chain()


@pytest.fixture
def base(tmp_path, chain) -> Config:
    config = Config(name="base", run_dir=str(tmp_path / "base"))
    chain.run_all(config, [])
    return config


def row(base: Config, name: str, **embed) -> Config:
    run_dir = str(Path(base.run_dir) / "ablation" / name)
    return replace(base, run_dir=run_dir, embed=replace(base.embed, **embed))


def text(config: Config, folder: str) -> str:
    return (config.folder(folder) / "parts" / "0.txt").read_text()


def test_what_is_the_same_is_taken_over_and_what_is_not_is_built(base, chain):
    changed = row(base, "changed", text_dim=7)
    chain.run_all(changed, [base])
    assert chain.built == ["base/catalog", "base/embeddings", "changed/embeddings"]
    assert os.path.samefile(*(config.folder("catalog") / "parts/0.txt" for config in (base, changed)))
    assert "text_dim=7" in text(changed, "embeddings") and "text_dim=7" not in text(base, "embeddings")
    Manifest.load(changed.folder("catalog")).check_files(changed.folder("catalog"), deep=True)


def test_a_folder_made_from_other_inputs_is_not_taken_over(base, chain):
    """The same settings of the stage itself, but of another catalogue."""
    other = replace(row(base, "other"), source=replace(base.source, min_rating=3.0))
    chain.run(other, "catalog")
    assert take_over(other, "embeddings", [base]) is None and not other.folder("embeddings").exists()
    chain.run(other, "embeddings")
    assert chain.built[2:] == ["other/catalog", "other/embeddings"]


def test_rows_take_over_from_one_another(base, chain):
    first, second = row(base, "first", text_dim=7), row(base, "second", text_dim=7)
    for one in (first, second):
        chain.run_all(one, [base, first, second])
    assert chain.built[2:] == ["first/embeddings"]


def test_nothing_is_taken_over_twice_nor_from_oneself(base, chain):
    same = row(base, "same")
    assert take_over(same, "catalog", [base, same]) == base.folder("catalog")
    assert take_over(same, "catalog", [base, same]) is None
    assert take_over(base, "catalog", [base]) is None


def test_a_rebuild_leaves_the_files_of_whom_it_was_taken_over_from_alone(base, chain):
    taken = row(base, "taken")
    chain.run_all(taken, [base])
    before = {folder: text(base, folder) for folder in ("catalog", "embeddings")}
    changed = replace(taken, source=replace(base.source, min_rating=3.0))
    for folder in before:
        chain.run(changed, folder)
    assert {folder: text(base, folder) for folder in before} == before != {folder: text(changed, folder) for folder in before}
    for folder in before:
        Manifest.load(base.folder(folder)).check_files(base.folder(folder), deep=True)


def test_a_rebuild_of_the_base_leaves_the_rows_alone(base, chain):
    taken = row(base, "taken")
    chain.run_all(taken, [base])
    before = text(taken, "catalog")
    chain.run(replace(base, source=replace(base.source, min_rating=3.0)), "catalog")
    assert text(taken, "catalog") == before != text(base, "catalog")


def test_the_stage_itself_has_the_last_word(base, chain):
    """What it counts beside its config is known to it alone: the folder was taken over, and is built again."""
    extra = {"extra_identity": {"model": "another"}}
    taken = row(base, "taken")
    take_over(taken, "catalog", [base])
    chain.run(taken, "catalog", **extra)
    assert chain.built[2:] == ["taken/catalog"]
    Manifest.load(base.folder("catalog")).check_files(base.folder("catalog"), deep=True)


def test_a_damaged_folder_is_not_taken_over(base, chain):
    (base.folder("catalog") / "parts" / "0.txt").write_text("cut")
    assert not fits(base, base.folder("catalog")) and take_over(row(base, "new"), "catalog", [base]) is None


def test_a_stale_folder_of_the_row_gives_way(base, chain):
    changed = row(base, "changed", text_dim=7)
    chain.run_all(changed, [base])
    back = row(base, "changed")
    chain.run_all(back, [base])
    assert chain.built[2:] == ["changed/embeddings"] and text(back, "embeddings") == text(base, "embeddings")


def test_a_folder_that_another_process_writes_is_not_read_meanwhile(base):
    with lock_folder(base, "catalog"), pytest.raises(ArtifactError, match="another process"):
        take_over(row(base, "new"), "catalog", [base])


def test_files_are_copied_where_there_are_no_links(base, chain, monkeypatch):
    def refuse(*_):
        raise OSError("links are not supported")

    monkeypatch.setattr(sharing.os, "link", refuse)
    same = row(base, "same")
    chain.run_all(same, [base])
    assert chain.built == ["base/catalog", "base/embeddings"] and text(same, "catalog") == text(base, "catalog")


def test_a_kill_in_the_middle_leaves_nothing_that_looks_finished(base, monkeypatch):
    same = row(base, "same")
    monkeypatch.setattr(sharing.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        take_over(same, "catalog", [base])
    monkeypatch.undo()
    assert not same.folder("catalog").exists()
    assert take_over(same, "catalog", [base]) is not None and fits(same, same.folder("catalog"))

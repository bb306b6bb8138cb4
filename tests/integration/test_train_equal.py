"""How training is executed does not change what is learned: ranks, ZeRO stages, launchers; and a step that is not finite
is refused on every one of them.
"""

import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from launched import Command, copy_run, file_hashes, free_port, run_contrec, run_several, start, write_config

from contrec_dist.config import Config
from contrec_dist.manifest import MANIFEST_NAME, Manifest, hash_file, write_json
from sharding.token_reader import TokenReader
from sharding.token_writer import sample_key, shard_name

pytestmark = pytest.mark.timeout(900)
TERMS = ("loss", "lm", "negative", "diffusion", "dispersive")
POISONED_STAGES = (0, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("equal")


@pytest.fixture(scope="module")
def one_rank(reference, folder) -> Config:
    """The reference's training on one rank."""
    config = _new_run(reference[0], folder, "one_rank")
    command = run_contrec("train", config, folder / "one_rank.log", "launch.num_ranks=1")
    assert command.process.returncode == 0, command.log
    return config


@pytest.fixture(scope="module")
def poisoned_user(reference) -> int:
    """A user whose history is one training sample of several items."""
    reader = TokenReader(reference[0].folder("tokens"))
    return int(np.flatnonzero((reader.num_train >= 4) & (reader.num_train <= 8))[0])


@pytest.fixture(scope="module")
def several(reference, folder, poisoned_user) -> tuple[dict[str, Config], Command]:
    """In one start on two ranks: ZeRO stages 0 to 2, and stages with one NaN among the latents, one bad step allowed."""
    configs = {}
    for stage in (0, 1, 2):
        config = _new_run(reference[0], folder, f"stage{stage}")
        configs[f"stage{stage}"] = replace(config, zero=replace(config.zero, stage=stage))
    for stage in POISONED_STAGES:
        config = _new_run(reference[0], folder, f"poisoned{stage}")
        _poison(config, poisoned_user)
        train, zero = replace(config.train, max_bad_steps=1, checkpoint_every_steps=1), replace(config.zero, stage=stage)
        configs[f"poisoned{stage}"] = replace(config, train=train, zero=zero)
    return configs, run_several(configs, folder)


def test_one_rank_and_two_give_the_same_losses(reference, one_rank):
    _assert_same_losses(_metrics(one_rank), _metrics(reference[0]))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_stages_give_the_same_losses(reference, several, stage):
    _assert_same_losses(_metrics(several[0][f"stage{stage}"]), _metrics(reference[0]))


@pytest.mark.parametrize("stage", POISONED_STAGES)
def test_step_that_is_not_finite_is_not_applied_and_named(several, poisoned_user, folder, stage):
    configs, command = several
    name, key = f"poisoned{stage}", sample_key(poisoned_user)
    lines = _read_lines(next(Path(configs[name].run_dir).glob("checkpoints/*/metrics.jsonl")))
    bad = [line["step"] for line in lines if line["loss"] is None]
    assert len(bad) == 1  # the second one ended the run before it was written
    later = [line for line in lines if line["step"] > bad[0]]
    assert later and all(np.isfinite(line["loss"]) for line in later)
    assert not configs[name].folder("model").exists()
    assert list(Path(configs[name].run_dir).glob(f"checkpoints/*/step-{lines[-1]['step']:08d}/complete.json"))
    warned = f"step {bad[0]}: loss nan, step not applied: rank "
    assert any(warned in line and key in line and "1 of 1 allowed" in line for line in command.log.splitlines())
    for rank in (0, 1):
        error = json.loads((folder / f"{name}-rank{rank}.json").read_text())["error"]
        assert f"step {lines[-1]['step'] + 1}: loss nan, step not applied: rank " in error
        assert key in error and "More than train.max_bad_steps=1; the last good checkpoint is kept" in error


def test_torchrun_trains_the_same_model(reference, folder):
    config = _new_run(reference[0], folder, "torchrun")
    path = write_config(config, folder / "torchrun.yaml")
    launcher = Path(__file__).resolve().parents[2] / "launchers" / "train.py"
    command = start(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         str(launcher), "--config", str(path)],
        folder / "torchrun.log",
    )  # fmt: skip
    try:
        assert command.wait() == 0, command.log
    finally:
        command.end()
    assert file_hashes(config, "model") == file_hashes(reference[0], "model")


def _new_run(source: Config, folder: Path, name: str) -> Config:
    config = replace(source, run_dir=str(folder / name))
    return copy_run(source, config, "catalog", "embeddings", "tokenizer", "tokens")


def _metrics(config: Config) -> list[dict]:
    return _read_lines(config.folder("model") / "metrics.jsonl")


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _assert_same_losses(lines: list[dict], expected: list[dict]) -> None:
    """The same data in the same order, and losses that differ by the rounding of fp32 sums."""
    fixed = ("step", "epoch", "num_targets", "learning_rate")
    assert [[line[name] for name in fixed] for line in lines] == [[line[name] for name in fixed] for line in expected]
    for name in TERMS:
        np.testing.assert_allclose(
            [line[name] for line in lines], [line[name] for line in expected], rtol=1e-5, atol=1e-6, err_msg=name
        )


def _poison(config: Config, user: int) -> None:
    """NaN as the first latent of a user's history, as a writer with a fault would have left it: sums and all agree."""
    folder = config.folder("tokens")
    index = pl.read_parquet(folder / "index.parquet")
    row = index.row(user, named=True)
    path = folder / shard_name(row["shard"])
    data = bytearray(path.read_bytes())
    items = data[row["items_offset"] : row["items_offset"] + row["items_bytes"]]
    end = row["latents_offset"] + row["latents_bytes"]
    latents = TokenReader(folder).read(user).latents
    data[end - latents.nbytes : end - latents.nbytes + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    crc32 = zlib.crc32(data[row["latents_offset"] : end], zlib.crc32(items))
    changed = pl.when(pl.col("user_idx") == user).then(crc32).otherwise(pl.col("crc32")).cast(pl.Int64).alias("crc32")
    index.with_columns(changed).write_parquet(folder / "index.parquet")
    assert np.isnan(TokenReader(folder).read(user).latents).sum() == 1
    _sign_again(folder, path.relative_to(folder).as_posix(), "index.parquet")


def _sign_again(folder: Path, *names: str) -> None:
    """Have the manifest say what the files are now."""
    manifest = Manifest.load(folder)
    for name in names:
        manifest.files[name] |= {"sha256": hash_file(folder / name), "bytes": (folder / name).stat().st_size}
    write_json(folder / MANIFEST_NAME, vars(manifest))

"""How training is executed does not change what is learned: ranks, ZeRO stages, launchers, stops, another start; and a
step that is not finite is refused on every one of them.
"""

import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from launched import Command, copy_run, file_hashes, free_port, run_several, start, write_config

from contrec_dist.config import Config
from contrec_dist.manifest import MANIFEST_NAME, Manifest, hash_file, write_json
from sharding.token_reader import TokenReader
from sharding.token_writer import sample_key, shard_name

pytestmark = pytest.mark.timeout(900)
TERMS = ("loss", "lm", "negative", "diffusion", "dispersive")
POISONED_STAGES = (0, 2, 3)
CHAINED_STAGES = (2, 3)  # 0 has nothing to cut in pieces, 1 cuts as 2 does
SPOILED_STEP = 2
FIRST_STOP, SECOND_STOP = 5, 9  # of 7 steps an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("equal")


@pytest.fixture(scope="module")
def poisoned_user(reference) -> int:
    """A user whose history is one training sample of several items."""
    reader = TokenReader(reference[0].folder("tokens"))
    return int(np.flatnonzero((reader.num_train >= 4) & (reader.num_train <= 8))[0])


@pytest.fixture(scope="module")
def chains(reference, folder) -> dict[str, Config]:
    """Runs that stop on two ranks, go on and stop on one, and end on four."""
    return {f"chain{stage}": _of_stage(_new_run(reference[0], folder, f"chain{stage}"), stage) for stage in CHAINED_STAGES}


@pytest.fixture(scope="module")
def two_ranks(reference, folder, poisoned_user, chains) -> tuple[dict[str, Config], Command]:
    """In one start: ZeRO stages 0 to 2; more than 50 steps; a run that stops and goes on; the chains' first part; and
    stages with infinite gradients in one step, one NaN among the latents, and two bad steps allowed.
    """
    long = _new_run(reference[0], folder, "long")
    cut = _new_run(reference[0], folder, "cut")
    configs = {"long": replace(long, train=replace(long.train, num_epochs=10)), "cut": cut, "cut_again": cut, **chains}
    for stage in (0, 1, 2):
        configs[f"stage{stage}"] = _of_stage(_new_run(reference[0], folder, f"stage{stage}"), stage)
    for stage in POISONED_STAGES:
        config = _of_stage(_new_run(reference[0], folder, f"poisoned{stage}"), stage)
        _poison(config, poisoned_user)
        train = replace(config.train, max_bad_steps=2, checkpoint_every_steps=1, keep_last_n=100)
        configs[f"poisoned{stage}"] = replace(config, train=train)
    options = [f"--spoil=poisoned{stage}={2 * SPOILED_STEP}" for stage in POISONED_STAGES]  # two micro-batches a step
    options += [f"--stop={name}={FIRST_STOP}" for name in ("cut", *chains)]
    return configs, run_several(configs, folder, *options)


@pytest.fixture(scope="module")
def one_rank(reference, folder, two_ranks, chains) -> Config:
    """The reference's training on one rank, and the chains' second part."""
    config = _new_run(reference[0], folder, "one_rank")
    options = [f"--stop={name}={SECOND_STOP}" for name in chains]
    run_several({"one_rank": config, **chains}, folder, *options, num_ranks=1)
    return config


@pytest.fixture(scope="module")
def four_ranks(reference, folder, one_rank, chains) -> tuple[Config, Command]:
    """The reference's training on four ranks, and the chains' last part."""
    config = _new_run(reference[0], folder, "four_ranks")
    return config, run_several({"four_ranks": config, **chains}, folder, num_ranks=4)


def test_one_rank_and_two_give_the_same_losses(reference, one_rank):
    _assert_same_losses(_metrics(one_rank), _metrics(reference[0]))


def test_four_ranks_and_two_give_the_same_losses(reference, four_ranks):
    _assert_same_losses(_metrics(four_ranks[0]), _metrics(reference[0]))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_stages_give_the_same_losses(reference, two_ranks, stage):
    _assert_same_losses(_metrics(two_ranks[0][f"stage{stage}"]), _metrics(reference[0]))


@pytest.mark.parametrize("stage", CHAINED_STAGES)
def test_run_resumed_on_two_then_one_then_four_ranks_in_mid_epoch_gives_the_same_losses(
    reference, four_ranks, chains, folder, stage
):
    lines = _metrics(chains[f"chain{stage}"])
    logs = "".join((folder / f"several_on_{ranks}.log").read_text() for ranks in (1, 4))
    for stop in (FIRST_STOP, SECOND_STOP):
        assert lines[stop - 1]["epoch"] == lines[stop]["epoch"]  # in mid-epoch
        assert logs.count(f"resumed at step {stop} ") == len(CHAINED_STAGES)
    _assert_same_losses(lines, _metrics(reference[0]))


def test_run_stopped_in_mid_epoch_and_run_again_equals_uninterrupted_to_the_bit(reference, two_ranks, folder):
    observed = json.loads((folder / "cut-rank1.json").read_text())
    assert f"stopped at step {FIRST_STOP} by the stop-file STOP" in observed["error"]
    assert file_hashes(two_ranks[0]["cut_again"], "model") == file_hashes(reference[0], "model")


@pytest.mark.parametrize("stage", POISONED_STAGES)
def test_step_that_is_not_finite_is_not_applied_and_named(two_ranks, poisoned_user, folder, stage):
    configs, command = two_ranks
    name, key = f"poisoned{stage}", sample_key(poisoned_user)
    lines = _read_lines(next(Path(configs[name].run_dir).glob("checkpoints/*/metrics.jsonl")))
    bad = [line["step"] for line in lines if line["loss"] is None]
    assert len(bad) == 1 and bad[0] > SPOILED_STEP  # the second one ended the run before it was written
    later = [line for line in lines if line["step"] > bad[0]]
    assert later and all(np.isfinite(line["loss"]) for line in later)
    assert not configs[name].folder("model").exists()
    assert (_checkpoint(configs[name], lines[-1]["step"]) / "complete.json").is_file()
    warned = f"step {bad[0]}: loss nan, step not applied: rank "
    assert any(warned in line and key in line and "2 of 2 allowed" in line for line in command.log.splitlines())
    for rank in (0, 1):
        error = json.loads((folder / f"{name}-rank{rank}.json").read_text())["error"]
        assert f"step {lines[-1]['step'] + 1}: loss nan, step not applied: rank " in error
        assert key in error and "More than train.max_bad_steps=2; the last good checkpoint is kept" in error


@pytest.mark.parametrize("stage", POISONED_STAGES)
def test_infinite_gradients_under_a_finite_loss_are_refused_too(two_ranks, stage):
    configs, command = two_ranks
    lines = _read_lines(next(Path(configs[f"poisoned{stage}"].run_dir).glob("checkpoints/*/metrics.jsonl")))
    loss = lines[SPOILED_STEP - 1]["loss"]
    assert np.isfinite(loss)
    assert f"step {SPOILED_STEP}: loss {loss}, step not applied: gradients of all ranks together (1 of 2" in command.log


@pytest.mark.parametrize("stage", POISONED_STAGES)
def test_refused_step_leaves_weights_moments_and_average_as_they_were(two_ranks, stage):
    config = two_ranks[0][f"poisoned{stage}"]
    lines = _read_lines(next(Path(config.run_dir).glob("checkpoints/*/metrics.jsonl")))
    for bad in (SPOILED_STEP, *(line["step"] for line in lines if line["loss"] is None)):
        before, at, after = (_learned(_checkpoint(config, step)) for step in (bad - 1, bad, bad + 1))
        assert before.keys() == at.keys() == after.keys() and any("average" in name for name in before)
        assert any("exp_avg_sq" in name for name in before)
        assert [name for name in before if not torch.equal(before[name], at[name])] == []
        assert sum(not torch.equal(at[name], after[name]) for name in before) > len(before) / 2


def test_deepspeed_and_torchrun_train_the_same_bits_over_50_steps(two_ranks, folder):
    """Two runs of one seed in two starts, each on two ranks: losses of every step, weights, everything."""
    config = replace(two_ranks[0]["long"], run_dir=str(folder / "torchrun"))
    copy_run(two_ranks[0]["long"], config, "catalog", "embeddings", "tokenizer", "tokens")
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
    assert len(_metrics(config)) >= 50 and _metrics(config) == _metrics(two_ranks[0]["long"])
    assert file_hashes(config, "model") == file_hashes(two_ranks[0]["long"], "model")


def _of_stage(config: Config, stage: int) -> Config:
    return replace(config, zero=replace(config.zero, stage=stage))


def _checkpoint(config: Config, step: int) -> Path:
    return next(Path(config.run_dir).glob(f"checkpoints/*/step-{step:08d}"))


def _learned(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, moments, step counts and averages in all files of a checkpoint."""
    found = {}

    def collect(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor) and value.numel():
            found[name] = value
        elif isinstance(value, dict):
            for key, one in value.items():
                collect(f"{name}/{key}", one)
        elif isinstance(value, list):
            for place, one in enumerate(value):
                collect(f"{name}/{place}", one)

    for path in sorted((checkpoint / "state").glob("*.pt")):
        state = torch.load(path, weights_only=False)
        for key in ("module", "optimizer", "optimizer_state_dict"):
            collect(f"{path.name}/{key}", state.get(key))
    return found


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

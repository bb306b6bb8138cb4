"""`contrec estimate` against the memory that ranks really take: two CPU ranks, a model that outweighs the libraries."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from launched import copy_run, free_port, start, write_config

from contrec_dist.commands.estimate import data_sizes
from contrec_dist.config import Config, ShapeConfig
from contrec_dist.training.memory import BASE_BYTES, estimate_memory
from contrec_dist.training.train import STAGE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RANKS = 2
NO_ARGUMENTS = SimpleNamespace(num_items=None, mean_history=None, num_tokenizer_words=None)


def measure_peak(config: Config, folder: Path) -> int:
    """Train as `deepspeed launchers/train.py` does; the peak resident memory of the rank that had more."""
    path = write_config(config, folder / "toy.yaml")
    script = Path(__file__).with_name("measured_rank.py")
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(RANKS), "--master_port", str(free_port())]
    command = start([*runner, str(script), "--observe", str(folder), "--config", str(path)], folder / "train.log")
    try:
        assert command.wait() == 0, command.log
    finally:
        command.end()
    return max(json.loads((folder / f"peak-rank{rank}.json").read_text()) for rank in range(RANKS))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted as Linux does")
@pytest.mark.parametrize("stage", [1, 3])
def test_the_estimate_is_within_15_percent_of_the_peak(toy_tokens, tmp_path, stage):
    shape = ShapeConfig(hidden_size=512, num_layers=8, num_heads=8, intermediate_size=1536, vocab_size=400)
    config = replace(
        toy_tokens,
        run_dir=str(tmp_path / "run"),
        backbone=replace(toy_tokens.backbone, shape=shape),
        train=replace(toy_tokens.train, row_tokens=512, micro_batch_rows=6, global_batch_rows=12, num_epochs=9, max_steps=3),
        zero=replace(toy_tokens.zero, stage=stage),
        monitor=replace(toy_tokens.monitor, probe_every_steps=0),
    )
    copy_run(toy_tokens, config, *STAGE["inputs"], "embeddings")
    sizes = data_sizes(config, NO_ARGUMENTS)
    (estimate,) = estimate_memory(config, sizes, ranks=RANKS, stages=[stage], on_gpu=False)
    peak = measure_peak(config, tmp_path)
    assert peak > 3 * BASE_BYTES, "the libraries alone must not make the estimate right"
    assert estimate.bytes == pytest.approx(peak, rel=0.15)

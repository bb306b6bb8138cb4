"""Two ranks that train from an HTTP server: one shard is corrupt there, and the run does without it or ends, as it is told."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launched import copy_run, file_hashes, run_contrec, run_several

from contrec_dist.config import Config, ShardsConfig
from contrec_dist.manifest import Manifest
from sharding.token_reader import TokenReader
from sharding.token_writer import shard_name

sys.path.insert(0, str(Path(__file__).parents[1] / "sharding"))

from shard_server import ShardServer  # noqa: E402

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
BAD_SHARD, STOP_STEP = 1, 4


@pytest.fixture(scope="module")
def server(run_config, tmp_path_factory):
    server = ShardServer(run_config.folder("tokens"))
    yield server
    server.end()


def new_run(run_config: Config, run_dir: Path, shards: ShardsConfig) -> Config:
    """A run with the inputs of training; where its shards lie elsewhere, none are in its folder."""
    config = copy_run(run_config, replace(run_config, run_dir=str(run_dir), shards=shards), "catalog", "embeddings", "tokenizer", "tokens")
    for path in config.folder("tokens").glob("shards/*") if shards.url else ():
        path.unlink()
    return config


@pytest.fixture(scope="module")
def trained(run_config, server, tmp_path_factory) -> dict[str, Config]:
    """In one start: from the server, whose shard is corrupt at the first two looks; the same stopped, and gone on with when the
    shard is good again; and from the folder, where that shard is missing.
    """
    folder = tmp_path_factory.mktemp("remote")
    settings = ShardsConfig(url=server.url, retries=0, max_bad_shards=1)
    configs = {name: new_run(run_config, folder / name, settings) for name in ("remote", "cut")}
    configs["cut_again"] = configs["cut"]
    configs["local"] = new_run(run_config, folder / "local", ShardsConfig(max_bad_shards=1))
    (configs["local"].folder("tokens") / shard_name(BAD_SHARD)).unlink()
    server.faults[BAD_SHARD] = ["corrupt", "corrupt"]
    run_several(configs, folder, f"--stop=cut={STOP_STEP}")
    return configs


def test_training_goes_without_a_corrupt_shard_and_says_so(trained, run_config):
    config = trained["remote"]
    facts = Manifest.load(config.folder("model")).facts
    reader = TokenReader(run_config.folder("tokens"))
    assert facts["left_out_shards"] == [shard_name(BAD_SHARD)] and facts["bad_shards"] == []
    assert facts["left_out_samples_an_epoch"] >= int(((reader.shard == BAD_SHARD) & (reader.num_train > 1)).sum()) > 0
    assert facts["skipped_samples"] == 0
    assert not (config.folder("tokens") / "shards").is_dir() or not list(config.folder("tokens").glob("shards/*"))
    lines = [json.loads(line) for line in open(config.folder("model") / "metrics.jsonl")]
    assert lines and all(line["skipped_samples"] == 0 for line in lines)


def test_where_the_shards_lie_changes_nothing_of_the_model(trained):
    assert file_hashes(trained["remote"], "model") == file_hashes(trained["local"], "model")


def test_a_run_goes_on_without_the_shard_that_it_left_out_though_it_is_good_again(trained, server):
    assert server.requests[BAD_SHARD] == 3  # corrupt for two runs, good for the one that went on
    assert file_hashes(trained["cut"], "model") == file_hashes(trained["remote"], "model")
    assert Manifest.load(trained["cut"].folder("model")).facts["left_out_shards"] == [shard_name(BAD_SHARD)]


def test_a_corrupt_shard_ends_the_run_by_name_where_none_is_allowed(run_config, trained, server, tmp_path):
    server.faults[BAD_SHARD] = ["always corrupt"]
    config = new_run(run_config, tmp_path / "run", ShardsConfig(url=server.url, retries=0))
    refused = run_contrec("train", config, tmp_path / "refused.log")
    assert refused.process.returncode == 1
    assert f"{server.url}{shard_name(BAD_SHARD)}: got " in refused.log and "in 1 try, expected" in refused.log

"""remote_shards: what is read through a URL is what was written, whatever the server does; the cache is right and small."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from contrec_dist.config import Config, ShardsConfig, load_config
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.manifest import Manifest, hash_file, load_inputs, write_json
from sharding import remote_shards
from sharding.remote_shards import RemoteShards
from sharding.shard_files import LocalShards, open_shards
from sharding.token_reader import TokenReader
from sharding.token_writer import TokenSample, shard_name, write_shard

sys.path.insert(0, str(Path(__file__).parent))  # the module beside this one

from shard_server import ShardServer  # noqa: E402

NUM_SHARDS, USERS_PER_SHARD = 4, 3
STALL_SECONDS = 0.3


def make_sample(user_idx: int) -> TokenSample:
    generator = np.random.default_rng(user_idx)
    num_items = 1 + user_idx % 4
    latents = generator.standard_normal((num_items, 2, 3)).astype(np.float16)
    return TokenSample(user_idx, generator.integers(0, 100, num_items, dtype=np.int32), latents, num_items, -1, -1)


@pytest.fixture
def config(tmp_path) -> Config:
    """A run whose tokens folder has an index and a manifest, and no shards: these lie in `elsewhere`."""
    config = Config(name="remote", run_dir=str(tmp_path / "run"))
    tokens, elsewhere = config.folder("tokens"), tmp_path / "elsewhere"
    tokens.mkdir(parents=True)
    (elsewhere / "shards").mkdir(parents=True)
    index = []
    for shard in range(NUM_SHARDS):
        users = range(shard * USERS_PER_SHARD, (shard + 1) * USERS_PER_SHARD)
        index.append(write_shard(elsewhere / shard_name(shard), shard, [(f"u{user}", make_sample(user)) for user in users]))
    pl.concat(index).write_parquet(tokens / "index.parquet")
    np.save(tokens / "latent_mean.npy", np.zeros((2, 3), np.float32))
    paths = {shard_name(shard): elsewhere / shard_name(shard) for shard in range(NUM_SHARDS)}
    paths |= {name: tokens / name for name in ("index.parquet", "latent_mean.npy")}
    files = {name: {"sha256": hash_file(path), "bytes": path.stat().st_size} for name, path in paths.items()}
    manifest = Manifest(
        stage="precompute", folder="tokens", identity="i", config={}, inputs={}, files=files, facts={"num_shards": NUM_SHARDS}
    )
    write_json(tokens / "manifest.json", vars(manifest))
    return config


@pytest.fixture
def server(config):
    server = ShardServer(Path(config.run_dir).parent / "elsewhere")
    config.shards = ShardsConfig(url=server.url, retries=2, timeout_seconds=STALL_SECONDS)
    yield server
    server.end()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote_shards, "FIRST_WAIT_SECONDS", 0.01)


def open_reader(config: Config) -> TokenReader:
    return TokenReader(config.folder("tokens"), shards=open_shards(config))


def assert_all_users_come_back(reader: TokenReader) -> None:
    for user in range(NUM_SHARDS * USERS_PER_SHARD):
        got, expected = reader.read(user), make_sample(user)
        assert got._replace(items=None, latents=None) == expected._replace(items=None, latents=None)
        np.testing.assert_array_equal(got.items, expected.items)
        np.testing.assert_array_equal(got.latents, expected.latents)


def cached(config: Config) -> dict[int, Path]:
    return {int(path.name[:6]): path for path in config.folder("shard_cache").glob("*.tar")}


def test_every_user_is_read_and_every_shard_is_fetched_once(config, server):
    assert_all_users_come_back(open_reader(config))
    assert_all_users_come_back(open_reader(config))  # from the cache
    assert server.requests == Counter(range(NUM_SHARDS))
    assert sorted(cached(config)) == list(range(NUM_SHARDS))
    assert not list(config.folder("shard_cache").glob(".*.tmp"))
    assert not (config.folder("tokens") / "shards").exists()


@pytest.mark.parametrize("fault", [503, "stall", "cut", "corrupt"])
def test_a_transfer_that_fails_is_tried_again(config, server, fault):
    server.faults[1] = [fault, fault]
    assert_all_users_come_back(open_reader(config))
    assert server.requests[1] == 3 and server.requests[2] == 1


@pytest.mark.parametrize(
    ("fault", "happened"),
    [("503", "503"), ("stall", f"stalled: nothing for {STALL_SECONDS} s|imeout"), ("cut", "bytes with sha256"), ("corrupt", "bytes with sha256")],
)
def test_a_transfer_that_keeps_failing_is_told_with_url_last_failure_and_tries(config, server, fault, happened):
    server.faults[1] = [f"always {fault}"]
    reader = open_reader(config)
    with pytest.raises(ArtifactError, match=f"({happened}).* in the last of 3 tries, expected .* bytes with sha256") as caught:
        reader.read(USERS_PER_SHARD)
    assert caught.value.path == f"{server.url}shards/000001.tar"
    assert server.requests[1] == 3 and 1 not in cached(config)
    assert not list(config.folder("shard_cache").glob(".*.tmp"))
    reader.read(0)  # the others are read all the same


def test_a_shard_that_could_not_be_had_is_not_asked_for_again(config, server):
    server.faults[1] = ["always 503"]
    reader = open_reader(config)
    for user in (USERS_PER_SHARD, USERS_PER_SHARD + 1):
        with pytest.raises(ArtifactError, match="503"):
            reader.read(user)
    assert server.requests[1] == 3


def test_a_missing_shard_is_not_tried_again(config, server):
    (server.folder / shard_name(2)).unlink()
    server.faults[2] = ["always 404"]
    with pytest.raises(ArtifactError, match="000002.tar: got FileNotFoundError.* in 1 try"):
        open_reader(config).read(2 * USERS_PER_SHARD)
    assert server.requests[2] == 1


def test_a_transfer_that_stalls_is_given_up_without_any_timeout_of_the_protocol(config, server):
    """What other protocols rely on: the file that does not grow."""
    server.faults[0] = ["stall"]
    settings = ShardsConfig(url="", timeout_seconds=STALL_SECONDS)
    assert "client_kwargs" not in remote_shards.transfer_options(settings)
    with pytest.raises(remote_shards.TransferError, match=f"stalled: nothing for {STALL_SECONDS} s after [1-9]"):
        remote_shards.transfer(f"{server.url}shards/000000.tar", Path(config.run_dir) / "half.tar", settings)


@pytest.mark.parametrize("damage", ["cut", "corrupt"])
def test_a_damaged_file_in_the_cache_is_fetched_again(config, server, damage):
    assert_all_users_come_back(open_reader(config))
    path = cached(config)[1]
    data = path.read_bytes()
    latents = make_sample(4).latents.tobytes()
    path.write_bytes(data[:700] if damage == "cut" else data.replace(latents, b"\1" * len(latents)))
    assert path.read_bytes() != data and (len(path.read_bytes()) == len(data)) == (damage == "corrupt")
    assert_all_users_come_back(open_reader(config))
    assert path.read_bytes() == data and server.requests[1] == 2 and server.requests[0] == 1


def test_a_file_that_is_damaged_while_it_is_open_is_fetched_again(config, server):
    reader = open_reader(config)
    assert_all_users_come_back(reader)
    os.truncate(cached(config)[3], 100)
    assert_all_users_come_back(reader)
    assert server.requests[3] == 2


def test_an_index_that_is_wrong_is_no_matter_of_fetching(config, server):
    path = config.folder("tokens") / "index.parquet"
    pl.read_parquet(path).with_columns(pl.col("crc32") + (pl.col("user_idx") == 4)).write_parquet(path)
    with pytest.raises(ArtifactError, match="000001-.*tar: got other content in sample 000000000004"):
        open_reader(config).read(4)
    assert server.requests[1] == 1


def test_the_cache_keeps_to_its_limit_and_drops_what_was_used_longest_ago(config, server):
    sizes = {shard: (server.folder / shard_name(shard)).stat().st_size for shard in range(NUM_SHARDS)}
    config.shards.cache_bytes = sizes[0] + sizes[1] + sizes[2]
    first_user = [shard * USERS_PER_SHARD for shard in range(NUM_SHARDS)]
    for number, shard in enumerate((0, 1, 2, 0)):
        open_reader(config).read(first_user[shard])  # a new reader opens the file, which counts as a use
        os.utime(cached(config)[shard], ns=(number, number))
    open_reader(config).read(first_user[3])
    assert 1 not in cached(config) and {0, 3} <= cached(config).keys()
    assert sum(path.stat().st_size for path in cached(config).values()) <= config.shards.cache_bytes
    assert_all_users_come_back(open_reader(config))


def test_a_reader_keeps_what_it_has_open_when_the_cache_drops_it(config, server):
    config.shards.cache_bytes = max((server.folder / shard_name(shard)).stat().st_size for shard in range(NUM_SHARDS))
    reader = open_reader(config)
    assert_all_users_come_back(reader)
    assert_all_users_come_back(reader)
    assert server.requests == Counter(range(NUM_SHARDS)) and len(cached(config)) == 1


def test_a_cache_without_room_for_a_shard_is_refused(config, server):
    config.shards.cache_bytes = 1000
    with pytest.raises(ConfigError, match="shards.cache_bytes.*1000.*the largest shard"):
        open_shards(config)


def test_runs_of_other_content_share_a_cache_without_taking_each_others_files(config, server, tmp_path):
    config.shards.cache_dir = str(tmp_path / "cache")
    assert_all_users_come_back(open_reader(config))
    other = RemoteShards(config.shards, tmp_path / "cache", {0: {"bytes": 10, "sha256": "f" * 64}})
    with pytest.raises(ArtifactError, match="in the last of 3 tries, expected 10 bytes with sha256 ffff"):
        other.open(0)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == NUM_SHARDS


class Users(torch.utils.data.Dataset):
    def __init__(self, reader: TokenReader):
        self.reader = reader

    def __len__(self) -> int:
        return self.reader.num_samples

    def __getitem__(self, user: int) -> bool:
        return np.array_equal(self.reader.read(user).latents, make_sample(user).latents)


def test_forked_and_pickled_readers_share_one_cache(config, server):
    reader = open_reader(config)
    reader.read(0)
    loader = torch.utils.data.DataLoader(Users(reader), num_workers=2, batch_size=4, multiprocessing_context="fork")
    assert all(batch.all() for batch in loader)
    assert_all_users_come_back(pickle.loads(pickle.dumps(reader)))
    assert server.requests == Counter(range(NUM_SHARDS))


READ_ALL = """
import sys
from contrec_dist.config import load_config
from sharding.shard_files import open_shards
from sharding.token_reader import TokenReader
config = load_config([], sys.argv[1:])
reader = TokenReader(config.folder("tokens"), shards=open_shards(config))
print(sum(len(reader.read(user).items) for user in range(reader.num_samples)))
"""


def test_two_processes_that_share_a_cache_fetch_every_shard_once(config, server):
    arguments = ["name=remote", f"run_dir={config.run_dir}", f"shards.url={server.url}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen([sys.executable, "-c", READ_ALL, *arguments], stdout=subprocess.PIPE, env=environment) for _ in range(2)
    ]
    read = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert read == [sum(len(make_sample(user).items) for user in range(NUM_SHARDS * USERS_PER_SHARD))] * 2
    assert server.requests == Counter(range(NUM_SHARDS))


def test_what_a_killed_process_left_is_removed(config, server):
    shards = open_shards(config)
    leftover = shards.cache / f".{shards._path(0).name}.123-4.tmp"
    leftover.write_bytes(b"half")
    shards.open(0)
    assert not leftover.exists()


def test_a_plain_folder_is_read_where_it_is_and_a_file_url_through_the_cache(config):
    elsewhere = Path(config.run_dir).parent / "elsewhere"
    config.shards = ShardsConfig(url=str(elsewhere))
    assert isinstance(open_shards(config), LocalShards)
    assert_all_users_come_back(open_reader(config))
    assert not config.folder("shard_cache").exists()
    config.shards = ShardsConfig(url=f"file://{elsewhere}")
    assert_all_users_come_back(open_reader(config))
    assert len(cached(config)) == NUM_SHARDS


def test_an_unknown_kind_of_url_is_refused_by_name(config):
    config.shards = ShardsConfig(url="carrier-pigeon://loft/tokens")
    with pytest.raises(ConfigError, match="shards.url.*carrier-pigeon://loft/tokens.*not known"):
        open_shards(config)


def test_inputs_ask_for_local_shards_only_where_they_are_read(config, server):
    assert load_inputs(config, ["tokens"])["tokens"].facts == {"num_shards": NUM_SHARDS}
    config.shards = ShardsConfig(max_bad_shards=1)
    load_inputs(config, ["tokens"])
    config.shards = ShardsConfig()
    with pytest.raises(ArtifactError, match="000000.tar: got no such file"):
        load_inputs(config, ["tokens"])
    config.shards = ShardsConfig(url=server.url)
    (config.folder("tokens") / "latent_mean.npy").unlink()
    with pytest.raises(ArtifactError, match="latent_mean.npy: got no such file"):
        load_inputs(config, ["tokens"])


def test_settings_come_from_yaml_and_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nshards: {url: s3://bucket/tokens, storage_options: {anon: true, endpoint_url: 'https://here'}}\n")
    shards = load_config([path], ["shards.max_bad_shards=2"]).shards
    assert remote_shards.transfer_options(shards) == {"anon": True, "endpoint_url": "https://here"}
    assert shards.max_bad_shards == 2


@pytest.mark.parametrize("setting", ["retries=-1", "cache_bytes=-1", "max_bad_shards=-1", "timeout_seconds=0"])
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(ConfigError, match=f"shards.{setting.split('=')[0]}"):
        load_config([], ["name=x", f"shards.{setting}"])

"""token_reader: random access gives back what was written, and anything damaged is an error that names it."""

import pickle

import numpy as np
import polars as pl
import pytest
import torch

from contrec_dist.errors import ArtifactError
from sharding.token_reader import TokenReader
from sharding.token_writer import TokenSample, shard_name, write_shard

USERS_PER_SHARD, NUM_USERS = 4, 10


def make_sample(user_idx: int) -> TokenSample:
    generator = np.random.default_rng(user_idx)
    num_items = user_idx % 5  # user 0 and 5 have no history
    latents = generator.standard_normal((num_items, 2, 3)).astype(np.float16)
    items = generator.integers(0, 100, num_items, dtype=np.int32)
    return TokenSample(user_idx, items, latents, num_items, -1, num_items - 1)


@pytest.fixture
def tokens(tmp_path):
    """A tokens folder of 10 users in 3 shards."""
    (tmp_path / "shards").mkdir()
    index = []
    for shard, first in enumerate(range(0, NUM_USERS, USERS_PER_SHARD)):
        users = range(first, min(first + USERS_PER_SHARD, NUM_USERS))
        pairs = [(f"u{user}", make_sample(user)) for user in users]
        index.append(write_shard(tmp_path / shard_name(shard), shard, pairs))
    pl.concat(index).write_parquet(tmp_path / "index.parquet")
    np.save(tmp_path / "latent_mean.npy", np.zeros((2, 3), np.float32))
    return tmp_path


def assert_same(got: TokenSample, expected: TokenSample) -> None:
    assert got._replace(items=None, latents=None) == expected._replace(items=None, latents=None)
    for name in ("items", "latents"):
        left, right = getattr(got, name), getattr(expected, name)
        assert left.dtype == right.dtype and left.flags.writeable
        np.testing.assert_array_equal(left, right)


def damage(path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_samples_come_back_in_any_order_with_few_open_shards(tokens):
    reader = TokenReader(tokens, max_open_shards=1)
    for user_idx in (9, 0, 5, 1, 8, 4, 3, 2, 7, 6):
        assert_same(reader.read(user_idx), make_sample(user_idx))
        assert len(reader._open) == 1


def test_index_arrays_describe_every_user(tokens):
    reader = TokenReader(tokens)
    assert (reader.num_samples, reader.num_shards, reader.num_item_tokens, reader.latent_dim) == (10, 3, 2, 3)
    assert reader.shard.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert reader.num_items.tolist() == [0, 1, 2, 3, 4] * 2
    assert reader.num_train.tolist() == reader.num_items.tolist()
    assert set(reader.validation_pos.tolist()) == {-1}
    assert reader.test_pos.tolist() == [-1, 0, 1, 2, 3] * 2


def test_shards_streamed_one_after_another_give_every_user_once(tokens):
    reader = TokenReader(tokens)
    samples = [sample for shard in range(reader.num_shards) for sample in reader.iter_shard(shard)]
    for user_idx, sample in enumerate(samples):
        assert_same(sample, make_sample(user_idx))
    assert len(samples) == NUM_USERS
    with pytest.raises(ArtifactError, match="no shard 3.*0..2"):
        next(reader.iter_shard(3))


class Rows(torch.utils.data.Dataset):
    def __init__(self, reader: TokenReader):
        self.reader = reader

    def __len__(self):
        return self.reader.num_samples

    def __getitem__(self, user_idx):
        return self.reader.read(user_idx)


def test_a_reader_that_was_used_works_in_loader_processes(tokens):
    reader = TokenReader(tokens, max_open_shards=1)
    reader.read(0)
    loader = torch.utils.data.DataLoader(Rows(reader), num_workers=2, collate_fn=list, batch_size=3)
    for user_idx, sample in enumerate(sample for batch in loader for sample in batch):
        assert_same(sample, make_sample(user_idx))
    assert_same(reader.read(9), make_sample(9))


def test_pickled_reader_reads_the_same_and_carries_no_index(tokens):
    data = pickle.dumps(TokenReader(tokens))
    assert len(data) < 1000
    assert_same(pickle.loads(data).read(7), make_sample(7))


def test_missing_shard_is_named_with_the_sample(tokens):
    (tokens / shard_name(1)).unlink()
    with pytest.raises(ArtifactError, match="000001.tar.*No such file.*000000000006"):
        TokenReader(tokens).read(6)


def test_cut_off_shard_is_named_with_the_sample(tokens):
    path, last = tokens / shard_name(1), pl.read_parquet(tokens / "index.parquet").row(7, named=True)
    with open(path, "r+b") as file:
        file.truncate(last["latents_offset"] + last["latents_bytes"] - 1)
    reader = TokenReader(tokens)
    assert_same(reader.read(6), make_sample(6))
    with pytest.raises(ArtifactError, match="000001.tar.*ends after.*000000000007"):
        reader.read(7)


@pytest.mark.parametrize("shift, message", [(-512, "tar header.*000000000006.items.npy"), (0, "crc32"), (131, "crc32")])
def test_any_changed_byte_of_a_sample_is_named(tokens, shift, message):
    offset = pl.read_parquet(tokens / "index.parquet")["items_offset"][6]
    damage(tokens / shard_name(1), offset + shift, b"\xff")
    reader = TokenReader(tokens)
    with pytest.raises(ArtifactError, match=f"000001.tar.*{message}") as caught:
        reader.read(6)
    assert "000000000006" in str(caught.value)
    assert_same(reader.read(7), make_sample(7))


def test_shard_of_other_users_is_refused(tokens):
    (tokens / shard_name(0)).write_bytes((tokens / shard_name(1)).read_bytes())
    with pytest.raises(ArtifactError, match="000000.tar.*tar header.*000000000003"):
        TokenReader(tokens).read(3)


def test_latents_of_another_shape_than_the_folder_says_are_refused(tokens):
    np.save(tokens / "latent_mean.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(ArtifactError, match="array header.*000000000003.latents.npy.*3, 3, 2"):
        TokenReader(tokens).read(3)


def test_index_that_skips_a_user_is_refused(tokens):
    path = tokens / "index.parquet"
    pl.read_parquet(path).filter(pl.col("user_idx") != 4).write_parquet(path)
    with pytest.raises(ArtifactError, match="index.parquet.*user_idx 5 in row 4"):
        TokenReader(tokens)


def test_unknown_user_is_an_index_error(tokens):
    for user_idx in (-1, NUM_USERS):
        with pytest.raises(IndexError, match=f"{user_idx}.*0..9"):
            TokenReader(tokens).read(user_idx)

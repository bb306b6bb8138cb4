"""token_writer: what a shard holds, and that it is a function of its samples."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import webdataset

from contrec_dist.errors import DataError
from sharding.token_writer import INDEX_COLUMNS, TokenSample, write_shard


def make_sample(user_idx: int, num_items: int, num_item_tokens: int = 2, latent_dim: int = 3) -> TokenSample:
    generator = np.random.default_rng(user_idx)
    items = generator.integers(0, 1000, num_items, dtype=np.int32)
    latents = generator.standard_normal((num_items, num_item_tokens, latent_dim)).astype(np.float16)
    return TokenSample(user_idx, items, latents, max(num_items - 2, 0), num_items - 2, num_items - 1)


def make_pairs(first: int = 4, num_users: int = 3):
    return [(f"user-ü{i}", make_sample(i, i)) for i in range(first, first + num_users)]


def test_webdataset_reads_back_what_was_written(tmp_path):
    path, pairs = tmp_path / "000000.tar", make_pairs()
    write_shard(path, 0, pairs)
    read = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == ["000000000004", "000000000005", "000000000006"]
    for (user_id, sample), got in zip(pairs, read, strict=True):
        places = {"num_train": sample.num_train, "validation_pos": sample.validation_pos, "test_pos": sample.test_pos}
        assert got["json"] == {"user_id": user_id, **places}
        assert got["items.npy"].dtype == np.int32 and got["latents.npy"].dtype == np.float16
        np.testing.assert_array_equal(got["items.npy"], sample.items)
        np.testing.assert_array_equal(got["latents.npy"], sample.latents)


def test_same_samples_give_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    digests = set()
    for name, seconds in (("a.tar", 0.0), ("b.tar", 2e9)):
        monkeypatch.setattr("time.time", lambda: seconds)
        write_shard(tmp_path / name, 0, make_pairs())
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    with tarfile.open(tmp_path / "a.tar") as tar:
        owners = {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in tar}
    assert owners == {(0, 0, 0, "", "")}


def test_bytes_are_those_of_tarfile_and_numpy(tmp_path):
    """The writer fills headers in itself: from no items to more than a tar record, non-ASCII ids."""
    pairs = [(f"user-ü{length}", make_sample(10**11 + length, length, 2, 32)) for length in (0, 1, 7, 200, 5000)]
    write_shard(tmp_path / "ours.tar", 0, pairs)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for user_id, sample in pairs:
            places = {"num_train": sample.num_train, "validation_pos": sample.validation_pos, "test_pos": sample.test_pos}
            members = {"json": json.dumps({"user_id": user_id, **places}).encode()}
            for name in ("items", "latents"):
                buffer = io.BytesIO()
                np.save(buffer, getattr(sample, name))
                members[f"{name}.npy"] = buffer.getvalue()
            for name, data in members.items():
                info = tarfile.TarInfo(f"{sample.user_idx:012d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_index_offsets_point_at_the_npy_bytes(tmp_path):
    path, pairs = tmp_path / "000007.tar", make_pairs()
    index = write_shard(path, 7, pairs)
    assert tuple(index.columns) == INDEX_COLUMNS
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        for row, (_, sample) in zip(index.rows(named=True), pairs, strict=True):
            assert (row["shard"], row["user_idx"], row["num_items"]) == (7, sample.user_idx, len(sample.items))
            for kind in ("items", "latents"):
                member = tar.getmember(f"{sample.user_idx:012d}.{kind}.npy")
                assert (row[f"{kind}_offset"], row[f"{kind}_bytes"]) == (member.offset_data, member.size)
                assert data[row[f"{kind}_offset"] :][:6] == b"\x93NUMPY"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents": np.full((2, 2, 3), np.inf, np.float16)}, "000000000009.*item 31.*finite"),
        ({"latents": np.zeros((3, 2, 3), np.float16)}, "000000000009.*\\(3, 2, 3\\)"),
        ({"items": np.array([31, 5])}, "000000000009.*int64.*int32"),
        ({"user_idx": 3}, "user_idx 3 after 4"),
    ],
)
def test_a_sample_that_could_not_be_read_back_is_refused_by_name(tmp_path, change, message):
    latents = np.zeros((2, 2, 3), np.float16)
    sample = TokenSample(9, np.array([31, 5], np.int32), latents, 0, -1, -1)._replace(**change)
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "000000.tar", 0, [("u", make_sample(4, 3)), ("v", sample)])

"""Bad shards: agreed ones are in no plan, later ones leave padding, and ranks, resumes and limits keep to it."""

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from contrec_dist.data.batches import TrainingRows
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import hash_file
from contrec_dist.training.bad_shards import BadShards, find_bad_shards
from contrec_dist.training.checkpoint_files import TrainingPosition
from sharding.partition import rank_micro_batches
from sharding.shard_files import LocalShards
from sharding.token_reader import TokenReader
from sharding.token_writer import shard_name

DRAW = np.random.default_rng(3)
HISTORIES = [DRAW.integers(0, 30, length).tolist() for length in (9, 6, 40, 5, 7, 25, 4, 8, 13, 6, 17)]  # in 4 shards
NUM_SHARDS, CPU = 4, torch.device("cpu")


@pytest.fixture
def world(make_world):
    world = make_world(HISTORIES, max_history=8)
    world.config.shards.max_bad_shards = 2
    return world


def open_rows(world) -> TrainingRows:
    folder = world.config.folder("tokens")
    paths = [folder / shard_name(shard) for shard in range(NUM_SHARDS)]
    records = {shard: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for shard, path in enumerate(paths) if path.is_file()}
    reader = TokenReader(folder, shards=LocalShards(folder, records))
    return TrainingRows(world.config, reader, world.texts, None)


def damage_user(world, user: int) -> None:
    """Another byte in the middle of the user's latents; the size stays."""
    reader = TokenReader(world.config.folder("tokens"))
    path = world.config.folder("tokens") / shard_name(int(reader.shard[user]))
    data, latents = path.read_bytes(), reader.read(user).latents.tobytes()
    path.write_bytes(data.replace(latents, latents[:10] + bytes([latents[10] ^ 1]) + latents[11:]))


def agree(rows: TrainingRows, position=TrainingPosition(), *, is_resumed=False) -> tuple[BadShards, TrainingPosition]:
    bad = BadShards(rows.config, rows, CPU)
    return bad, bad.agree(position, is_resumed=is_resumed, beat=lambda _: None)


def planned_users(plan) -> set[int]:
    return {int(plan.user[sample]) for row in plan.rows for sample in row}


def describe(plan) -> list:
    return [[row.tolist() for row in plan.rows], plan.num_positions, plan.term.tolist()]


def targets(batches) -> list[int]:
    return torch.cat([batch.target_idx for batch in batches]).tolist()


def whole_epoch(rows):
    plan = rows.plan(0)
    return plan, rows.build(plan, np.arange(len(plan.rows)), len(plan.rows))


def test_samples_of_a_missing_shard_are_in_no_plan_and_all_others_are_once(world, one_rank):
    rows = open_rows(world)
    (world.config.folder("tokens") / shard_name(1)).unlink()
    bad, position = agree(rows)
    assert (position.left_out_shards, position.bad_shards) == ((1,), ())
    for epoch in range(2):
        plan = rows.plan(epoch)
        assert planned_users(plan) == set(range(len(HISTORIES))) - {3, 4, 5}
        assert plan.num_samples == len(rows.sample_user) - bad.count_left_out()
    plan, batch = whole_epoch(rows)
    expected = Counter(item for user, one in enumerate(HISTORIES) if user not in (3, 4, 5) for item in one[1:-2])
    assert Counter(batch.target_idx.tolist()) == expected
    assert plan.num_positions == int((batch.segments > 0).sum())
    assert bad.facts(position) == {
        "left_out_shards": ["shards/000001.tar"], "left_out_samples_an_epoch": int((rows.reader.shard[rows.sample_user] == 1).sum()),
        "bad_shards": [], "skipped_samples": 0,
    }  # fmt: skip


def test_a_cut_off_shard_is_found_before_the_first_step(world, one_rank):
    rows = open_rows(world)
    path = world.config.folder("tokens") / shard_name(2)
    path.write_bytes(path.read_bytes()[:-1])
    assert agree(rows)[1].left_out_shards == (2,)


def test_plans_are_those_of_a_run_that_allows_none_where_all_are_good(world, one_rank):
    rows, strict = open_rows(world), open_rows(world)
    strict.config = replace(world.config, shards=replace(world.config.shards, max_bad_shards=0))
    agree(rows)
    assert describe(rows.plan(1)) == describe(strict.plan(1))


def test_a_plan_is_a_function_of_seed_epoch_and_the_shards_that_are_left_out(world):
    first, second = open_rows(world), open_rows(world)
    whole = describe(first.plan(1))
    first.left_out = second.left_out = frozenset({0, 3})
    assert describe(first.plan(1)) == describe(second.plan(1)) != whole
    assert describe(first.plan(2)) != describe(first.plan(1))


def test_a_plan_with_a_window_of_bad_shards_alone_goes_on_with_the_others(world):
    world.config.train.shuffle_shards = 1
    rows = open_rows(world)
    rows.left_out = frozenset({0, 1, 2})
    assert planned_users(rows.plan(0)) == {9, 10}


def test_ranks_look_at_shares_that_make_the_whole_together(world):
    rows = open_rows(world)
    for shard in (0, 3):
        (world.config.folder("tokens") / shard_name(shard)).unlink()
    shares = [find_bad_shards(rows.reader.shards, range(rank, NUM_SHARDS, 2)) for rank in range(2)]
    assert [sorted(share) for share in shares] == [[0], [3]]
    assert "000003.tar: got no such file" in shares[1][3]


def test_more_bad_shards_than_allowed_are_all_named(world, one_rank):
    rows = open_rows(world)
    for shard in (0, 1, 3):
        (world.config.folder("tokens") / shard_name(shard)).unlink()
    with pytest.raises(ArtifactError) as caught:
        agree(rows)
    for expected in ("3 of 4 shards bad", "000000.tar: got no such file", "000001.tar", "000003.tar", "max_bad_shards=2"):
        assert expected in str(caught.value)


def test_a_run_without_a_good_shard_is_refused_whatever_is_allowed(world, one_rank):
    world.config.shards.max_bad_shards = 9
    rows = open_rows(world)
    for shard in range(NUM_SHARDS):
        (world.config.folder("tokens") / shard_name(shard)).unlink()
    with pytest.raises(ArtifactError, match="4 of 4 shards bad.*a good one"):
        agree(rows)


def test_a_resumed_run_keeps_its_plans_though_a_shard_came_back_and_another_went_bad(world, one_rank):
    rows = open_rows(world)
    path, data = world.config.folder("tokens") / shard_name(0), (world.config.folder("tokens") / shard_name(0)).read_bytes()
    path.unlink()
    _, position = agree(rows)
    before = describe(rows.plan(1))
    path.write_bytes(data)
    again = open_rows(world)
    (world.config.folder("tokens") / shard_name(2)).unlink()
    bad, position = agree(again, position, is_resumed=True)
    assert (position.left_out_shards, position.bad_shards) == ((0,), (2,))
    assert describe(again.plan(1)) == before
    batch = whole_epoch(again)[1]
    position = bad.count_skipped(position, [batch])
    assert position.skipped_samples == len(batch.skipped_shards) > 0 and set(batch.skipped_shards.tolist()) == {2}


def test_a_resumed_run_that_allows_less_than_it_left_out_is_refused(world, one_rank):
    world.config.shards.max_bad_shards = 0
    with pytest.raises(ArtifactError, match="1 of 4 shards bad: shards/000001.tar"):
        agree(open_rows(world), TrainingPosition(step=4, left_out_shards=(1,)), is_resumed=True)


def test_a_corrupt_sample_leaves_padding_and_every_other_sample_stays(world, one_rank, caplog):
    damage_user(world, 4)
    rows = open_rows(world)
    bad, position = agree(rows)
    assert position.left_out_shards == ()  # the size is right: nobody has read it yet
    logging.getLogger("contrec").addHandler(caplog.handler)
    try:
        plan, batch = whole_epoch(rows)
        whole_epoch(rows)
    finally:
        logging.getLogger("contrec").removeHandler(caplog.handler)
    assert planned_users(plan) == set(range(len(HISTORIES)))  # the plan is what it was
    expected = Counter(item for user, one in enumerate(HISTORIES) if user != 4 for item in one[1:-2])
    assert Counter(batch.target_idx.tolist()) == expected
    without = replace(plan, rows=[row[plan.user[row] != 4] for row in plan.rows])
    for name, value in vars(rows.build(without, np.arange(len(plan.rows)), len(plan.rows))).items():
        assert name == "skipped_shards" or torch.equal(value, getattr(batch, name)), name
    num_skipped = int((plan.user == 4).sum())
    assert batch.skipped_shards.tolist() == [1] * num_skipped
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "shards/000001.tar are skipped" in told[0] and "000000000004" in told[0]
    position = bad.count_skipped(position, [batch])
    assert (position.bad_shards, position.skipped_samples) == ((1,), num_skipped)
    assert bad.facts(position)["bad_shards"] == ["shards/000001.tar"]


def test_a_corrupt_sample_is_an_error_that_names_shard_and_sample_where_none_is_allowed(world):
    world.config.shards.max_bad_shards = 0
    damage_user(world, 4)
    rows = open_rows(world)
    with pytest.raises(ArtifactError, match="000001.tar: got other content in sample 000000000004"):
        whole_epoch(rows)


def test_two_ranks_skip_what_one_rank_skips(world):
    damage_user(world, 4)
    damage_user(world, 7)
    rows = open_rows(world)
    plan = rows.plan(0)

    def read(world_size: int) -> list[int]:
        found = {}
        for rank in range(world_size):
            own = open_rows(world)  # every rank has a reader of its own
            for step in range(len(plan.rows)):
                for number, numbers in rank_micro_batches(
                    step, num_rows=len(plan.rows), global_batch_rows=4, micro_batch_rows=2, rank=rank, world_size=world_size
                ):
                    found[step, number] = own.build(plan, numbers, 2)
        return [(targets([batch]), batch.skipped_shards.tolist()) for _, batch in sorted(found.items())]

    assert read(1) == read(2)
    assert any(skipped for _, skipped in read(2))


def test_a_row_whose_samples_are_all_bad_is_padding_alone(world):
    rows = open_rows(world)
    plan = rows.plan(0)
    for user in range(len(HISTORIES)):
        damage_user(world, user)
    batch, empty = rows.build(plan, np.array([0]), 1), rows.build(plan, np.array([], dtype=np.int64), 1)
    assert not batch.segments.any() and len(batch.skipped_shards) == len(plan.rows[0])
    batch.skipped_shards = empty.skipped_shards
    for name, value in vars(batch).items():
        assert torch.equal(value, getattr(empty, name)), name


def test_shards_that_turn_bad_later_end_the_run_beyond_the_limit(world, one_rank):
    world.config.shards.max_bad_shards = 1
    damage_user(world, 4)
    damage_user(world, 7)
    rows = open_rows(world)
    bad, position = agree(rows)
    batch = whole_epoch(rows)[1]
    with pytest.raises(ArtifactError, match="2 of 4 shards bad: shards/000001.tar, shards/000002.tar.*max_bad_shards=1"):
        bad.count_skipped(position, [batch])

"""benchmarks/sampler.py: what its figures are made of."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from contrec_dist.benchmarks.sampler import Chain, describe, ratio_interval, take_users
from contrec_dist.config import ScoreConfig
from contrec_dist.errors import ConfigError
from contrec_dist.retrieval.scored_users import Users


def test_chains_are_named_by_solver_and_steps():
    assert Chain.parse("ddpm:200") == Chain("ddpm", 200) and str(Chain("dpm", 10)) == "dpm:10"


def test_a_chain_may_have_settings_of_its_own():
    name = "ddpm:10:guidance_max_sigma=0.999,step_spacing=2"
    chain = Chain.parse(name)
    assert chain == Chain("ddpm", 10, (("guidance_max_sigma", 0.999), ("step_spacing", 2.0))) and str(chain) == name
    assert Chain.parse("ddpm:10:guidance=1.5").score(ScoreConfig(), plain=False).guidance == 1.5
    for wrong in ("ddpm", "ddpm:ten", "ddpm:10:2", "ddpm:10:step_spacing=two", "ddpm:10:k=5"):
        with pytest.raises(ConfigError, match=f"--chains.*{wrong}"):
            Chain.parse(wrong)


def test_only_the_reference_is_plain_whatever_the_config_says():
    score = ScoreConfig(guidance_min_sigma=0.1, guidance_max_sigma=0.9, step_spacing=1.5)
    assert Chain("ddpm", 200).score(score, plain=True) == ScoreConfig(num_sampling_steps=200)
    assert Chain("dpm", 9).score(score, plain=False) == replace(score, solver="dpm", num_sampling_steps=9)
    assert Chain("ddpm", 10, (("step_spacing", 2.0),)).score(score, plain=False) == replace(score, step_spacing=2.0)


def test_taken_users_keep_their_whole_histories_and_targets():
    users = Users(pl.Series(["a", "b", "c"]), np.arange(3), np.array([5, 6, 7, 8]), np.array([0, 2, 2, 4]), np.array([1, 2, 3]))
    taken = take_users(users, np.array([2, 1]))
    assert taken.user_ids.to_list() == ["c", "b"] and taken.targets.tolist() == [3, 2] and taken.user_idx.tolist() == [2, 1]
    assert taken.items.tolist() == [7, 8] and taken.offsets.tolist() == [0, 2, 2]


def test_the_interval_of_a_ratio_is_paired_by_user():
    """The same users are hit a tenth less often: the ratio is certain although either rate is not."""
    reference = np.random.default_rng(0).random(4000) * (np.random.default_rng(1).random(4000) < 0.05)
    low, high = ratio_interval(0.9 * reference, reference, seed=0)
    assert low == pytest.approx(0.9) == high
    other = np.random.default_rng(2).permutation(reference)
    low, high = ratio_interval(other, reference, seed=0)
    assert low < 0.9 < 1.1 < high and ratio_interval(reference, reference, 0) == (1.0, 1.0)


def test_a_record_says_share_and_the_median_speed_of_the_turns():
    reference, seconds = np.array([1.0, 0.5, 0.0, 0.5]), np.array([2.0, 2.0, 4.0, 50.0])
    reference_seconds = np.array([50.0, 40.0, 100.0, 50.0])
    record = describe(Chain("dpm", 10), reference / 2, seconds, reference, reference_seconds, num_seeds=2, seed=0)
    assert record["hr"] == 0.25 and record["share"] == 0.5 and record["chain"] == "dpm:10"
    assert record["times_faster"] == 22.5 and record["seconds"] == 29.0  # the disturbed turn weighs nothing

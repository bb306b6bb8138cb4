"""The generated catalogue: its law is exact, its users follow it, and it can be learned."""

import numpy as np
import pytest

from contrec_dist.config import Config
from contrec_dist.data.sources.generated import GeneratedCatalogue, oracle_recommendations
from contrec_dist.errors import ConfigError


def make_config(**settings):
    config = Config(name="toy")
    config.source.kind = "generated"
    for name, value in {"num_items": 60, "num_users": 50, "num_categories": 4, **settings}.items():
        setattr(config.source.generated, name, value)
    return config


@pytest.fixture(scope="module")
def full():
    """The default catalogue, its histories and their lengths."""
    config = Config(name="toy")
    config.source.kind = "generated"
    catalogue = GeneratedCatalogue.of(config)
    users, items, seconds = catalogue.draw_histories()
    return config, catalogue, users, items, seconds


def test_law_sums_to_one_and_excludes_seen_items():
    catalogue = GeneratedCatalogue.of(make_config())
    history = catalogue.item_ids[:7]
    law = catalogue.next_item_probabilities(history)
    assert law.sum() == pytest.approx(1.0) and (law >= 0).all()
    assert (law[catalogue.numbers(history)] == 0).all()


def test_draws_follow_the_law():
    catalogue = GeneratedCatalogue.of(make_config())
    num_draws = 40_000
    history = catalogue.numbers(catalogue.item_ids[3:8])
    drawn = np.full((num_draws, 6), -1, dtype=np.int64)
    drawn[:, :5] = history
    catalogue._draw_step(np.random.default_rng(0), drawn, np.arange(num_draws), 5)
    law = catalogue.next_item_probabilities([catalogue.item_ids[i] for i in history])
    share = np.bincount(drawn[:, 5], minlength=60) / num_draws
    deviation = np.abs(share - law) / np.sqrt(np.maximum(law * (1 - law), 1e-12) / num_draws)
    assert deviation[law > 0].max() < 4.5  # standard errors, over 55 items
    assert (share[law == 0] == 0).all()


def test_no_user_repeats_an_item_and_times_increase(full):
    config, _, users, items, seconds = full
    assert len(set(zip(users.tolist(), items.tolist()))) == len(items)
    same = users[1:] == users[:-1]
    assert (np.diff(seconds)[same] > 0).all()
    lengths = np.bincount(users)
    assert len(lengths) == 4000 and lengths.min() == config.source.generated.min_history
    assert lengths.mean() == pytest.approx(config.source.generated.mean_history, rel=0.05)


def test_most_items_appear_under_a_heavy_tail(full):
    _, catalogue, _, items, _ = full
    counts = np.sort(np.bincount(items, minlength=catalogue.num_items))[::-1]
    assert (counts > 0).mean() > 0.95
    assert counts[: len(counts) // 10].sum() > 0.3 * counts.sum()


def test_titles_are_unique_and_tell_the_category(full):
    _, catalogue, *_ = full
    frame = catalogue.item_frame()
    assert frame["title"].n_unique() == 2000 and frame["category"].n_unique() == 20
    words = {}
    for title, category in frame.select("title", "category").iter_rows():
        words.setdefault(" ".join(title.split()[1:-1]), set()).add(category)
    assert all(len(categories) == 1 for categories in words.values())


def test_oracle_is_far_above_popularity_and_first_order_counts_lie_between(full):
    config, catalogue, users, items, _ = full
    last = np.flatnonzero(np.diff(users, append=-1))[:1000]
    starts = np.searchsorted(users, users[last])
    ids = np.array(catalogue.item_ids)
    histories = [items[start:end] for start, end in zip(starts, last)]
    targets = items[last]
    oracle = oracle_recommendations(config, [ids[h].tolist() for h in histories], 10)
    train = np.delete(np.arange(len(items)), np.flatnonzero(np.diff(users, append=-1)))
    popularity = np.bincount(items[train], minlength=2000).astype(float)
    counts = np.zeros((2000, 2000))
    steps = train[:-1][(users[train][1:] == users[train][:-1])]
    np.add.at(counts, (items[steps], items[steps + 1]), 1)

    def hit_rate(score):
        hits = 0
        for history, target in zip(histories, targets):
            values = score(history).copy()
            values[history] = -1
            hits += target in np.argsort(-values, kind="stable")[:10]
        return hits / len(targets)

    best = np.mean([ids[target] in row for row, target in zip(oracle, targets)])
    learned = hit_rate(lambda history: counts[history[-1]] + 1e-6 * popularity)
    assert 0.3 < best < 0.6
    assert hit_rate(lambda history: popularity) < 0.06
    assert 0.2 < learned < best


def test_oracle_is_sorted_unseen_and_restricted():
    config = make_config()
    catalogue = GeneratedCatalogue.of(config)
    history, among = catalogue.item_ids[:5], catalogue.item_ids[:30]
    (row,) = oracle_recommendations(config, [history], 10, among=among)
    law = catalogue.next_item_probabilities(history)[catalogue.numbers(row)]
    assert len(row) == 10 and (np.diff(law) <= 0).all()
    assert not set(row) & set(history) and set(row) <= set(among)


def test_catalogue_is_a_function_of_settings_and_seed():
    settings = make_config().source.generated
    first, second, other = (GeneratedCatalogue(settings, seed) for seed in (0, 0, 1))
    assert first.titles == second.titles and (first.successors == second.successors).all()
    assert all((a == b).all() for a, b in zip(first.draw_histories(), second.draw_histories()))
    assert first.titles != other.titles


def test_too_few_items_for_the_categories_are_refused():
    with pytest.raises(ConfigError, match="source.generated.num_items.*at least 24"):
        GeneratedCatalogue.of(make_config(num_items=20))

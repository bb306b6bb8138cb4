"""baselines/tiger/semantic_ids.py."""

import itertools

import numpy as np
import pytest
import torch

from contrec_dist.baselines.tiger.semantic_ids import CodeTrie, SemanticIds
from contrec_dist.errors import DataError

LEARNED = np.array([[1, 0], [2, 2], [1, 0], [0, 1], [1, 0], [2, 2], [1, 2]])


def test_the_last_level_makes_ids_unique_in_the_order_of_items():
    ids = SemanticIds.from_learned(LEARNED, 3)
    assert ids.codes[:, 2].tolist() == [0, 0, 1, 0, 2, 1, 0] and ids.sizes == (3, 3, 3)
    assert len({tuple(row) for row in ids.codes}) == 7
    assert ids.describe()["collision_rate"] == pytest.approx(3 / 7, abs=1e-6)
    many = np.random.default_rng(0).integers(0, 4, (500, 2))
    assert len(np.unique(SemanticIds.from_learned(many, 4).codes, axis=0)) == 500


def test_levels_have_vocabulary_entries_of_their_own():
    ids = SemanticIds.from_learned(LEARNED, 3)
    ranges = [set(range(start, start + size)) for start, size in zip(ids.offsets, ids.sizes)]
    assert set.union({0}, *ranges) == set(range(ids.num_tokens)) and sum(map(len, ranges)) == ids.num_tokens - 1
    assert all(set(column) <= span for column, span in zip(ids.tokens.T, ranges))


def test_trie_holds_exactly_the_ids():
    ids = SemanticIds.from_learned(np.random.default_rng(1).integers(0, 4, (60, 2)), 4)
    trie, known = CodeTrie(ids), {tuple(row): item for item, row in enumerate(ids.codes)}
    prefixes = {(): 0}
    for level in range(3):
        longer = {}
        for prefix, number in prefixes.items():
            children, real = trie.children(level, torch.tensor([number]))
            found = {(*prefix, int(trie.code[level][child])): int(child) for child in children[real]}
            assert set(found) == {key[: level + 1] for key in known if key[:level] == prefix}
            longer |= found
        prefixes = longer
    assert {key: int(trie.item[number]) for key, number in prefixes.items()} == known


def test_children_of_many_prefixes_at_once_equal_those_one_by_one():
    ids = SemanticIds.from_codes(np.array(list(itertools.product(range(2), range(3), range(2)))), 3)
    trie = CodeTrie(ids)
    at_once, real = trie.children(2, torch.arange(6).view(2, 3))
    assert real.all() and at_once.view(6, 2).tolist() == [[2 * p, 2 * p + 1] for p in range(6)]


@pytest.mark.parametrize("codes, message", [([[0, 1], [0, 1]], "share one"), ([[5, 0]], "out of range"), ([[-1, 0]], "out of range")])
def test_wrong_ids_are_named(codes, message):
    with pytest.raises(DataError, match=message):
        SemanticIds.from_codes(np.array(codes), 3)

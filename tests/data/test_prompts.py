"""data/prompts.py: token numbers and positions of what the LLM reads."""

import numpy as np
import pytest

from contrec_dist.config import PromptConfig
from contrec_dist.data.prompts import LEANING_ITEMS, PromptTexts, Ragged, lay_out, leaf_category
from contrec_dist.errors import ConfigError

NOTHING = np.zeros(0, dtype=np.int64)


def make_texts(items, tokenizer, **prompt) -> PromptTexts:
    return PromptTexts(items, tokenizer, PromptConfig(**prompt))


def recent(*rows) -> np.ndarray:
    """Newest items, oldest first, filled up with -1 on the left."""
    return np.array([[-1] * (LEANING_ITEMS - len(row)) + list(row) for row in rows])


@pytest.mark.parametrize(
    ("category", "leaf"),
    [
        ("Beauty > Makeup > Nails | Beauty > Gifts", "Nails"),
        ("Nails", "Nails"),
        ("Shoes, Bags", "Shoes"),
        ("", ""),
        (" A >  B ", "B"),
    ],
)
def test_leaf_category_is_the_last_level_of_the_first_path(category, leaf):
    assert leaf_category(category) == leaf


def test_ragged_rows_and_lengths_are_those_of_the_lists():
    lists = [[1, 2, 3], [], [4]]
    ragged = Ragged.from_lists(lists)
    assert [ragged.row(n).tolist() for n in range(3)] == lists
    assert ragged.lengths(np.array([2, 0, 0, 1])).tolist() == [1, 3, 3, 0]


@pytest.mark.parametrize("limit", [1, 2, 7, 24, 100])
def test_response_lengths_are_those_of_the_response_tokens(world_items, world_tokenizer, limit):
    texts = make_texts(world_items, world_tokenizer, max_response_tokens=limit)
    pairs = [(t, b) for t in range(-1, len(texts.term_names)) for b in range(-1, len(texts.brand_names))]
    term, brand = np.array(pairs).T
    expected = [len(texts.response_tokens(t, b)) if t >= 0 else 0 for t, b in pairs]
    assert texts.response_lengths(term, brand).tolist() == expected
    assert max(expected) <= limit


def test_a_response_names_term_and_brand_and_ends_with_the_end_token_even_when_cut(world_items, world_tokenizer):
    texts = make_texts(world_items, world_tokenizer, max_response_tokens=100)
    term, brand = list(texts.term_names).index("Lamps"), list(texts.brand_names).index("Brand2")
    tokens = texts.response_tokens(term, brand)
    assert world_tokenizer.decode(tokens[:-1]) == " The user leans to Lamps, brand Brand2."
    assert world_tokenizer.decode(texts.response_tokens(term, -1)[:-1]) == " The user leans to Lamps."
    short = make_texts(world_items, world_tokenizer, max_response_tokens=4).response_tokens(term, brand)
    assert tokens[-1] == short[-1] == world_tokenizer.eos_token_id
    assert short[:-1].tolist() == tokens[:3].tolist()


def test_a_response_without_room_for_the_end_token_is_a_named_error(world_items, world_tokenizer):
    with pytest.raises(ConfigError, match="prompt.max_response_tokens.*0"):
        make_texts(world_items, world_tokenizer, max_response_tokens=0)


def test_different_histories_lean_to_different_responses(world_items, world_tokenizer):
    texts = make_texts(world_items, world_tokenizer)
    term, brand = texts.leaning(recent([0, 3, 9], [1, 7, 10], [2, 5, 8]))
    assert texts.term_names[term].tolist() == ["Nails", "Lamps", "Garden tools"]
    assert len({tuple(texts.response_tokens(*pair)) for pair in zip(term, brand)}) == 3


def test_leaning_is_the_majority_of_the_newest_items_and_ties_go_to_the_newer(world_items, world_tokenizer):
    texts = make_texts(world_items, world_tokenizer)
    term, _ = texts.leaning(recent([0, 0, 1], [0, 1, 1, 0], [1, 0, 2], [5]))
    assert texts.term_names[term].tolist() == ["Nails", "Nails", "Garden tools", "Garden tools"]


def test_an_item_without_a_category_stands_for_itself(world_items, world_tokenizer):
    texts = make_texts(world_items, world_tokenizer)
    term, _ = texts.leaning(recent([6, 6, 0]))
    assert world_items["category"][6] == "" and texts.term_names[term[0]] == world_items["title"][6]


def test_a_brand_is_named_only_when_it_appears_twice_and_has_a_name(world_items, world_tokenizer):
    texts = make_texts(world_items, world_tokenizer)
    _, brand = texts.leaning(recent([0, 8, 1], [0, 1, 2], [4, 9, 14], []))
    assert [texts.brand_names[b] if b >= 0 else None for b in brand] == ["Brand0", None, None, None]


def test_an_empty_history_leans_to_nothing(world_items, world_tokenizer):
    texts = make_texts(world_items, world_tokenizer)
    term, brand = texts.leaning(recent([]))
    assert (term[0], brand[0]) == (-1, -1) and texts.response_lengths(term, brand)[0] == 0


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("users", [0, 3])
@pytest.mark.parametrize("titled", [-1, 0, 2])
@pytest.mark.parametrize("num_tokens", [1, 2, 4])
@pytest.mark.parametrize("item_layout", ["marked", "fused"])
def test_a_sample_is_laid_out_part_by_part(world_items, world_tokenizer, item_layout, num_tokens, titled, users, final):
    """Every position belongs to exactly one part, in the order of the module's formula."""
    texts = make_texts(world_items, world_tokenizer, titled_items=titled, max_title_tokens=3, item_layout=item_layout)
    inputs, response = np.array([4, 7, 1, 9]), np.array([11, 12])
    layout = lay_out(
        texts, inputs, num_item_tokens=num_tokens, num_user_tokens=users, response=response, with_final_marker=final
    )
    kinds, expected = ["text"] * layout.length, ["text"] * len(texts.instruction) + ["user"] * users
    for name, places in (("user", layout.user_slots), ("item", layout.markers), ("slot", layout.slots.ravel())):
        for place in places:
            assert kinds[place] == "text" and layout.tokens[place] == 0
            kinds[place] = name
    text = list(texts.instruction)
    for number, item in enumerate(inputs):
        title = texts.titles.row(item).tolist() if titled < 0 or number >= 4 - titled else []
        expected += ["slot"] if item_layout == "fused" else ["item"] + ["slot"] * num_tokens
        expected += ["text"] * len(title)
        text += title
    assert layout.response_start == len(expected)
    expected += ["text"] * 2 + ["item"] * final
    assert kinds == expected
    assert [t for t, kind in zip(layout.tokens, kinds) if kind == "text"] == text + [11, 12]


def test_titles_are_cut_and_only_computed_where_they_are_used(world_items, world_tokenizer):
    texts = make_texts(world_items, world_tokenizer, titled_items=1, max_title_tokens=3)
    whole = world_tokenizer(" " + world_items["title"][5])["input_ids"]
    assert texts.titles.row(5).tolist() == whole[:3] and len(whole) > 3
    assert len(make_texts(world_items, world_tokenizer, titled_items=0).titles.flat) == 0


def test_fused_items_are_generated_where_what_came_before_them_ends(world_items, world_tokenizer):
    texts = make_texts(world_items, world_tokenizer, titled_items=1, max_title_tokens=3, item_layout="fused")
    settings = {"num_item_tokens": 2, "num_user_tokens": 0, "with_final_marker": True}
    head, inputs = len(texts.instruction), np.array([4, 7, 5])
    plain = lay_out(texts, inputs, response=NOTHING, **settings)
    assert plain.conditions.tolist() == [head - 1, head, head + 1, head + 5] and plain.length == head + 6
    assert plain.markers.tolist() == []
    answered = lay_out(texts, inputs, response=np.array([11, 12]), **settings)
    assert answered.conditions.tolist() == [head - 1, head, head + 1, head + 8] and answered.markers.tolist() == [head + 8]


def test_fused_items_need_an_instruction():
    with pytest.raises(ConfigError, match="prompt.instruction.*fused"):
        PromptConfig(item_layout="fused", instruction="")


def test_the_layout_of_an_empty_history_is_the_instruction_and_the_marker(world_items, world_tokenizer):
    texts = make_texts(world_items, world_tokenizer, titled_items=2)
    layout = lay_out(texts, NOTHING, num_item_tokens=2, num_user_tokens=0, response=NOTHING, with_final_marker=True)
    assert layout.length == len(texts.instruction) + 1 and layout.markers.tolist() == [layout.length - 1]



"""ablation/rows.py: the shipped rows change what they say on top of the Beauty config, and rows that cannot work are refused."""

import dataclasses
from pathlib import Path

import pytest

from contrec_dist.ablation.rows import load_rows, pick_rows
from contrec_dist.config import load_config
from contrec_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BEAUTY, SHIPPED = str(ROOT / "configs/beauty.yaml"), ROOT / "configs/ablation"
NAMES = [
    "base", "bayes_guidance_0", "bayes_guidance_1", "bayes_guidance_4", "bayes_samples_32", "dispersive_wrong_sign", "frozen_latents",
    "guidance_0", "guidance_1", "guidance_2", "guidance_4", "last_position_only", "lightgcn", "likelihood", "no_collaborative_drop", "no_diffusion",
    "no_dispersive", "no_llm", "no_mask", "no_negatives", "no_reasoning", "no_text", "paper", "regression", "rq", "samples_1", "samples_32", "sequential_embedding", "sigma_0", "sigma_02",
    "sigma_05", "steps_1", "steps_2", "steps_5", "steps_10", "steps_50", "steps_200", "tokens_1", "tokens_4", "tokens_alone",
    "tokens_alone_rq", "vq",
]  # fmt: skip
OWN_SETTINGS = {"run_dir"}


def flatten(config) -> dict[str, object]:
    flat = {}
    for name, value in dataclasses.asdict(config).items():
        pairs = value.items() if isinstance(value, dict) else [("", value)]
        for key, inner in pairs:
            flat |= {f"{name}.{key}.{last}": one for last, one in inner.items()} if isinstance(inner, dict) else {f"{name}.{key}".rstrip("."): inner}
    return flat


def write_rows(folder: Path, **rows: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in {"base": "# nothing\n{}\n", **rows}.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def shipped():
    return {row.name: row for row in load_rows(SHIPPED, [BEAUTY], [])}


def test_the_shipped_rows_are_these_with_the_base_first_and_numbers_in_order(shipped):
    assert list(shipped) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_row_changes_what_it_says_and_nothing_else(shipped, name):
    row, base = shipped[name], flatten(load_config([BEAUTY]))
    own = flatten(row.config)
    assert {key: own[key] for key in row.change} == row.change
    changed = {key for key in own if own[key] != base[key]} - OWN_SETTINGS
    assert changed == {key for key, value in row.change.items() if base[key] != value}
    assert bool(changed) == (name != "base"), changed
    assert len(row.about) > 40 and row.config.run_dir == f"runs/beauty/ablation/{name}"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("guidance", "steps"))])
def test_rows_of_the_sampler_only_score_again(shipped, name):
    row = shipped[name]
    assert {key.partition(".")[0] for key in row.change} == {"score"} and row.config.score.rank_by == "samples"


@pytest.mark.parametrize("name", ["tokens_1", "tokens_4", "vq", "rq"])
def test_rows_of_other_tokens_have_as_many_numbers_an_item_as_the_base(shipped, name):
    sizes = [row.config.tokenizer.num_item_tokens * row.config.tokenizer.latent_dim for row in (shipped["base"], shipped[name])]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_sample_of_a_shipped_row_fits_and_a_step_has_as_many_positions(shipped, name):
    prompt, train = shipped[name].config.prompt, shipped[name].config.train
    titled = prompt.max_history if prompt.titled_items < 0 else prompt.titled_items
    length = prompt.max_history * (1 + shipped[name].config.tokenizer.num_item_tokens) + titled * prompt.max_title_tokens
    length += len(prompt.instruction) + prompt.max_response_tokens + 1  # a token is a character at least
    assert length <= train.row_tokens
    assert train.row_tokens * train.global_batch_rows == 8192
    assert train.global_batch_rows % (train.micro_batch_rows * shipped[name].config.launch.num_ranks) == 0


def test_a_rows_change_stands_against_the_arguments_and_they_against_the_base(tmp_path):
    folder = write_rows(tmp_path / "rows", changed="# more epochs\ntrain:\n  num_epochs: 7\n")
    base, changed = load_rows(folder, [BEAUTY], ["train.num_epochs=3", "train.clip_norm=2.5", "run_dir=somewhere"])
    assert (base.config.train.num_epochs, changed.config.train.num_epochs) == (3, 7)
    assert base.config.train.clip_norm == changed.config.train.clip_norm == 2.5
    assert changed.config.run_dir == "somewhere/ablation/changed" and changed.about == "more epochs"
    assert base.config.name == changed.config.name == "beauty"


def test_rows_have_neither_the_bases_baselines_nor_a_copy_of_its_shards(tmp_path):
    """Both belong to the base's run: the copy holds other latents than a row with another tokenizer has."""
    overrides = ["evaluate.baselines=[popularity,tiger]", "shards.url=/elsewhere/tokens"]
    row = load_rows(write_rows(tmp_path / "rows"), [BEAUTY], overrides)[0]
    assert row.config.evaluate.baselines == ["popularity"] and row.config.shards.url == ""


def test_rows_are_picked_by_name_in_their_own_order(shipped):
    rows = list(shipped.values())
    assert [row.name for row in pick_rows(rows, " no_mask,base ")] == ["base", "no_mask"]
    assert pick_rows(rows, "") == rows
    with pytest.raises(ConfigError, match="--rows.*got no_masks.*no_mask"):
        pick_rows(rows, "base,no_masks")


def test_a_folder_without_a_base_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="base.yaml"):
        load_rows(tmp_path, [BEAUTY], [])


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("score.output=/one/place", "score.output"), ("score.users_file=u.csv", "score.users_file"),
        ("score.splits=[test]", "validation"), ("score.splits=[validation]", "'test'"), ("score.k=5", "at least 10"),
    ],
)  # fmt: skip
def test_settings_that_rows_cannot_share_are_refused(tmp_path, argument, named):
    with pytest.raises(ConfigError, match=named):
        load_rows(write_rows(tmp_path / "rows"), [BEAUTY], [argument])


def test_a_wrong_key_of_a_row_is_named_before_anything_runs(tmp_path):
    folder = write_rows(tmp_path / "rows", wrong="# x\ntokenizer:\n  maks_ratio: 0.0\n")
    with pytest.raises(ConfigError, match="tokenizer.maks_ratio"):
        load_rows(folder, [BEAUTY], [])

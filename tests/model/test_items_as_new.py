"""head.residual_drop: in training a share of the items is described as if nobody had met them."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from contrec_dist.data.latents import NEW_ITEM_LATENTS, encodes_new_items, load_new_item_latents
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import write_json
from contrec_dist.training.rank import TrainingData

HISTORIES = [[1, 4, 7, 10, 13, 2, 5], [3, 6, 9, 12]]


@pytest.fixture(params=["trained", "frozen"])
def trained(make_world, request):
    """A world, and its model in training whose new items' latents are far from the others."""
    world = make_world(HISTORIES)
    world.config.head.latents, world.config.head.item_residual = request.param, request.param == "frozen"
    world.config.head.residual_drop, world.config.loss.num_negatives = 0.4, 0
    return world, world.build_model(new_item_latents=torch.from_numpy(world.item_latents[::-1].copy())).train()


def tables(world, model):
    """Vectors by the items' own latents, turned and with residuals; and those of new items, with neither."""
    with torch.no_grad():
        own = model.eval().item_vectors()[:, :-1]
        new = model.items.project(model.normalise(torch.from_numpy(world.item_latents[::-1].copy())).flatten(1))
    model.train()
    return own, new


def pack(world):
    plan = world.rows.plan(0)
    return world.rows.build(plan, np.arange(len(plan.rows)), len(plan.rows))


def test_a_share_has_the_vectors_of_new_items_whole_and_all_others_their_own(trained):
    world, model = trained
    batch = pack(world)
    own, new = tables(world, model)
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        vectors = model._training_table(batch, torch.Generator()).vectors.detach()
        as_new = (vectors - new).abs().amax(1) < 1e-5
        assert ((vectors - own).abs().amax(1) < 1e-5).eq(~as_new).all()
        shares.append(as_new.float().mean().item())
    assert 0.35 < np.mean(shares) < 0.45 and len(set(shares)) > 3


def test_sampled_rows_are_described_alike(trained):
    world, model = trained
    model.loss_config.num_negatives = 12
    batch = pack(world)
    own, new = tables(world, model)
    torch.manual_seed(0)
    table = model._training_table(batch, torch.Generator().manual_seed(0))
    for rows, item_idx in ((table.input_rows, batch.item_idx), (table.target_rows, batch.target_idx), (table.negative_rows, table.negative_idx)):
        vectors = table.vectors[rows].detach()
        near_own, near_new = ((vectors - one[item_idx]).abs().amax(1) < 1e-5 for one in (own, new))
        assert (near_own ^ near_new).all()
    met = table.vectors[table.input_rows].detach()
    assert ((met - new[batch.item_idx]).abs().amax(1) < 1e-5).any()


def test_what_is_read_and_what_ranks_has_no_share_of_it(trained):
    world, model = trained
    batch = pack(world)
    first, second = (model.eval().item_vectors() for _ in range(2))
    assert torch.equal(first, second)
    table = model._training_table(batch, torch.Generator())
    torch.testing.assert_close(table.vectors, first[:, :-1])


def test_without_latents_of_new_items_the_tokenizers_own_describe_them(make_world):
    world = make_world(HISTORIES)
    world.config.head.residual_drop = 1.0
    model = world.build_model().train()
    vectors = model._training_table(pack(world), torch.Generator()).vectors
    torch.testing.assert_close(vectors, model.items.project(model.normalise(torch.from_numpy(world.item_latents)).flatten(1)))


def test_the_trained_model_gets_those_that_precompute_wrote(toy_tokens, world_tokenizer, tmp_path):
    config = replace(toy_tokens, run_dir=str(tmp_path), head=replace(toy_tokens.head, residual_drop=0.3))
    for folder in ("catalog", "embeddings", "tokens"):
        shutil.copytree(toy_tokens.folder(folder), config.folder(folder))
    new = np.load(config.folder("tokens") / "item_latents.npy") + 1
    np.save(config.folder("tokens") / NEW_ITEM_LATENTS, new)
    torch.manual_seed(0)
    data = TrainingData.open(config, world_tokenizer)
    model = data.build_model(config).train()
    model.head_config.residual_drop = 1.0
    vectors, _ = model._describe(torch.arange(5))
    torch.testing.assert_close(vectors, model.items.project(model.normalise(torch.from_numpy(new[:5])).flatten(1)))


def test_latents_of_new_items_are_asked_for_where_items_have_both_parts(make_world):
    world = make_world(HISTORIES)
    config, layout = world.config, {"collaborative": [0, 4], "text": [4, 12]}
    config.head.residual_drop = 0.3
    assert not encodes_new_items(config)
    config.folder("embeddings").mkdir()
    write_json(config.folder("embeddings") / "layout.json", layout)
    assert encodes_new_items(config)
    with pytest.raises(ArtifactError, match=f"{NEW_ITEM_LATENTS}.*head.residual_drop"):
        load_new_item_latents(config)
    np.save(config.folder("tokens") / NEW_ITEM_LATENTS, world.item_latents + 1)
    np.testing.assert_array_equal(load_new_item_latents(config), world.item_latents + 1)
    config.head.residual_drop = 0.0
    assert load_new_item_latents(config) is None
    config.head.residual_drop = 0.3
    for part in layout:
        write_json(config.folder("embeddings") / "layout.json", layout | {part: [0, 0]})
        assert not encodes_new_items(config)

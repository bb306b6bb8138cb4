"""model/contrec.py: what the condition of an item depends on, packing, and what the losses reach."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from contrec_dist.model.backbone import causal_lm

HISTORIES = [
    [1, 4, 7, 10, 13, 2, 5],
    [3, 6, 9, 12],
    [20, 21, 22, 23, 24, 25, 26, 27, 28, 29],
    [11, 8, 14, 17, 15],
]
EVERYTHING = {"titled_items": -1, "response_drop": 0.0}


def pack(world, samples=None):
    """(plan, batch of all rows); `samples`: only these, a row."""
    rows = world.rows
    plan = rows.plan(0)
    if samples is not None:
        plan = replace(plan, rows=[np.array(samples)])
    return plan, rows.build(plan, np.arange(len(plan.rows)), len(plan.rows))


def read_conditions(model, batch):
    """Hidden states at the targets of a batch. -> (P, D)"""
    with torch.no_grad():
        latents = model.normalise(batch.latents)
        vectors, _ = model.items(latents.flatten(1), batch.item_idx)
        return model._encode_rows(batch, latents, vectors)[batch.targets]


def copy_batch(batch, **changes):
    return replace(batch, **{name: getattr(batch, name).clone() for name in ("latents", "tokens", "item_idx")} | changes)


def test_the_condition_of_an_item_does_not_see_that_item_or_anything_after_it(make_world):
    """Change token, latents, number and title of item j: conditions of the items up to j stay, all later ones move."""
    world = make_world(HISTORIES, **EVERYTHING)
    model = world.build_model()
    plan, batch = pack(world, samples=[2])
    before = read_conditions(model, batch)  # target p is item p + 1
    for item in range(1, len(batch.item_idx)):
        changed = copy_batch(batch)
        changed.latents[item] += 3.0
        changed.item_idx[item] = 0
        title = slice(int(batch.slots[item, -1]) + 1, int(batch.markers[item + 1]))
        changed.tokens[0, title] = 7
        moved = (read_conditions(model, changed) - before).abs().amax(dim=1)
        assert (moved[:item] == 0).all(), f"item {item} leaks into the condition of an earlier one or its own"
        assert (moved[item:] > 1e-4).all(), f"item {item} is not seen by the conditions after it"


def test_each_part_of_an_item_is_seen_by_the_conditions_after_it_and_no_other(make_world):
    world = make_world(HISTORIES, **EVERYTHING)
    model = world.build_model()
    _, batch = pack(world, samples=[2])
    before, item = read_conditions(model, batch), 4
    latents, number, title = copy_batch(batch), copy_batch(batch), copy_batch(batch)
    latents.latents[item] += 3.0
    number.item_idx[item] = 0
    title.tokens[0, int(batch.slots[item, -1]) + 1] = 7
    for changed in (latents, number, title):
        moved = (read_conditions(model, changed) - before).abs().amax(dim=1)
        assert (moved[:item] == 0).all() and (moved[item:] > 1e-6).all()


def test_the_condition_of_the_last_target_sees_the_response_and_that_of_the_others_does_not(make_world):
    world = make_world(HISTORIES, **EVERYTHING)
    model = world.build_model()
    _, batch = pack(world, samples=[0])
    before, changed = read_conditions(model, batch), copy_batch(batch)
    changed.tokens.view(-1)[batch.text_positions + 1] = 9
    moved = (read_conditions(model, changed) - before).abs().amax(dim=1)
    assert (moved[:-1] == 0).all() and moved[-1] > 1e-4


def test_the_target_latents_are_no_input_of_the_condition(make_world):
    """The diffusion loss of a model whose targets are other latents differs; its hidden states and queries do not."""
    world = make_world(HISTORIES)
    model = world.build_model()
    _, batch = pack(world)
    other = replace(batch, target_latents=batch.target_latents + 1.0, target_idx=batch.target_idx.flip(0))
    assert torch.equal(read_conditions(model, batch), read_conditions(model, other))
    with torch.no_grad():
        assert model(batch, 0)["diffusion"] != model(other, 0)["diffusion"]


def test_gradient_of_the_diffusion_loss_reaches_the_llm(make_world):
    world = make_world(HISTORIES)
    model = world.build_model()
    _, batch = pack(world)
    model(batch, 0)["diffusion"].backward()
    layers = causal_lm(model.backbone).model.layers
    for name, parameter in layers.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model.inputs.project.weight.grad.abs().sum() > 0
    assert model.items.residual.weight.grad.abs().sum() > 0  # through the inputs


@pytest.mark.parametrize("term", ["lm", "negative", "diffusion", "dispersive"])
def test_every_loss_reaches_the_llm_and_the_biases_only_meet_the_negative_one(make_world, term):
    world = make_world(HISTORIES, response_drop=0.0)
    model = world.build_model()
    _, batch = pack(world)
    model(batch, 0)[term].backward()
    grad = causal_lm(model.backbone).model.layers[0].mlp.up_proj.weight.grad
    assert grad.abs().sum() > 0
    bias = model.items.bias.weight.grad
    assert (bias is not None and bias.abs().sum() > 0) == (term == "negative")


def test_the_diffusion_runs_on_tokenizer_latents_normalised_to_zero_mean_and_unit_variance(make_world):
    world = make_world(HISTORIES)
    model = world.build_model()
    _, batch = pack(world)
    seen = []
    model.head.losses = lambda condition, latents, *rest: seen.append(latents) or {}
    model(batch, 0)
    raw = torch.from_numpy(world.item_latents)
    expected = ((raw - raw.mean(0)) / raw.std(0, correction=0)).flatten(1)
    assert expected.mean(0).abs().max() < 1e-5 and (expected.std(0, correction=0) - 1).abs().max() < 1e-5
    got = {tuple(row) for row in seen[0].numpy().round(3).tolist()}
    assert got == {tuple(row) for row in expected[batch.target_idx].numpy().round(3).tolist()}


def test_latents_of_users_are_normalised_like_those_of_items(make_world):
    world = make_world(HISTORIES, user_tokens=True)
    model = world.build_model()
    _, batch = pack(world)
    seen = []
    model.inputs.project_user.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    read_conditions(model, batch)
    torch.testing.assert_close(seen[0], model.normalise(batch.user_latents))


@pytest.mark.parametrize("user_tokens", [False, True])
@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_users_packed_in_one_row_get_the_hidden_states_they_get_alone(make_world, attention, user_tokens):
    world = make_world(HISTORIES, user_tokens=user_tokens, titled_items=1, response_drop=0.3)
    world.config.backbone.attention = attention
    world.config.train.row_tokens = 256
    model = world.build_model()
    _, together = pack(world, samples=[3, 0, 2, 1])
    alone = [read_conditions(model, pack(world, samples=[one])[1]) for one in (3, 0, 2, 1)]
    assert int(together.segments.max()) == 4
    torch.testing.assert_close(read_conditions(model, together), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_losses_of_packed_users_are_the_sums_of_their_losses_alone(make_world):
    world = make_world(HISTORIES, response_drop=0.0)
    world.config.train.row_tokens = 256
    model = world.build_model()
    with torch.no_grad():
        together = model(pack(world, samples=[0, 1, 2, 3])[1], 0)
        alone = [model(pack(world, samples=[one])[1], 0) for one in range(4)]
    for name in ("lm", "negative", "num_targets", "num_texts"):
        torch.testing.assert_close(together[name], sum(one[name] for one in alone), atol=1e-4, rtol=1e-5)


def test_padding_and_empty_rows_change_nothing(make_world):
    world = make_world(HISTORIES, response_drop=0.0)
    model, rows = world.build_model(), world.rows
    plan = replace(rows.plan(0), rows=[np.array([0, 1])])
    with torch.no_grad():
        short, long = model(rows.build(plan, np.arange(1), 1), 0), model(rows.build(plan, np.arange(1), 3), 0)
        nothing = model(rows.build(plan, np.arange(0), 2), 0)
    for name, value in short.items():
        torch.testing.assert_close(long[name], value, atol=1e-5, rtol=1e-5)
    assert all(float(value) == 0 for value in nothing.values())


def test_a_micro_batch_without_targets_gives_every_parameter_a_gradient_of_zero(make_world):
    """Ranks must run the same collectives, so an empty micro-batch still passes through the whole graph."""
    world = make_world(HISTORIES, user_tokens=False, response_drop=0.0)
    model, rows = world.build_model().train(), world.rows
    terms = model(rows.build(rows.plan(0), np.arange(0), 2), 0)
    sum(terms[name] for name in ("lm", "negative", "diffusion", "dispersive")).backward()
    assert all(p.grad is None or not p.grad.abs().any() for p in model.parameters())


def test_losses_are_a_function_of_the_seed_whatever_ran_before(make_world):
    world = make_world(HISTORIES)
    model = world.build_model().train()
    _, batch = pack(world)
    first = model(batch, 5)
    torch.rand(17)
    again, other = model(batch, 5), model(batch, 6)
    for name in ("negative", "diffusion", "dispersive"):
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_latent_noise_is_drawn_anew_for_every_item_and_only_in_training(make_world):
    model = make_world(HISTORIES).build_model()
    latents, generator = torch.zeros(20000, 2, 4), torch.Generator().manual_seed(0)
    assert torch.equal(model._add_latent_noise(latents, generator), latents)
    noise = model.train()._add_latent_noise(latents, generator)
    scale = noise.flatten(1).std(dim=1)
    assert float(noise.flatten(1).square().mean(1).sqrt().mean()) == pytest.approx(0.1, rel=0.1)  # E|s| = sigma
    assert float(scale.std()) > 0.03 and noise[0].ne(noise[1]).all()


def test_max_targets_bounds_the_conditions_that_the_diffusion_sees_but_no_other_loss(make_world):
    world = make_world(HISTORIES)
    world.config.head.max_targets = 3
    model = world.build_model()
    _, batch = pack(world)
    seen = []
    model.head.denoiser.register_forward_hook(lambda module, arguments, output: seen.append(len(arguments[0])))
    out = model(batch, 0)
    assert sorted(seen) == [3 * world.config.head.batch_mul, len(batch.target_idx)] and len(batch.target_idx) > 3
    assert float(out["num_targets"]) == len(batch.target_idx)


def test_sampled_negatives_over_and_over_the_catalogue_equal_the_full_cross_entropy(make_world):
    """With very many negatives the corrected loss is that of the full catalogue, and vectors come from the same table."""
    world = make_world(HISTORIES)
    full = world.build_model()
    _, batch = pack(world)
    world.config.loss.num_negatives = 200_000
    sampled = world.build_model()
    with torch.no_grad():
        torch.testing.assert_close(sampled(batch, 1)["negative"], full(batch, 1)["negative"], rtol=0.01, atol=0)


def test_item_vectors_in_chunks_equal_the_table_and_end_with_the_bias(make_world):
    world = make_world(HISTORIES)
    model = world.build_model()
    with torch.no_grad():
        vectors, bias = model.items(model.catalogue(torch.device("cpu")).flatten(1), torch.arange(30))
    torch.testing.assert_close(model.item_vectors(chunk_rows=7), torch.cat([vectors, bias[:, None]], dim=1))


def test_inputs_of_a_training_step_are_not_modified(make_world):
    world = make_world(HISTORIES, user_tokens=True, response_drop=0.0)
    model = world.build_model().train()
    _, batch = pack(world)
    before = {name: value.clone() for name, value in vars(batch).items()}
    sum(value for name, value in model(batch, 0).items()).backward()
    assert all(torch.equal(value, before[name]) for name, value in vars(batch).items())
    assert torch.equal(model._catalogue, torch.from_numpy(world.item_latents))


def test_activation_checkpointing_changes_neither_losses_nor_gradients(make_world):
    world = make_world(HISTORIES, response_drop=0.0)
    _, batch = pack(world)
    results = []
    for checkpointing in (False, True):
        world.config.backbone.activation_checkpointing = checkpointing
        model = world.build_model().train()
        total = sum(model(batch, 3)[name] for name in ("lm", "negative", "diffusion"))
        total.backward()
        results.append((total.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_logits_are_computed_only_where_there_are_text_targets(make_world):
    world = make_world(HISTORIES, response_drop=0.5)
    model = world.build_model()
    _, batch = pack(world)
    seen = []
    layer = causal_lm(model.backbone).get_output_embeddings()
    layer.register_forward_hook(lambda module, arguments, output: seen.append(tuple(output.shape)))
    model(batch, 0)
    assert 0 < len(batch.text_labels) < batch.tokens.numel() / 4
    assert seen == [(len(batch.text_labels), layer.out_features)]

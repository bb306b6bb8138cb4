"""model/denoiser.py: what it depends on, where it starts, and that it is no linear map."""

import torch

from contrec_dist.model.denoiser import Denoiser, TimestepEmbedding


def make_denoiser(perturbed=True, num_blocks=2):
    torch.manual_seed(0)
    denoiser = Denoiser(latent_width=6, condition_width=5, width=16, num_blocks=num_blocks)
    if perturbed:
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return denoiser


def make_inputs(rows=4, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=draw), torch.arange(rows) * 100, torch.randn(rows, 5, generator=draw)


def predict(denoiser, x_t, step, condition):
    return denoiser.output(denoiser(x_t, step, condition)[0])


def test_denoiser_is_deeper_than_a_linear_map():
    """A linear (affine) map would give f(a + b) - f(a) - f(b) + f(0) = 0, in x_t as in the condition."""
    denoiser, (x_t, step, condition) = make_denoiser(), make_inputs()
    zero = torch.zeros_like(x_t)
    other = x_t.flip(0)
    in_latent = [predict(denoiser, one, step, condition) for one in (x_t + other, x_t, other, zero)]
    assert (in_latent[0] - in_latent[1] - in_latent[2] + in_latent[3]).abs().max() > 1e-2
    more = condition.flip(0)
    in_condition = [predict(denoiser, x_t, step, one) for one in (condition + more, condition, more, 0 * condition)]
    assert (in_condition[0] - in_condition[1] - in_condition[2] + in_condition[3]).abs().max() > 1e-2


def test_every_input_and_every_parameter_matters():
    denoiser, (x_t, step, condition) = make_denoiser(), make_inputs()
    x_t.requires_grad_(), condition.requires_grad_()
    predict(denoiser, x_t, step, condition).square().sum().backward()
    assert x_t.grad.abs().min() > 0 and condition.grad.abs().max(dim=1).values.min() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in denoiser.parameters())
    with torch.no_grad():
        later = predict(denoiser, x_t, step + 1, condition)
        assert (later - predict(denoiser, x_t, step, condition)).abs().max() > 1e-4


def test_rows_of_a_batch_do_not_meet():
    denoiser, (x_t, step, condition) = make_denoiser(), make_inputs()
    together = predict(denoiser, x_t, step, condition)
    alone = torch.cat([predict(denoiser, x_t[i : i + 1], step[i : i + 1], condition[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_a_fresh_denoiser_predicts_zero_and_its_blocks_are_the_identity():
    denoiser, (x_t, step, condition) = make_denoiser(perturbed=False), make_inputs()
    features, middle = denoiser(x_t, step, condition)
    torch.testing.assert_close(middle, denoiser.embed_latent(x_t))
    torch.testing.assert_close(features, denoiser.norm(middle))
    assert predict(denoiser, x_t, step, condition).abs().max() == 0


def test_the_middle_activation_is_that_of_the_middle_block():
    denoiser, inputs = make_denoiser(num_blocks=3), make_inputs()
    seen = []
    for block in denoiser.blocks:
        block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    _, middle = denoiser(*inputs)
    torch.testing.assert_close(middle, seen[1], atol=0, rtol=0)


def test_step_features_are_cosines_and_sines_of_falling_rates():
    embedding = TimestepEmbedding(width=3, num_features=4)
    seen = []
    embedding.mlp.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    embedding(torch.tensor([0, 7]))
    angles = torch.tensor([7.0, 0.07])
    expected = torch.stack([torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.cat([angles.cos(), angles.sin()])])
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


def test_several_draws_of_a_condition_equal_repeated_conditions():
    torch.manual_seed(0)
    denoiser = Denoiser(latent_width=4, condition_width=6, width=16, num_blocks=2)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    x_t, condition, step = torch.randn(15, 4), torch.randn(5, 6, requires_grad=True), torch.randint(1000, (15,))
    got, got_middle = denoiser(x_t, step, condition)
    expected, expected_middle = denoiser(x_t, step, condition.repeat(3, 1))
    torch.testing.assert_close((got, got_middle), (expected, expected_middle), atol=1e-6, rtol=1e-5)
    weight = torch.randn(got.shape)
    gradients = [torch.autograd.grad((weight * one).sum(), condition)[0] for one in (got, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)

"""model/last_position.py: what it leaves out changes nothing at the position that is read."""

from types import SimpleNamespace

import pytest
import torch

from contrec_dist.config import BackboneConfig, ShapeConfig
from contrec_dist.model.backbone import load_backbone
from contrec_dist.model.last_position import read_last_positions

LENGTHS = [1, 7, 30, 64, 70]


def make_base(attention="packed", family="llama", num_layers=2):
    torch.manual_seed(0)
    shape = ShapeConfig(family=family, hidden_size=32, num_layers=num_layers, num_heads=4, intermediate_size=48, vocab_size=300)
    model = load_backbone(BackboneConfig(shape=shape, attention=attention), vocab_size=300).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.base_model


def make_rows(lengths):
    """Embeddings padded on the right with numbers that would be noticed, and the last position of each row."""
    rows = torch.randn(len(lengths), max(lengths), 32, generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        rows[row, length:] = 1e3
    return rows, torch.tensor(lengths) - 1


@torch.no_grad()
def read_one_by_one(base, rows, last):
    """The whole model over every row alone, without padding: the slow reference."""
    return torch.cat([base(inputs_embeds=row[None, : end + 1], use_cache=False).last_hidden_state[:, -1] for row, end in zip(rows, last)])


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_last_position_is_what_the_whole_model_gives(attention, family, num_layers):
    base, (rows, last) = make_base(attention, family, num_layers), make_rows(LENGTHS)
    with torch.no_grad():
        got = read_last_positions(base, rows, last)
    torch.testing.assert_close(got, read_one_by_one(base, rows, last), atol=1e-4, rtol=1e-4)


def test_bf16_products_stay_near_fp32_whatever_the_length():
    base = make_base()
    for lengths in ([3, 20, 40], LENGTHS):  # by hand, and by the fused kernel
        rows, last = make_rows(lengths)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            got = read_last_positions(base, rows, last)
        expected = read_one_by_one(base, rows, last)
        assert ((got.float() - expected).norm(dim=1) / expected.norm(dim=1)).max() < 0.05


def test_the_last_layers_mlp_sees_one_position_a_row_and_the_model_is_left_as_it_was():
    base, (rows, last) = make_base(), make_rows([5, 9])
    seen = []
    for number, layer in enumerate(base.layers):
        layer.mlp.register_forward_hook(lambda module, given, out, number=number: seen.append((number, given[0].shape[1])))
    with torch.no_grad():
        read_last_positions(base, rows, last)
        assert seen == [(0, 9), (1, 1)]
        assert base(inputs_embeds=rows, use_cache=False).last_hidden_state.shape == (2, 9, 32)


def test_an_architecture_of_other_names_is_read_whole():
    hidden = torch.randn(2, 4, 3)

    def base_model(**given):
        return SimpleNamespace(last_hidden_state=hidden)

    base_model.config = SimpleNamespace(_attn_implementation="sdpa")
    got = read_last_positions(base_model, hidden, torch.tensor([1, 3]))
    assert torch.equal(got, torch.stack([hidden[0, 1], hidden[1, 3]]))

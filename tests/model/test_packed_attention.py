"""model/packed_attention.py: the same result and gradients as a mask over whole rows, on samples of every length."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from contrec_dist.model import packed_attention
from contrec_dist.model.packed_attention import PackedSpans, packed_attention_forward

ROW_TOKENS = 80
BF16_STEP = 2.0**-8  # relative, of one rounding


def segments_of(lengths: list[list[int]]) -> torch.Tensor:
    """(R, L) numbers of the samples of each row, 0 where a row is not filled."""
    rows = [torch.repeat_interleave(torch.arange(1, len(row) + 1), torch.tensor(row, dtype=torch.int64)) for row in lengths]
    return torch.stack([functional.pad(row, (0, ROW_TOKENS - len(row))) for row in rows])


def random_heads(num_rows: int, key_heads: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(num_rows, heads, ROW_TOKENS, 8, generator=draw, requires_grad=True) for heads in (4, key_heads, key_heads)
    )


def masked(query, key, value, segments, scaling=None):
    """Attention over whole rows with a mask; padding gives zeros."""
    same = (segments[:, :, None] == segments[:, None, :]) & torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=same[:, None], scale=scaling)
    return (out * (segments > 0)[:, None, :, None]).transpose(1, 2)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("lengths", [[[80], [1]], [[17, 16, 3, 40], [2, 2, 33, 1, 15]], [[5], []], [[], []]])
def test_packed_attention_equals_a_mask_over_whole_rows_with_gradients(lengths, key_heads):
    check_against_a_mask(segments_of(lengths), random_heads(len(lengths), key_heads))


@pytest.mark.parametrize(("block", "scores"), [(256, 1 << 19), (256, 1), (7, 1), (7, 4 * 7 * 40 * 2), (16, 1 << 19), (1, 1)])
def test_chunks_of_samples_and_blocks_of_queries_change_nothing(monkeypatch, block, scores):
    """Products by hand at every length, the samples in chunks of one or two, the queries in blocks that cut them anywhere."""
    monkeypatch.setattr(packed_attention, "LONGEST_BY_HAND", ROW_TOKENS)
    monkeypatch.setattr(packed_attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(packed_attention, "CACHED_SCORES", scores)
    check_against_a_mask(segments_of([[17, 16, 3, 40], [38, 33, 2, 1]]), random_heads(2, 4))


@pytest.mark.parametrize(("block", "scores"), [(256, 1 << 19), (7, 1)])
def test_bf16_is_as_near_to_fp32_as_its_roundings_allow(monkeypatch, block, scores):
    """By hand at every length, as on every CPU with bf16: result and gradients against fp32 of the same rounded numbers."""
    monkeypatch.setattr(packed_attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(packed_attention, "CACHED_SCORES", scores)
    segments = segments_of([[80], [38, 33, 2, 1]])
    heads = [one.detach().to(torch.bfloat16).requires_grad_() for one in random_heads(2, 4)]
    exact = [one.detach().float().requires_grad_() for one in heads]
    ours, _ = packed_attention_forward(SimpleNamespace(), *heads, None, packed_spans=PackedSpans.of(segments))
    expected = masked(*exact, segments)
    assert ours.dtype == torch.bfloat16
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((ours.float() * weight).sum(), heads)
    theirs = torch.autograd.grad((expected * weight).sum(), exact)
    for rounded, whole in zip((ours.detach(), *mine), (expected.detach(), *theirs), strict=True):
        assert float((rounded.float() - whole).norm() / whole.norm()) < 4 * BF16_STEP


def check_against_a_mask(segments, heads):
    """Result and gradients."""
    ours, _ = packed_attention_forward(
        SimpleNamespace(), *heads, None, scaling=0.3, packed_spans=PackedSpans.of(segments)
    )
    expected = masked(*heads, segments, scaling=0.3)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), heads), torch.autograd.grad((expected * weight).sum(), heads), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_spans_hold_every_real_position_once_and_group_similar_lengths():
    segments = segments_of([[17, 16, 3, 40], [2, 2, 33, 1, 15]])
    spans = PackedSpans.of(segments)
    assert sorted(spans.positions.tolist()) == (segments.flatten() > 0).nonzero()[:, 0].tolist()
    assert [group.longest for group in spans.groups] == [16, 17, 40]
    cost = sum(len(group.gather) * group.longest for group in spans.groups)
    assert cost < segments.numel() * ROW_TOKENS / 2


def test_equal_neighbours_in_two_rows_are_two_samples():
    """The last sample of a row and the first of the next may carry the same number."""
    segments = torch.ones(2, ROW_TOKENS, dtype=torch.int64)
    assert PackedSpans.of(segments).groups[0].gather.view(2, -1).tolist() == [list(range(80)), list(range(80, 160))]


def test_without_spans_the_mask_given_decides():
    query, key, value = random_heads(2, 4)
    mask = torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()[None, None]
    ours, _ = packed_attention_forward(SimpleNamespace(is_causal=True, num_key_value_groups=1), query, key, value, mask)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(ours, expected)

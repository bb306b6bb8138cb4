"""model/dropout.py: its share, its mean, its gradient, and where it does nothing."""

import pytest
import torch

from contrec_dist.model.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_keeps_the_mean_and_passes_the_gradient_of_what_it_kept(dtype):
    dropout, values = Dropout(0.3), torch.ones(301, 1001, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    left = dropout(values)
    left.sum().backward()
    assert torch.equal(values.grad, left.detach()) and left.dtype == dtype
    assert set(left.unique().tolist()) == {0.0, torch.tensor(1 / 0.7, dtype=dtype).item()}
    shares = (left == 0).float()
    assert abs(shares.mean().item() - 0.3) < 0.004  # five standard deviations
    assert (shares.mean(0) - 0.3).abs().max() < 0.14 and (shares.mean(1) - 0.3).abs().max() < 0.08  # of columns and of rows
    torch.manual_seed(0)
    assert torch.equal(dropout(values), left) and not torch.equal(dropout(values), left)


def test_dropout_changes_nothing_outside_training_or_at_0_and_all_at_1():
    values = torch.randn(7, 5)
    assert torch.equal(Dropout(0.3).eval()(values), values) and torch.equal(Dropout(0.0)(values), values)
    assert not Dropout(1.0)(values).any() and Dropout(0.5)(values[:0]).shape == (0, 5)

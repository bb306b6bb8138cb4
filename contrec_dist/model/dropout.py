"""Dropout whose mask costs a CPU little: torch draws one Bernoulli number after the other there; here one draw of 64 bits
makes four.

Rounding   a share of round(65536 p) / 65536 is dropped
Use        every dropout of the model and of the baselines; on GPUs it is torch's own
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def dropout(values: Tensor, p: float, training: bool = True) -> Tensor:
    """Each value is 0 with probability p, else times 1 / (1 - p), by torch's global generator. Any shape -> the same"""
    if values.device.type != "cpu" or not training or not 0.0 < p < 1.0:
        return functional.dropout(values, p, training)
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    kept = draws.view(torch.int16)[: values.numel()].view(values.shape) >= round(p * 2**16) - 2**15
    return values * kept.to(values.dtype).mul_(1 / (1 - p))


class Dropout(nn.Module):
    """`dropout` while the module trains."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        return dropout(values, self.p, self.training)

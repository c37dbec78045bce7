"""Second moments in few bits over many steps: they follow gradients that become smaller, as those in fp32 do."""

from __future__ import annotations

import pytest
import torch

from gwt_dist import GWTAdamW
from gwt_dist.formulas.codecs import decode

STEPS, BETA2, SHAPE = 2000, 0.998, (8, 256)  # a step changes them by 0.2 %, less than half of what bf16 can say


def second_moments(state_dtype: str) -> torch.Tensor:
    """After gradients whose mean square is 1 at first and 0.01 from then on."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = GWTAdamW([weight], lr=0.0, level=2, betas=(0.9, BETA2), state_dtype=state_dtype, recipe="energy")
    for step in range(STEPS):
        size = 0.1 if step else (1 - BETA2) ** -0.5  # what many steps of size 1 would leave
        weight.grad = size * torch.randn(SHAPE, generator=generator)
        optimizer.step()
    state = optimizer.state[weight]
    codes, scale = state["exp_avg_sq"], state.get("exp_avg_sq_scale")
    if scale is None:
        return codes.double()
    return decode("e4m4", codes.flatten(), scale.flatten(), torch.arange(codes.numel()) // 64).double()


@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
def test_second_moments_decay(state_dtype: str) -> None:
    expected, found = second_moments("fp32"), second_moments(state_dtype)
    assert 0.02 < expected.mean() < 0.04  # of 1 at first
    assert abs(found.mean() / expected.mean() - 1) < 0.02

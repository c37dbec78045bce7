"""Cases for `test_activations_triton.py` that run where Triton interprets its kernels, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gwt_dist.activations.codes import GROUP, Codes, decode_eager, encode_eager
from triton_formats_cases import running


def packed(x_TC: Tensor) -> Codes:
    """Codes by the kernel."""
    from gwt_dist.kernels import triton_activations

    tokens, columns = x_TC.shape
    shape = tokens, -(-columns // GROUP)
    code_TC = torch.full((tokens, columns), 77, dtype=torch.uint8, device=x_TC.device)
    lo_TG, scale_TG = (torch.full(shape, 5.0, dtype=torch.bfloat16, device=x_TC.device) for _ in range(2))
    triton_activations.encode(x_TC, code_TC, lo_TG, scale_TG)
    return Codes(code_TC, lo_TG, scale_TG)


def unpacked(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Numbers by the kernel."""
    from gwt_dist.kernels import triton_activations

    x_TC = torch.full(codes.code_TC.shape, 7.0, dtype=dtype, device=codes.code_TC.device)
    triton_activations.decode(x_TC, codes.code_TC, codes.lo_TG, codes.scale_TG)
    return x_TC


def inputs(dtype: torch.dtype, device: str) -> Iterator[Tensor]:
    """Numbers of all sizes, zeros, constants, one sign, and rows that end within a group and a program."""
    generator = torch.Generator().manual_seed(0)
    for columns in (GROUP, 160, 33, 300):
        x = torch.randn(20, columns, generator=generator) * 10.0 ** torch.arange(-10, 10)[:, None] / 3
        x[5], x[6], x[7], x[8], x[9] = 0.0, 1.0, -3.0, x[8].abs(), -x[9].abs()
        yield x.to(device, dtype)


def equal_to_eager(device: str = "cpu") -> int:
    """Bit for bit, both ways; returns how many groups there were."""
    groups = 0
    with running(device):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for x in inputs(dtype, device):
                x = x if dtype != torch.float16 else x.clamp(-6e4, 6e4)
                found, expected = packed(x), encode_eager(x)
                for name in ("code_TC", "lo_TG", "scale_TG"):
                    assert torch.equal(getattr(found, name), getattr(expected, name)), (dtype, tuple(x.shape), name)
                assert torch.equal(unpacked(found, dtype), decode_eager(expected, dtype)), (dtype, tuple(x.shape))
                groups += found.lo_TG.numel()
    return groups


def none_stays_visible(device: str = "cpu") -> list[int]:
    """Of each token, how many numbers are not finite after it."""
    x = torch.randn(3, 256, device=device)
    x[0, 3], x[1, 200] = torch.inf, torch.nan
    with running(device):
        return (~unpacked(packed(x), torch.float32).isfinite()).sum(1).tolist()

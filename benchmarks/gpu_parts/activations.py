"""Saved activations in 8 bits: to pack and to unpack them, beside a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch

from gpu_parts.setting import NO_TIME, Row, Setting, attempt

SHAPES = (8192, 4096), (8192, 11008), (8192, 5461)
TINY = ((64, 160),)
ROUNDS = 15


def rows(setting: Setting) -> Iterator[Row]:
    """Of tokens x numbers in bf16 and fp32."""
    for tokens, columns in TINY if setting.smoke else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            case: Row = {"case": f"{tokens} x {columns}", "dtype": str(dtype).removeprefix("torch.")}
            if setting.left() < 3:
                yield case | {"note": NO_TIME}
                continue
            yield attempt(case, lambda t=tokens, c=columns, d=dtype: beside(setting, t, c, d))
            setting.free()


def beside(setting: Setting, tokens: int, columns: int, dtype: torch.dtype) -> Row:
    """Both ways and the copy in turn: medians, and how near the kernels are to what memory can do."""
    from gwt_dist.activations.codes import decode, encode, encode_eager

    x_TC = torch.randn(tokens, columns, device=setting.device, dtype=dtype)
    codes = encode(x_TC)
    reference = encode_eager(x_TC)
    moved = x_TC.nbytes + codes.nbytes  # of each way
    source = torch.empty(moved // 2, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    ways = {
        "pack": lambda: encode(x_TC),
        "unpack": lambda: decode(codes, dtype),
        "copy": lambda: target.copy_(source),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            times[name].append(setting.timed(way)[0])
    found: Row = {"ok": torch.equal(codes.code_TC, reference.code_TC), "bytes a number": codes.nbytes / x_TC.numel()}
    found |= {f"{name} ms": median(its) for name, its in times.items()}
    for name in ("pack", "unpack"):
        found[f"{name}, share of copy"] = median(b / a for a, b in zip(times[name], times["copy"], strict=True))
    return found

"""The products of the orthogonal recipe: its kernel for symmetric ones beside `torch.bmm`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from gpu_parts.setting import NO_TIME, Row, Setting, attempt

SHAPES = (512, 512), (512, 1376), (1024, 2736), (2048, 5461), (4096, 4096)
TINY = ((16, 43),)
EDGE = 16  # rows and columns are padded with zeros to multiples of it, as in the optimizer
NUMBERS = -4.775, 2.0315  # of a step of the Newton-Schulz iteration: b*g + c*g*g
ROUNDS = 9


def rows(setting: Setting) -> Iterator[Row]:
    """Of each shape, as many matrices as the optimizer stacks; in bf16, which the kernel takes."""
    if importlib.util.find_spec("gwt_dist.products") is None:
        yield {"case": "gwt_dist.products", "note": "not in this checkout"}
        return
    from gwt_dist import products

    for rows_, columns in TINY if setting.smoke else SHAPES:
        n = products.stack_size(rows_, columns, setting.device)
        case: Row = {"case": f"{n} x {rows_}x{columns}"}
        if setting.left() < 3:
            yield case | {"note": NO_TIME}
            continue
        torch.manual_seed(0)
        x_nRC = torch.randn(n, rows_, columns, device=setting.device).bfloat16()
        x_nRC = functional.pad(x_nRC, (0, -columns % EDGE, 0, -rows_ % EDGE))
        for name, arguments in (("gram", (x_nRC,)), ("quadratic", (x_nRC @ x_nRC.mT / columns, *NUMBERS))):
            yield attempt(case | {"product": name}, lambda a=arguments, p=name: beside(setting, p, a))
        setting.free()


def beside(setting: Setting, name: str, arguments: tuple[Any, ...]) -> Row:
    """Both in turn; errors are relative to the product in fp64 of the first matrix."""
    from gwt_dist.products import plain, symmetric

    missing = symmetric.missing(setting.device, arguments[0].dtype)
    modules = {"bmm": plain} if missing else {"bmm": plain, "symmetric": symmetric}
    exact = getattr(plain, name)(arguments[0][:1].double(), *arguments[1:])
    found: Row = {"note": f"no kernel for {missing}"} if missing else {}
    times: dict[str, list[float]] = {which: [] for which in modules}
    for which, module in modules.items():
        product = getattr(module, name)(*arguments)[:1].double()
        found[f"{which} error"] = float((product - exact).norm() / exact.norm())
    for _ in range(ROUNDS):
        for which, module in modules.items():
            times[which].append(setting.timed(lambda m=module: getattr(m, name)(*arguments))[0])
    found |= {f"{which} ms": median(its) for which, its in times.items()}
    if not missing:
        found["ratio"] = median(a / b for a, b in zip(times["symmetric"], times["bmm"], strict=True))
    return found

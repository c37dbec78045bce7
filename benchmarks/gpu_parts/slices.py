"""Whether a matrix in a stack has the same bits whatever the size of the stack, and whatever its place in it.

If not, an optimizer that stacks matrices for `torch.bmm` has to stack a fixed number of them: the number that a rank
has would show in the bits of the weights else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_parts.setting import NO_TIME, Row, Setting, attempt

MOST = 16
SHAPES = (512, 512), (512, 1376), (4096, 4096)
TINY = (16, 16), (16, 43)


def rows(setting: Setting) -> Iterator[Row]:
    """The two products of the Newton-Schulz iteration, of each shape in fp32 and bf16."""
    for shape in TINY if setting.smoke else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for product in ("x xT", "(x xT) x"):
                case: Row = {"case": f"{shape[0]}x{shape[1]}", "dtype": str(dtype)[6:], "product": product}
                if setting.left() < 2:
                    yield case | {"note": NO_TIME}
                    continue
                yield attempt(case, lambda s=shape, d=dtype, p=product: compared(setting, s, d, p))
                setting.free()


def compared(setting: Setting, shape: tuple[int, int], dtype: torch.dtype, product: str) -> Row:
    """What depends on the number of matrices in a stack, and on the place."""
    generator = torch.Generator(device=setting.device).manual_seed(0)
    one = torch.randn(shape, generator=generator, device=setting.device).to(dtype)
    left_nRC = one.expand(MOST, *shape).contiguous()  # the same matrix in each place
    right_nRC = left_nRC.mT
    if product != "x xT":
        left_nRC, right_nRC = torch.bmm(left_nRC, right_nRC), left_nRC
    kinds: list[tuple[Tensor, list[int]]] = []  # a product, and the sizes of stacks whose first slice it is
    places_differ = []
    for n in range(1, MOST + 1):
        found = torch.bmm(left_nRC[:n], right_nRC[:n])
        if not all(torch.equal(found[0], other) for other in found[1:]):
            places_differ.append(n)
        for kind, sizes in kinds:
            if torch.equal(kind, found[0]):
                sizes.append(n)
                break
        else:
            kinds.append((found[0].clone(), [n]))
    single = torch.mm(left_nRC[0], right_nRC[0])
    as_single = next((i for i, (kind, _) in enumerate(kinds) if torch.equal(kind, single)), None)
    return {
        "same bits for all n": len(kinds) == 1,
        "n with the same bits": "; ".join(_ranges(sizes) for _, sizes in kinds),
        "n with other bits in another place": _ranges(places_differ),
        "n with the bits of mm": "none" if as_single is None else _ranges(kinds[as_single][1]),
        "largest difference": max(float((k - kinds[0][0]).abs().max() / k.abs().max()) for k, _ in kinds),
    }


def _ranges(numbers: list[int]) -> str:
    """As 1-3, 5."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found) or "none"

"""Tensors of every dtype and stride, and what the ranks of `test_stored_tensors.py` run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import gwt_dist
from gwt_dist import GWTAdamW
from zero_cases import settings

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    torch.float4_e2m1fn_x2,
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
]


def blank(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.zeros(prod(shape) * dtype.itemsize, dtype=torch.uint8).view(dtype).view(list(shape))


# The same elements in the same shape, elsewhere in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t.clone(),
    "every second": lambda t: blank((*t.shape, 2), t.dtype)[..., 1].copy_(t),
    "every third row": lambda t: blank((3 * t.shape[0], *t.shape[1:]), t.dtype)[::3].copy_(t),
    "inside": lambda t: blank([n + 2 for n in t.shape], t.dtype)[tuple(slice(1, n + 1) for n in t.shape)].copy_(t),
}
SHAPES = [(2, 3, 4, 5), (7, 11), (13,), (1, 9, 1), (5, 1), (3, 0, 2)]


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    """A tensor of any bits that the dtype has, NaN and infinities included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (prod(shape) * dtype.itemsize,), generator=generator)
    return raw.to(torch.uint8).view(dtype).view(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.resolve_conj().contiguous().view(-1).view(torch.uint8) for t in (a, b)))


class Holder(nn.Module):
    """A trained Linear, and tensors that nobody trains as frozen parameters and as buffers."""

    def __init__(self, tensors: dict[str, Tensor], buffers: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        for name, tensor in tensors.items():
            if buffers:
                self.register_buffer(f"buffer_{name}", tensor)
            else:
                self.register_parameter(f"frozen_{name}", nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().sum()


def everything(layout: str, seed: int) -> dict[str, Tensor]:
    """Of every dtype, a tensor of each shape in a layout."""
    found = {}
    for dtype in DTYPES:
        for i, shape in enumerate(SHAPES):
            name = f"{str(dtype).removeprefix('torch.')}_{i}"
            found[name] = LAYOUTS[layout](bits(shape, dtype, seed))
    return found


def engines_case(folder: str, engine: str, saved: str, here: str) -> list[str]:
    """Save in one layout and load in another on these ranks: names that are not what they were, to the bit."""
    holders = []
    for layout, seed in ((saved, 1), (here, 2)):
        # Engines broadcast buffers and parameters with means that do not take every dtype.
        tensors = {n: t for n, t in everything(layout, seed).items() if n.startswith(("complex64", "float16", "uint8"))}
        module = Holder(tensors)
        model: Any = module
        optimizer = GWTAdamW(module.linear.parameters(), level=1, recipe="energy")
        if engine == "ddp":
            model = DistributedDataParallel(module)
        elif engine == "fsdp2":
            model = fully_shard(module)
            optimizer = GWTAdamW(module.linear.parameters(), level=1, recipe="energy")
        elif engine.startswith("zero"):
            config = settings(int(engine[4]))
            model = gwt_dist.initialize(model=module, optimizer=optimizer, config=config)[0]
        holders.append((module, model, optimizer))
    (first, *saving), (second, *loading) = holders
    strides = {name: buffer.stride() for name, buffer in second.named_buffers()}
    gwt_dist.save(folder, *saving, step=0)
    gwt_dist.load(folder, *loading)
    buffers = dict(second.named_buffers())
    wrong = [name for name, buffer in first.named_buffers() if not same_bits(buffer, buffers[name])]
    return wrong + [name for name, buffer in buffers.items() if buffer.stride() != strides[name]]


def columns_case(folder: str) -> list[float]:
    """Columns over the ranks, where the local part is a transposed one: three steps, the last from a checkpoint."""
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 10), [torch.randn(6, 10) for _ in range(3)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def built(whole: Tensor) -> tuple[nn.Module, GWTAdamW]:
        placed = distribute_tensor(whole, mesh, [Shard(1)])
        local = placed.to_local().t().contiguous().t()
        spread = DTensor.from_local(local, mesh, [Shard(1)], run_check=False, shape=whole.shape, stride=whole.stride())
        module = nn.Module()
        module.weight = nn.Parameter(spread)
        assert not module.weight.to_local().is_contiguous()
        return module, GWTAdamW(module.parameters(), level=1, lr=0.1, recipe="energy")

    def train(run: tuple[nn.Module, GWTAdamW], steps: list[Tensor]) -> None:
        for step in steps:
            run[0].weight.grad = distribute_tensor(step, mesh, [Shard(1)])
            run[1].step()

    through, again = built(start), built(torch.zeros(6, 10))
    train(through, gradients[:2])
    gwt_dist.save(folder, *through, step=2)
    gwt_dist.load(folder, *again)
    train(through, gradients[2:])
    train(again, gradients[2:])
    one = nn.Module()
    one.weight = nn.Parameter(start.clone())
    optimizer = GWTAdamW(one.parameters(), level=1, lr=0.1, recipe="energy")
    for step in gradients:
        one.weight.grad = step
        optimizer.step()
    whole = [run[0].weight.full_tensor() for run in (through, again)]
    return [float((w - one.weight).detach().abs().max()) for w in whole]

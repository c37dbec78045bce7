"""What the ranks of the tests of `fuse_backward` run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gwt_dist
from fsdp2_cases import TARGETS, Counter, shard
from gwt_dist import GWTAdamW, param_groups

LAYERS = 5


class Block(nn.Module):
    """Two matrices of odd widths and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(23, 29)
        self.mlp = nn.Linear(29, 23, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(torch.tanh(self.attn(x)))


class Chain(nn.Module):
    """Blocks in a row, and a matrix that the forward pass does not use."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(LAYERS):
            self.add_module(f"block{i}", Block())
        self.mlp_unused = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(LAYERS):
            x = getattr(self, f"block{i}")(x)
        return x.square().mean()


def micro_batches(steps: int, accumulation: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(10 + (dist.get_rank() if dist.is_initialized() else 0))
    for _ in range(steps):
        yield [torch.randn(4, 23, generator=generator) for _ in range(accumulation)]


def trained(fused: bool, recipe: str, accumulation: int) -> tuple[nn.Module, GWTAdamW, int, list[int]]:
    """Ten steps; the most groups that had gradients at once, and the number of collectives of each step."""
    torch.manual_seed(0)
    model = shard(Chain(), "rows") if dist.is_initialized() else Chain()
    optimizer = GWTAdamW(param_groups(model, level=2, targets=TARGETS, recipe=recipe, lr=0.01))
    watch = GradientWatch(model)
    if fused:
        gwt_dist.fuse_backward(optimizer, model)
    collectives = []
    for batches in micro_batches(10, accumulation):
        with Counter() as counter:
            for i, x in enumerate(batches):
                with nullcontext() if i == accumulation - 1 else optimizer.accumulating():
                    (model(x) / accumulation).backward()
            optimizer.step()
        assert not fused or all(p.grad is None for p in model.parameters())
        optimizer.zero_grad()
        collectives.append(len(counter.calls))
    return model, optimizer, watch.most, collectives


class GradientWatch:
    """Whenever a gradient shard has been reduced, counts the blocks of which any gradient is still held."""

    def __init__(self, model: nn.Module) -> None:
        self.most = 0
        self._named = list(model.named_parameters())
        for _, parameter in self._named:
            parameter.register_post_accumulate_grad_hook(self._count)

    def _count(self, _: Tensor) -> None:
        held = {name.split(".")[0] for name, parameter in self._named if parameter.grad is not None}
        self.most = max(self.most, len(held))


def local(parameter: Tensor) -> Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def fuse_case(recipe: str, accumulation: int) -> dict[str, Any]:
    """The same ten steps by `step()` and by `fuse_backward`."""
    plain, optimizer, most, collectives = trained(False, recipe, accumulation)
    fused, other, most_fused, collectives_fused = trained(True, recipe, accumulation)
    torch.manual_seed(0)
    start = Chain()
    pairs = list(zip(plain.parameters(), fused.parameters(), strict=True))
    states = [(optimizer.state.get(a, {}), other.state.get(b, {})) for a, b in pairs]
    return {
        "equal": all(torch.equal(local(a), local(b)) for a, b in pairs),
        "states": all(
            x.keys() == y.keys() and all(torch.equal(local(x[k]), local(y[k])) for k in x) for x, y in states
        ),
        "difference": max(float((local(a) - local(b)).abs().max()) if local(a).numel() else 0.0 for a, b in pairs),
        "moved": not torch.equal(local(next(plain.parameters())), local(next(start.parameters()))),
        "groups": (most, most_fused),
        "collectives": (collectives, collectives_fused),
    }


def refused_case(what: str) -> str:
    """The message where a fused update cannot be right."""
    model: nn.Module = Chain()
    if what == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = GWTAdamW(model.parameters(), lr=0.01)
    try:
        if what == "swapped":
            model = shard(model, "rows")
        if what == "scaler":
            model = shard(Chain(), "rows")
            optimizer = GWTAdamW(model.parameters(), lr=0.01)
            gwt_dist.fuse_backward(optimizer, model)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
            scaler.scale(model(torch.ones(2, 23))).backward()
            scaler.step(optimizer)
        gwt_dist.fuse_backward(optimizer, model)
    except ValueError as error:
        return str(error)
    return "no error"

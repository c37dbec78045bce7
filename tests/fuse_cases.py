"""What the ranks of the tests of `fuse_backward` run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffload,
    FullyShardedDataParallel,
    MixedPrecision,
    _runtime_utils,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gwt_dist
from fairscale_cases import streams_on_cpu
from fsdp1_cases import unit_options
from fsdp2_cases import TARGETS, Counter, local, shard
from gwt_dist import GWTAdamW, param_groups
from zero_cases import options

LAYERS, STEPS = 5, 4
# Recipes with keys of their own, by the names that the cases have for them.
KEYS: dict[str, dict[str, Any]] = {
    "low-rank": {"level": 0, "rank": 5, "update_proj_gap": 2, "residual": True},
    "critical": {"recipe": "energy", "critical": 2},
}


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
        self.order = list(range(LAYERS))
        self.reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for i in self.order:
            block = getattr(self, f"block{i}")
            x = checkpoint(block, x.requires_grad_(), use_reentrant=True) if self.reentrant else block(x)
        return x.square().mean()


def micro_batches(steps: int, accumulation: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(10 + (dist.get_rank() if dist.is_initialized() else 0))
    for _ in range(steps):
        yield [torch.randn(4, 23, generator=generator) for _ in range(accumulation)]


def trained(fused: bool, recipe: str, accumulation: int) -> tuple[nn.Module, GWTAdamW, int, list[int]]:
    """Some steps; the most groups that had gradients at once, and the number of collectives of each step."""
    torch.manual_seed(0)
    model = shard(Chain(), "rows") if dist.is_initialized() else Chain()
    optimizer = GWTAdamW(param_groups(model, targets=TARGETS, **options(2, recipe) | KEYS.get(recipe, {})))
    watch = GradientWatch(model)
    if fused:
        gwt_dist.fuse_backward(optimizer, model)
    collectives = []
    for batches in micro_batches(STEPS, accumulation):
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


def fuse_case(recipe: str, accumulation: int) -> dict[str, Any]:
    """The same steps by `step()` and by `fuse_backward`."""
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
    model: Any = Chain()
    if what == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif what.startswith("fsdp1"):
        offload = CPUOffload(True) if what == "fsdp1 offload" else None
        model = wrapped("FULL_SHARD", True, cpu_offload=offload)
    optimizer = GWTAdamW(model.parameters(), lr=0.01, recipe="paper", level=2)
    try:
        if what.startswith("fsdp1"):
            if what != "fsdp1 alone":
                gwt_dist.attach(optimizer, model)
            if what == "fsdp1 hook":
                model.register_comm_hook(None, lambda *_: None)
        if what == "swapped":
            model = shard(model, "rows")
        if what == "scaler":
            model = shard(Chain(), "rows")
            optimizer = GWTAdamW(model.parameters(), lr=0.01, recipe="paper", level=2)
            gwt_dist.fuse_backward(optimizer, model)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
            scaler.scale(model(torch.ones(2, 23))).backward()
            scaler.step(optimizer)
        if what in ("twice", "accumulated"):
            model = shard(Chain(), "rows")
            optimizer = GWTAdamW(model.parameters(), lr=0.01, recipe="paper", level=2)
        gwt_dist.fuse_backward(optimizer, model)
        if what == "fsdp1 reentrant":
            model.module.order, model.module.reentrant = [0, 0], True
        for _ in range(2):
            with optimizer.accumulating() if what.endswith("accumulated") else nullcontext():
                model(torch.ones(2, 23)).backward()
            if not what.endswith("twice"):
                optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


def wrapped(strategy: str, use_orig_params: bool, **options: Any) -> nn.Module:
    """The chain under FSDP1: a unit for each block, and one for the rest."""
    model = Chain()
    common = unit_options(strategy, use_orig_params) | options
    for i in range(LAYERS):
        setattr(model, f"block{i}", FullyShardedDataParallel(getattr(model, f"block{i}"), **common))
    return FullyShardedDataParallel(model, **common)


class ShardWatch:
    """The gradient shards that are alive whenever one more of them has been reduced, by weak references.

    It looks at what FSDP1 reduces into: the storage, not the tensor, which FSDP1 keeps for its shape. Where nothing is
    cut (NO_SHARD) that is the whole gradient.
    """

    def __init__(self) -> None:
        self.most = 0
        self._shards: dict[int, StorageWeakRef] = {}  # by place: a gradient that accumulates is reduced again
        self._real: Any = None

    def __enter__(self) -> ShardWatch:
        self._real = _runtime_utils._get_reduce_scatter_tensors, _runtime_utils._reduce_grad_no_shard

        def watched(state: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            padded, shard = self._real[0](state, gradient)
            self._see(shard)
            return padded, shard

        def watched_whole(state: Any, handle: Any) -> None:
            self._see(handle.flat_param.grad)
            self._real[1](state, handle)

        _runtime_utils._get_reduce_scatter_tensors, _runtime_utils._reduce_grad_no_shard = watched, watched_whole
        return self

    def __exit__(self, *_: object) -> None:
        _runtime_utils._get_reduce_scatter_tensors, _runtime_utils._reduce_grad_no_shard = self._real

    def _see(self, shard: Tensor) -> None:
        storage = shard.untyped_storage()
        self._shards[storage.data_ptr()] = StorageWeakRef(storage)
        self.most = max(self.most, self.alive())

    def alive(self) -> int:
        return sum(not reference.expired() for reference in self._shards.values())


def fairscale_case(flatten: bool, recipe: str) -> dict[str, Any]:
    """Both on one rank under fairscale's `FullyShardedDataParallel`, which keeps its tensors whole there."""
    trained = {}
    for fused in (False, True):
        torch.manual_seed(0)
        with streams_on_cpu() as wrap:
            options = {"compute_device": torch.device("cpu"), "flatten_parameters": flatten}
            model = Chain()
            del model.mlp_unused  # it would be in a unit of its own, without a forward pass
            for i in range(LAYERS):
                setattr(model, f"block{i}", wrap(getattr(model, f"block{i}"), **options))
            model = wrap(model, **options)
            optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], level=2, recipe=recipe, lr=0.01)
            gwt_dist.attach(optimizer, model)
            if fused:
                gwt_dist.fuse_backward(optimizer, model)
            start = [p.detach().clone() for p in model.parameters()]
            for (x,) in micro_batches(STEPS, 1):
                model(x).backward()
                assert not fused or all(p.grad is None for p in model.parameters())
                optimizer.step()
                optimizer.zero_grad()
        trained[fused] = [p.detach() for p in model.parameters()]
    return {
        "equal": all(torch.equal(a, b) for a, b in zip(trained[False], trained[True], strict=True)),
        "moved": any(not torch.equal(a, b) for a, b in zip(trained[True], start, strict=True)),
    }


def trained_fsdp1(
    fused: bool, strategy: str, use_orig_params: bool, recipe: str, accumulation: int, what: str
) -> dict[str, Any]:
    """Some steps under FSDP1."""
    torch.manual_seed(0)
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16) if what == "bf16" else None
    model: Any = wrapped(strategy, use_orig_params, mixed_precision=policy)
    model.module.reentrant = what == "reentrant"
    optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], **options(2, recipe))
    gwt_dist.attach(optimizer, model)
    if fused:
        gwt_dist.fuse_backward(optimizer, model)
    collectives = []
    with ShardWatch() as watch:
        for batches in micro_batches(STEPS, accumulation):
            with Counter() as counter:
                for i, x in enumerate(batches):
                    early = model.no_sync if what == "no_sync" else optimizer.accumulating
                    with nullcontext() if i == accumulation - 1 else early():
                        (model(x) / accumulation).backward()
                held = watch.alive()
                optimizer.step()
                assert not fused or held == 0
                assert not fused or all(p.grad is None for p in model.parameters())
            optimizer.zero_grad()
            collectives.append(len(counter.calls))
    parameters = list(model.parameters())
    return {
        "weights": [p.detach().clone() for p in parameters],
        "states": [{k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for p in parameters],
        "most": watch.most,
        "collectives": collectives,
    }


def fsdp1_case(strategy: str, use_orig_params: bool, recipe: str, accumulation: int, what: str = "") -> dict[str, Any]:
    """The same steps by `step()` and by `fuse_backward`."""
    plain = trained_fsdp1(False, strategy, use_orig_params, recipe, accumulation, what)
    fused = trained_fsdp1(True, strategy, use_orig_params, recipe, accumulation, what)
    torch.manual_seed(0)
    start = [p.detach() for p in wrapped(strategy, use_orig_params).parameters()]
    states = list(zip(plain["states"], fused["states"], strict=True))
    pairs = list(zip(plain["weights"], fused["weights"], strict=True))
    return {
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "states": all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in states),
        "difference": max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0),
        "moved": any(not torch.equal(a, b) for a, b in zip(plain["weights"], start, strict=True)),
        "most": (plain["most"], fused["most"]),
        "collectives": (plain["collectives"], fused["collectives"]),
    }

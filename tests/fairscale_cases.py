"""What the ranks of the tests of fairscale's FullyShardedDataParallel run, on CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gwt_dist
from fsdp2_cases import Counter
from gwt_dist import GWTAdamW, LayoutError
from gwt_dist.engines import fairscale as adapter
from whole_tensor_cases import Weights, five_steps, fresh_model
from zero_cases import options


@contextlib.contextmanager
def streams_on_cpu() -> Iterator[Any]:
    """fairscale's FullyShardedDataParallel, lent what it needs without a GPU.

    It asks torch for CUDA streams whatever the device is, and for collectives over one tensor that gloo does not have:
    streams that do nothing stand in, on one thread in program order, and collectives over lists of tensors.
    """
    from fairscale.internal import reduce_scatter_bucketer
    from fairscale.nn.data_parallel import fully_sharded_data_parallel as module

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    stream = Stream()

    class Torch:
        cuda = SimpleNamespace(
            is_available=lambda: True,
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda _: contextlib.nullcontext(),
            synchronize=lambda: None,
        )

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    saved = module.torch, torch.Tensor.record_stream
    module.torch, torch.Tensor.record_stream = Torch(), lambda tensor, stream: None
    module.enable_nccl_base_collectives = reduce_scatter_bucketer.enable_nccl_base_collectives = False
    try:
        yield module.FullyShardedDataParallel
    finally:
        module.torch, torch.Tensor.record_stream = saved
        module.enable_nccl_base_collectives = reduce_scatter_bucketer.enable_nccl_base_collectives = True


FLAT = ["flat", "modules"]  # all tensors in one parameter; those of each module in one


def shard(model: nn.Module, kind: str) -> nn.Module:
    """The model in float64 under FullyShardedDataParallel."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    options: dict[str, Any] = {"compute_device": torch.device("cpu"), "flatten_parameters": kind != "tensors"}
    model = model.float()  # fairscale takes no other to begin with
    del model.frozen  # a flat parameter is frozen as a whole, and summon_full_params fails beside a frozen one
    if kind == "modules":
        for name, child in model.named_children():
            setattr(model, name, FullyShardedDataParallel(child, **options))
    return FullyShardedDataParallel(model, **options).double()


def groups(model: nn.Module, kind: str, level: int, recipe: str) -> list[dict[str, Any]]:
    """Levels as the layout allows: one for all, or by the names of modules."""
    if kind == "flat":
        return [{"params": list(model.parameters()), **options(level, recipe)}]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    high = [p for name, p in named if "attn" in name or "mlp" in name]
    low = [p for name, p in named if not ("attn" in name or "mlp" in name)]
    return [{**options(level, recipe), "params": high}, {**options(level, recipe), "params": low, "level": 0}]


@cache
def reference(kind: str, level: int, recipe: str) -> Weights:
    """The weights after five steps of one process."""
    model = fresh_model()
    optimizer = GWTAdamW(groups(model, kind, level, recipe))
    for step in five_steps():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = step[name].double()
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def error_of(model: Any, expected: Weights) -> float:
    """Largest difference of the weights that fairscale gathers, relative to how far they have moved."""
    start = {n: p.detach() for n, p in fresh_model().named_parameters()}
    error = 0.0
    with model.summon_full_params():
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert found.keys() == expected.keys() - {"frozen.weight"}
    for name, weight in found.items():
        moved = float((expected[name] - start[name]).abs().max())
        error = max(error, float((weight - expected[name]).abs().max()) / (moved or 1.0))
    return error


def backward(model: nn.Module, step: Weights, share: float = 1.0) -> None:
    """Gradients through fairscale's own reduce-scatter: rank 0 brings all of them."""
    factor = share * dist.get_world_size() if dist.get_rank() == 0 else 0.0
    nested: dict[str, Weights] = {}
    for name, gradient in step.items():
        module, _, parameter = name.partition(".")
        nested.setdefault(module, {})[parameter] = gradient.double() * factor
    model(nested).backward()


def sharded_case(kind: str, level: int, recipe: str) -> dict[str, Any]:
    """Five steps: how far the weights are from one process, the collectives, and what was read."""
    with streams_on_cpu():
        model = shard(fresh_model(), kind)
        optimizer = GWTAdamW(groups(model, kind, level, recipe))
        gwt_dist.attach(optimizer, model)
        per_step = []
        for step in five_steps():
            optimizer.zero_grad()
            backward(model, step)
            with Counter() as counter:
                optimizer.step()
            per_step.append(len(counter.calls))
        buffers = adapter.read(model)
        assert buffers is not None
        return {
            "error": error_of(model, reference(kind, level, recipe)),
            "collectives": per_step,
            "names": sorted({f.fqn for b in buffers for f in b.fragments}),
            "empty": sum(all(f.numel == 0 for f in b.fragments) for b in buffers),
            "cut": sum(len(p.exchange.receives) for p in optimizer._plans.values()),
        }

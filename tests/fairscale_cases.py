"""What the ranks of the tests of fairscale's FullyShardedDataParallel run, on CPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import gwt_dist
from fsdp2_cases import Counter
from gwt_dist import GWTAdamW, LayoutError
from gwt_dist.engines import fairscale as adapter
from whole_tensor_cases import Weights, five_steps, fresh_model
from zero_cases import options


@contextlib.contextmanager
def streams_on_cpu() -> Iterator[Any]:
    """Fairscale's FullyShardedDataParallel, lent what it needs without a GPU.

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


def shard(model: nn.Module, kind: str) -> nn.Module:
    """The model in float64 under FullyShardedDataParallel: flattened as one, module by module, or not at all."""
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
            "cut": sum(len(p.exchange.receives) for p in optimizer._steps.plans.values()),
        }


def own_state_case(kind: str) -> dict[str, Any]:
    """Five steps at once, and two and three with each rank's own state_dict between them."""
    with streams_on_cpu():
        whole, parts = [], []
        for result, cuts in ((whole, [5]), (parts, [2, 5])):
            model, state, done = shard(fresh_model(), kind), None, 0
            for end in cuts:
                optimizer = GWTAdamW(groups(model, kind, 3, "paper"))
                gwt_dist.attach(optimizer, model)
                if state is not None:
                    optimizer.load_state_dict(state)
                for step in five_steps()[done:end]:
                    optimizer.zero_grad()
                    backward(model, step)
                    optimizer.step()
                state, done = copy.deepcopy(optimizer.state_dict()), end
            result += [p.detach().clone() for p in model.parameters()]
        return {"same": all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))}


def accumulation_case(kind: str, synchronised: bool) -> Any:
    """A quarter of each gradient in no_sync and the rest after it; or a step without the rest."""
    with streams_on_cpu():
        model = shard(fresh_model(), kind)
        optimizer = GWTAdamW(groups(model, kind, 2, "paper"))
        gwt_dist.attach(optimizer, model)
        for step in five_steps():
            optimizer.zero_grad()
            with model.no_sync():
                backward(model, step, share=0.25)
            if not synchronised:
                return _message(optimizer.step)
            backward(model, step, share=0.75)
            optimizer.step()
        return error_of(model, reference(kind, 2, "paper"))


def refused_case(kind: str, what: str) -> str:
    """The message where the layout is unknown, or not what it should be."""
    with streams_on_cpu():
        plain = fresh_model()
        before = groups(plain, kind, 2, "paper")
        model = shard(plain, kind)
        if what == "built before":
            return _message(lambda: gwt_dist.attach(GWTAdamW(before, level=1), model))
        optimizer = GWTAdamW(groups(model, kind, 2, "paper"))
        if what == "forgotten":
            backward(model, five_steps()[0])
            return _message(optimizer.step)
        if what == "gathered":
            with model.summon_full_params():
                return _message(lambda: gwt_dist.attach(optimizer, model))
        with _changed(what):
            return _message(lambda: gwt_dist.attach(optimizer, model))


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, LayoutError) as error:
        return str(error)
    return "no error"


@contextlib.contextmanager
def _changed(what: str) -> Iterator[None]:
    """Fairscale lays its shards out in another way, on the last rank alone."""
    real = adapter.read

    def read(model: Any) -> Any:
        buffers = real(model)
        if buffers is None or dist.get_rank() != dist.get_world_size() - 1:
            return buffers
        n = next(i for i, b in enumerate(buffers) if any(f.numel > 4 for f in b.fragments))
        fragments, weights = list(buffers[n].fragments), list(buffers[n].weights)
        k = next(i for i, f in enumerate(fragments) if f.numel > 4)
        if what == "offset":
            fragments[k] = replace(fragments[k], offset=fragments[k].offset + 1)
        elif what == "outside":  # of the chunk; nothing is there, and so it equals nothing
            fragments[k] = replace(fragments[k], offset=fragments[k].offset + buffers[n].parameter.numel())
            weights[k] = weights[k][:0]
        elif what == "other elements":
            fragments[k] = replace(fragments[k], start=fragments[k].start - 1, stop=fragments[k].stop - 1)
        elif what == "gap":
            fragments[k], weights[k] = replace(fragments[k], stop=fragments[k].stop - 1), weights[k][:-1]
        else:  # more padding than was thought
            weights[k] = weights[k][:-1]
        return [
            *buffers[:n],
            replace(buffers[n], fragments=tuple(fragments), weights=tuple(weights)),
            *buffers[n + 1 :],
        ]

    adapter.read = read
    try:
        yield
    finally:
        adapter.read = real

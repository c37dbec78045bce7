"""What the ranks of the FSDP1 tests run: the model of `zero_cases` in float64 under `FullyShardedDataParallel`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import gwt_dist
from fsdp2_cases import Counter, backward
from gwt_dist import GWTAdamW
from zero_cases import Net, gradients, initial, load, options, shapes_of


def unit_options(strategy: str, use_orig_params: bool) -> dict[str, Any]:
    """The arguments of `FullyShardedDataParallel`; HYBRID_SHARD has two replicas, or one on one rank."""
    options: dict[str, Any] = dict(
        sharding_strategy=ShardingStrategy[strategy], use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    if strategy == "HYBRID_SHARD":
        replicas = min(2, dist.get_world_size())
        sizes = replicas, dist.get_world_size() // replicas
        options["device_mesh"] = init_device_mesh("cpu", sizes, mesh_dim_names=("r", "s"))
    return options


def wrapped(strategy: str, use_orig_params: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with known weights, most of it in one unit, so that rank boundaries fall within its tensors."""
    model = Net().to(dtype)
    load(model, initial(shapes_of(model)))
    common = unit_options(strategy, use_orig_params)
    # A unit of its own for what is frozen: a flat parameter is trained as a whole or not at all.
    model.frozen = FullyShardedDataParallel(model.frozen, **common)
    model.attn_q = FullyShardedDataParallel(model.attn_q, **common)
    return FullyShardedDataParallel(model, **common)


def fsdp1_case(strategy: str, use_orig_params: bool, level: int, recipe: str) -> dict[str, Any]:
    """Five steps under FSDP1: how far the gathered weights are from one process, and the collectives of a step."""
    model = wrapped(strategy, use_orig_params)
    shapes = shapes_of(Net())
    optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], **options(level, recipe))
    gwt_dist.attach(optimizer, model)
    per_step = []
    for step in gradients(shapes, 5):
        optimizer.zero_grad()
        backward(model, step, "")
        with Counter() as counter:
            optimizer.step()
        per_step.append(counter.calls)
    expected, start = whole(level, recipe)
    error = 0.0
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, parameter in model.named_parameters():
            name = name.replace("_fsdp_wrapped_module.", "")
            if name in expected:
                change = (expected[name] - start[name]).abs().max()
                error = max(error, float((parameter.detach() - expected[name]).abs().max() / change))
    states = list(optimizer.state.values())
    return {
        "error": error,
        "collectives": per_step,
        "moments": sum(s["exp_avg"].numel() for s in states),
        "steps": sorted({float(s["step"]) for s in states}),
    }


@cache
def whole(level: int, recipe: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after five steps of one process, and before."""
    model = Net().double()
    start = {n: w.double() for n, w in initial(shapes_of(model)).items()}
    load(model, start)
    optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], **options(level, recipe))
    for step in gradients(shapes_of(model), 5):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = step[name].double()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, start


def refusal(call: Callable[[], object]) -> str:
    """The message of the `ValueError` that `call` raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def forgotten_attach_case(use_orig_params: bool) -> str:
    """The message of a step on an FSDP1 model that nobody attached."""
    model = wrapped("FULL_SHARD", use_orig_params)
    optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, recipe="paper", level=2)
    backward(model, next(gradients(shapes_of(Net()), 1)), "")
    return refusal(optimizer.step)


def shifted_case(use_orig_params: bool) -> str:
    """The message of `attach` when FSDP1's record of one rank's place is off by one."""
    model = wrapped("FULL_SHARD", use_orig_params)
    optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, recipe="paper", level=2)
    flat: Any = model._handle.flat_param
    infos = list(flat._shard_param_infos)
    number = next(i for i, info in enumerate(infos) if info.in_shard and info.numel_in_shard > 4)
    start = infos[number].intra_param_start_idx
    infos[number] = infos[number]._replace(intra_param_start_idx=start + 1)
    if dist.get_rank() == 0:
        flat._shard_param_infos = tuple(infos)
    return refusal(lambda: gwt_dist.attach(optimizer, model))


def unreduced_case(use_orig_params: bool) -> str:
    """The message of a step after a backward pass in `no_sync`."""
    model: Any = wrapped("FULL_SHARD", use_orig_params)
    optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, recipe="paper", level=2)
    gwt_dist.attach(optimizer, model)
    with model.no_sync():
        backward(model, next(gradients(shapes_of(Net()), 1)), "")
    return refusal(optimizer.step)


def apart_case(use_orig_params: bool) -> tuple[str, bool]:
    """The message of `attach` for replicas of one rank each, and whether their gradients differ."""
    model: Any = wrapped("HYBRID_SHARD", use_orig_params)
    optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, level=2, recipe="energy")
    message = refusal(lambda: gwt_dist.attach(optimizer, model))
    backward(model, next(gradients(shapes_of(Net()), 1)), "")
    size = model._handle.flat_param.grad.square().sum()
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    return message, len({float(one) for one in sizes}) > 1


def through_a_trainer_case() -> str:
    """What the integrations say of a model that a trainer wrapped in FSDP1."""
    from gwt_dist.integrations.engaged import engage

    model = FullyShardedDataParallel(Net(), **unit_options("FULL_SHARD", True))
    optimizer = GWTAdamW(model.parameters(), level=2, recipe="energy")
    try:
        return engage(optimizer, model, "FSDP")
    except ValueError as error:
        return str(error)

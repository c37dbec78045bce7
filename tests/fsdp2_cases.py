"""What the ranks of the FSDP2 tests run: the model of `zero_cases` in float64, under each layout that DTensors have."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gwt_dist import GWTAdamW, comm, param_groups
from zero_cases import Net, gradients, initial, load, options, shapes_of

TARGETS = ["attn", "mlp"]


class Counter:
    """Counts the collectives that the optimizer makes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self._real = comm.all_reduce

    def __enter__(self) -> Counter:
        def counted(buffer: Tensor, group: Any) -> None:
            self.calls.append((group.group_name, buffer.numel()))
            self._real(buffer, group)

        comm.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        comm.all_reduce = self._real


@cache
def reference(level: int, recipe: str, wavelet: str, steps: int, skipped: str) -> dict[str, Tensor]:
    """Weights of one process in float64; parameters whose name starts with `skipped` have no gradient."""
    model = Net().double()
    load(model, initial(shapes_of(model)))
    optimizer = GWTAdamW(param_groups(model, targets=TARGETS, **options(level, recipe, wavelet)))
    for step in gradients(shapes_of(model), steps):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not (skipped and name.startswith(skipped)):
                parameter.grad = step[name].double()
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of `whole`, by the public arithmetic of DTensor."""
    if not isinstance(parameter, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(whole.shape, parameter.device_mesh, parameter.placements)
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
    return whole


def local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def backward(model: nn.Module, step: dict[str, Tensor], skipped: str) -> None:
    """Gradients through FSDP's own reduce-scatter: rank 0 brings all of them, so that averaging gives them back."""
    factor = dist.get_world_size() if dist.get_rank() == 0 else 0
    nested: dict[str, dict[str, Tensor]] = {}
    for name, gradient in step.items():
        module, _, parameter = name.partition(".")
        if not (skipped and name.startswith(skipped)):
            nested.setdefault(module, {})[parameter] = gradient.double() * factor
    model(nested).backward()


def inject(model: nn.Module, step: dict[str, Tensor]) -> None:
    """Gradients put in place, for layouts whose forward pass needs another model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in step:
            gradient = part_of(step[name].to(parameter.dtype), parameter).clone()
            if isinstance(parameter, DTensor):
                gradient = DTensor.from_local(
                    gradient,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            parameter.grad = gradient


def _fully(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for child in model.children():
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _columns(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Every matrix cut between columns, wherever that falls in a unit."""
    sharded: dict[Tensor, nn.Parameter] = {}  # a tied weight stays one weight
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(1) if parameter.dim() > 1 else Replicate()
            if parameter not in sharded:
                columns = distribute_tensor(parameter.detach(), mesh, [placement])
                sharded[parameter] = nn.Parameter(columns, parameter.requires_grad)
            module.register_parameter(name, sharded[parameter])
    return model


def _tensor_parallel(model: nn.Module) -> nn.Module:
    """Rows of one matrix and columns of two and of stacked ones over one mesh axis, all under FSDP over the other."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    styles = {"attn_q": ColwiseParallel(), "mlp_down": RowwiseParallel(), "mlp_thin": RowwiseParallel()}
    plan = {n: styles[n.split(".")[-1]] for n, _ in model.named_modules() if n.split(".")[-1] in styles}
    parallelize_module(model, mesh["tp"], plan)
    for block in model.children():
        if hasattr(block, "attn_tied"):
            block.attn_tied.weight = block.attn_q.weight
        if hasattr(block, "experts"):
            columns = distribute_tensor(block.experts.weight.detach(), mesh["tp"], [Shard(2)])
            block.experts.weight = nn.Parameter(columns)
    return _fully(model, mesh["dp"])


def shard(model: nn.Module, kind: str) -> nn.Module:
    """The model under the layout called `kind`."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    if kind == "rows":
        return _fully(model, mesh)
    if kind == "hsdp":
        both = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        return _fully(model, both)
    if kind == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return _fully(model, mesh, mp_policy=policy)
    if kind == "offload":
        return _fully(model, mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    if kind == "columns":
        return _columns(model, mesh)
    assert kind == "tensor parallel"
    return _tensor_parallel(model)


def fsdp2_case(kind: str, level: int, recipe: str, wavelet: str = "haar", skipped: str = "") -> dict[str, Any]:
    """Five steps under a layout: how far this rank's part is from one process, and what it cost."""
    model = Net().double()
    start = {n: p.detach().clone() for n, p in model.named_parameters()} | initial(shapes_of(model))
    load(model, start)
    shapes = shapes_of(model)
    model = shard(model, kind)
    optimizer = GWTAdamW(param_groups(model, targets=TARGETS, **options(level, recipe, wavelet)))
    per_step = []
    for step in gradients(shapes, 5):
        optimizer.zero_grad()
        if kind in ("columns", "tensor parallel"):
            inject(model, step)
        else:
            backward(model, step, skipped)
        with Counter() as counter:
            optimizer.step()
        per_step.append(counter.calls)
    expected = reference(level, recipe, wavelet, 5, skipped)
    error = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            held = local(parameter).detach()
            change = (expected[name] - start[name]).abs().max()
            difference = (held - part_of(expected[name], parameter)).abs().max() if held.numel() else 0.0
            error = max(error, float(difference / change) if change else float(difference))
    assert any(isinstance(p, DTensor) for p in model.parameters())
    states = [optimizer.state[p]["exp_avg"] for p in model.parameters() if p in optimizer.state]
    try:
        refused = str(bool(optimizer.state_dict()) and "")
    except ValueError as failure:
        refused = str(failure)
    return {
        "error": error,
        "state_dict": refused,
        "collectives": per_step,
        "moments": sum(s.to_local().numel() if isinstance(s, DTensor) else s.numel() for s in states),
        "plain": sum(not isinstance(s, DTensor) for s in states),
        "unused": [n for n, p in model.named_parameters() if not optimizer.state.get(p)],
        "placements": sorted({str(p.placements) for p in model.parameters() if isinstance(p, DTensor)}),
    }


def alone_case(timeout: float) -> tuple[str, float]:
    """The last rank alone makes a mistake that raises within a step; what each rank raises, and after how long."""
    group = dist.new_group(timeout=timedelta(seconds=timeout))
    model: Any = fully_shard(Net().double(), mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], level=2, recipe="paper")
    for step in range(2):
        backward(model, next(gradients(shapes_of(Net()), 1)), "")
        if step and dist.get_rank() == dist.get_world_size() - 1:
            optimizer.param_groups[0]["level"] = 3
        began = time.monotonic()
        try:
            optimizer.step()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "no error", 0.0

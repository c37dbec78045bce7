"""What the ranks of `test_stacks.py` run: checkpoints of a model with stacks, its state under FSDP2."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import gwt_dist
from fsdp2_cases import local
from gwt_dist import GWTAdamW
from matrix_cases import FAMILIES, STEPS, fresh, groups_of, reference, steps_of

SAVED = STEPS - 1  # steps before the checkpoint


def far(found: dict[str, Tensor], part: Any, dtype: torch.dtype) -> float:
    """How far stacks are from one process after all steps, as a part of how far they have moved."""
    expected, start = reference("stacks", dtype, "none"), fresh("stacks", dtype).state_dict()
    errors = [
        float((found[name] - part(name, whole)).abs().max() / (whole - start[name]).abs().max())
        for name, whole in expected.items()
        if "experts" in name and found[name].numel()
    ]
    return max(errors, default=0.0)


def save_case(family: str, arguments: tuple[Any, ...], folder: str) -> float:
    """Steps, a checkpoint, the last step: how far from one process."""
    with FAMILIES[family]("stacks", *arguments) as built:
        for step in steps_of("stacks")[:SAVED]:
            built.take(step)
        gwt_dist.save(folder, built.model, built.optimizer, step=SAVED)
        built.take(steps_of("stacks")[-1])
        return far(built.weights(), built.part, torch.float32 if family == "deepspeed" else torch.float64)


def load_case(family: str, arguments: tuple[Any, ...], folder: str, dtype: torch.dtype) -> float:
    """The last step, from a checkpoint: how far from one process in the dtype that was saved."""
    with FAMILIES[family]("stacks", *arguments) as built:
        gwt_dist.load(folder, built.model, built.optimizer)
        built.take(steps_of("stacks")[-1])
        return far(built.weights(), built.part, dtype)


def own_case(family: str, arguments: tuple[Any, ...], folder: str) -> float:
    """Steps, what the engine itself saves, and the last step of another one that has loaded it: how far from one."""
    with FAMILIES[family]("stacks", *arguments) as built:
        for step in steps_of("stacks")[:SAVED]:
            built.take(step)
        if family == "deepspeed":
            built.model.save_checkpoint(folder)
        else:
            state, weights = built.optimizer.state_dict(), [p.detach().clone() for p in built.model.parameters()]
    with FAMILIES[family]("stacks", *arguments) as built:
        if family == "deepspeed":
            path, _ = built.model.load_checkpoint(folder)
            assert path is not None
        else:
            built.optimizer.load_state_dict(state)
            with torch.no_grad():
                for parameter, weight in zip(built.model.parameters(), weights, strict=True):
                    parameter.copy_(weight)
        built.take(steps_of("stacks")[-1])
        return far(built.weights(), built.part, torch.float32 if family == "deepspeed" else torch.float64)


def load_alone(folder: str, dtype: torch.dtype) -> float:
    """The same in this process."""
    model = fresh("stacks", dtype)
    optimizer = GWTAdamW(groups_of(model))
    gwt_dist.load(folder, model, optimizer)
    for name, parameter in model.named_parameters():
        parameter.grad = steps_of("stacks")[-1][name].to(dtype)
    optimizer.step()
    return far({n: p.detach() for n, p in model.named_parameters()}, lambda _, whole: whole, dtype)


def state_case(layout: str) -> dict[str, Any]:
    """State of stacks under a layout: what is not that of one process, what is a DTensor, and if torch takes it."""
    model = fresh("stacks")
    whole = GWTAdamW(groups_of(model))
    for step in steps_of("stacks"):
        for name, parameter in model.named_parameters():
            parameter.grad = step[name].double()
        whole.step()
    expected = {n: whole.state[p] for n, p in model.named_parameters() if "experts" in n}
    with FAMILIES["fsdp2"]("stacks", layout) as built:
        for step in steps_of("stacks"):
            built.take(step)
        wrong, placed, held = [], set(), 0
        for name, parameter in built.model.named_parameters():
            for field, value in built.optimizer.state[parameter].items() if "experts" in name else ():
                full = value.full_tensor() if isinstance(value, DTensor) else value
                held += local(value).numel() if isinstance(value, DTensor) else 0
                placed |= {field} if isinstance(value, DTensor) else set()
                same = full.shape == expected[name][field].shape
                if not same or not torch.allclose(full, expected[name][field], rtol=1e-9, atol=1e-12):
                    wrong.append((name, field, tuple(full.shape)))
        try:
            saved = built.optimizer.state_dict()
            built.optimizer.load_state_dict(saved)
            message = ""
        except ValueError as error:
            message = str(error)
        full = gwt_dist.full_state(built.model, built.optimizer, "came1.experts.weight")
        gathered = {
            field: torch.allclose(v, expected["came1.experts.weight"][field].to(v)) for field, v in full.items()
        }
    return {"wrong": wrong, "placed": sorted(placed), "message": message, "held": held, "gathered": gathered}


def refused_case() -> list[str]:
    """What is said of a stack whose matrices are cut: by `state_dict`, and by the optimizer to whom nobody said it."""
    mesh, messages = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for dim, stacked in ((1, True), (2, False)):
        parameter = torch.nn.Parameter(distribute_tensor(torch.ones(3, 4, 6), mesh, [Shard(dim)]))
        parameter.grad = distribute_tensor(torch.ones(3, 4, 6), mesh, [Shard(dim)])
        optimizer = GWTAdamW([parameter], recipe="came", level=1, stacked=stacked)
        try:
            optimizer.step()
            optimizer.state_dict()
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages

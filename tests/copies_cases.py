"""What the ranks of `test_copies.py` run: copies and pickles of optimizers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import gwt_dist
from fsdp1_cases import refusal, unit_options
from gwt_dist import GWTAdamW
from roads_cases import (
    AFTER,
    BEFORE,
    Engine,
    batch,
    expected_of,
    fsdp1,
    fsdp2,
    local_of,
    net,
    off,
    optimizer_of,
    through_torch,
    train,
)
from zero_cases import settings


class Named(GWTAdamW):
    """A subclass."""


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": lambda thing: through_torch(thing),
}


def copy_of_attached_case(folder: str, kind: str, how: str, steps: int) -> dict[str, str]:
    """What a copy of an attached optimizer says."""
    model: Any
    if kind.startswith("zero"):
        engine = Engine(int(kind[4]), kind.endswith("bf16"))
        engine.train(0, steps)
        model, optimizer = engine.engine, engine.optimizer
    else:
        model, optimizer = trained = fsdp1(kind == "fsdp1")
        train(trained, 0, steps)
    twin = COPIES[how](optimizer)
    parameters = [p for group in twin.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    weights = [p.detach().clone() for p in parameters]
    found = {
        "step": refusal(twin.step),
        "update": refusal(lambda: twin.update(parameters)),
        "load": refusal(lambda: twin.load_state_dict({"state": {}, "param_groups": []})),
        "save": refusal(lambda: gwt_dist.save(folder, model, twin, step=1)),
        "again": refusal(COPIES[how](twin).step),
    }
    assert all(torch.equal(a, b) for a, b in zip(weights, parameters, strict=True))
    if kind.startswith("zero"):
        engine.train(steps, steps + 1)  # the original goes on
        engine.engine.destroy()
    else:
        train(trained, steps, steps + 1)
    return found


def shallow_copy_case(stage: int, steps: int) -> tuple[str, float]:
    """A copy that shares parameters and state: what it says, and how far it goes astray once it is attached."""
    from zero_cases import masters

    engine = Engine(stage)
    engine.train(0, steps)
    twin = copy.copy(engine.optimizer)
    message = refusal(twin.step)
    engine.engine.optimizer.optimizer = twin
    gwt_dist.attach(twin, engine.engine)
    engine.train(steps, BEFORE + AFTER)
    error = off(list(masters(engine.module).values()), expected_of(BEFORE + AFTER))
    engine.engine.destroy()
    return message, error


def copy_before_attach_case(kind: str) -> str:
    """A copy that was made after the engine was built and before `attach`."""
    if kind.startswith("zero"):
        import deepspeed

        model = net()
        config = settings(int(kind[4]), False) | {"zero_allow_untested_optimizer": True}
        optimizer = optimizer_of(model)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        if kind == "zero3":
            engine.optimizer._set_fp32_optimizer_param_groups()
        twin = copy.deepcopy(optimizer)
        engine.destroy()
    else:
        wrapped = FullyShardedDataParallel(net(), **unit_options("FULL_SHARD", kind == "fsdp1"))
        twin = copy.deepcopy(optimizer_of(wrapped))
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    return refusal(twin.step)


def copy_of_fsdp2_case(how: str, steps: int) -> float:
    """Steps of a copy of an FSDP2 optimizer, with gradients of the original: largest difference of their weights."""
    model, optimizer = trained = fsdp2()
    train(trained, 0, steps)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else COPIES[how](optimizer)
    pairs = [
        (a, b)
        for mine, its in zip(optimizer.param_groups, twin.param_groups, strict=True)
        for a, b in zip(mine["params"], its["params"], strict=True)
    ]
    assert all(a is not b and isinstance(b, DTensor) for a, b in pairs)
    for number in range(steps, steps + AFTER):
        model(batch(number)).square().mean().backward()
        for a, b in pairs:
            b.grad = a.grad.clone()
        optimizer.step()
        twin.step()
        optimizer.zero_grad()
        twin.zero_grad()
    return max(float((local_of(a) - local_of(b)).abs().max()) for a, b in pairs if local_of(a).numel())

"""What the ranks of the tests of DDP, ZeroRedundancyOptimizer and fairscale's OSS run: engines under which every tensor
is whole on the rank that updates it.

The model of `zero_cases` in float64, with gradients that averaging over ranks gives back exactly.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gwt_dist
from fsdp2_cases import TARGETS, Counter
from gwt_dist import GWTAdamW, param_groups
from zero_cases import Net, gradients, initial, load, options, shapes_of

Weights = dict[str, Tensor]


@cache
def reference(level: int, recipe: str, steps: int, unused: str = "") -> tuple[Weights, dict[str, Any]]:
    """Weights and optimizer state of one process; parameters whose name starts with `unused` have no gradient."""
    model = fresh_model()
    optimizer = GWTAdamW(groups_of(model, level, recipe))
    for step in gradients(shapes_of(model), steps):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not (unused and name.startswith(unused)):
                parameter.grad = step[name].double()
        optimizer.step()
    return weights_of(model), optimizer.state_dict()


def fresh_model() -> Net:
    model = Net().double()
    load(model, initial(shapes_of(model)))
    return model


def groups_of(model: nn.Module, level: int, recipe: str) -> list[dict[str, Any]]:
    return param_groups(model, targets=TARGETS, **options(level, recipe))


def weights_of(model: nn.Module) -> Weights:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def error_of(model: nn.Module, expected: Weights) -> float:
    """Largest difference to the expected weights, relative to how far these have moved."""
    start = {n: w.double() for n, w in initial(shapes_of(model)).items()}
    moved = {n: float((expected[n] - start[n]).abs().max()) for n in expected}
    found = weights_of(model)
    return max(float((found[n] - expected[n]).abs().max()) / (moved[n] or 1.0) for n in expected)


class Engine:
    """A model and an optimizer under one way of data parallelism, and how its gradients are set to zero."""

    def __init__(self, kind: str, model: nn.Module, groups: Any, **ddp: Any) -> None:
        # Imported on the ranks alone: torch.distributed.optim and fairscale warn of deprecations as they are imported.
        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim import OSS
        from torch.distributed.optim import ZeroRedundancyOptimizer

        self.kind, self.module = kind, model
        self.optimizer: Any
        if kind.startswith("zro"):
            views = kind == "zro-views"
            self.optimizer = ZeroRedundancyOptimizer(groups, GWTAdamW, parameters_as_bucket_view=views)
        elif kind.startswith(("oss", "sdp")):
            self.optimizer = OSS(groups, optim=GWTAdamW)
        else:
            self.optimizer = GWTAdamW(groups)
        if kind.startswith("sdp"):
            size = {"reduce_buffer_size": 0} if kind == "sdp-no-buckets" else {}
            self.model: nn.Module = ShardedDataParallel(model, self.optimizer, **size)
        else:
            self.model = DistributedDataParallel(model, gradient_as_bucket_view=kind == "ddp-views", **ddp)
        if kind != "sdp-unguarded":
            gwt_dist.attach(self.optimizer, self.model)

    @property
    def inner(self) -> GWTAdamW:
        return self.optimizer if isinstance(self.optimizer, GWTAdamW) else self.optimizer.optim

    def zero_grad(self) -> None:
        if self.kind == "sdp-model-zero-grad":
            self.model.zero_grad()
        elif self.kind == "sdp-set-to-zero":
            self.optimizer.zero_grad(set_to_none=False)
        else:
            self.optimizer.zero_grad()

    def backward(self, step: Weights, unused: str = "", share: float = 1.0) -> None:
        """Rank 0 brings all of the gradients, or a share of them, so that averaging gives them back."""
        factor = share * dist.get_world_size() if dist.get_rank() == 0 else 0.0
        nested: dict[str, Weights] = {}
        for name, gradient in step.items():
            module, _, parameter = name.partition(".")
            if not (unused and name.startswith(unused)):
                nested.setdefault(module, {})[parameter] = gradient.double() * factor
        self.model(nested).backward()

    def train(self, steps: list[Weights], unused: str = "") -> list[Any]:
        """The collectives that the optimizer made."""
        with Counter() as counter:
            for step in steps:
                self.zero_grad()
                self.backward(step, unused)
                self.optimizer.step()
        return counter.calls


def built(kind: str, level: int, recipe: str, **ddp: Any) -> Engine:
    model = fresh_model()
    return Engine(kind, model, groups_of(model, level, recipe), **ddp)


def five_steps() -> list[Weights]:
    return list(gradients(shapes_of(Net()), 5))


def parity_case(kind: str, level: int, recipe: str) -> dict[str, Any]:
    """Five steps; how far every weight is from one process, on this rank, and what this rank keeps."""
    engine = built(kind, level, recipe)
    calls = engine.train(five_steps())
    states = engine.inner.state.values()
    return {
        "error": error_of(engine.module, reference(level, recipe, 5)[0]),
        "collectives": calls,
        "moments": sum(s["exp_avg"].numel() for s in states),
    }


def unused_case(kind: str, everywhere: bool) -> dict[str, Any]:
    """A parameter that the forward pass does not use, on any rank or on all but rank 0."""
    engine = built(kind, 2, "paper", find_unused_parameters=True)
    engine.train(five_steps(), "mlp_row" if everywhere or dist.get_rank() else "")
    return {
        "error": error_of(engine.module, reference(2, "paper", 5, "mlp_row" if everywhere else "")[0]),
        "stays": torch.equal(engine.module.mlp_row.weight, fresh_model().mlp_row.weight),
        "without state": [n for n, p in engine.module.named_parameters() if not engine.inner.state.get(p)],
    }


def accumulation_case(kind: str) -> dict[str, Any]:
    """A quarter of each gradient without synchronisation, and then the rest of it."""
    engine = built(kind, 2, "paper")
    for step in five_steps():
        engine.zero_grad()
        with engine.model.no_sync():
            engine.backward(step, share=0.25)
        engine.backward(step, share=0.75)
        engine.optimizer.step()
    return {"error": error_of(engine.module, reference(2, "paper", 5)[0])}


def save_case(kind: str, level: int, recipe: str, folder: str) -> dict[str, float]:
    """Two steps, and the whole state on rank 0: how far it is from that of one process."""
    engine = built(kind, level, recipe)
    engine.train(five_steps()[:2])
    if kind != "ddp":
        engine.optimizer.consolidate_state_dict(0)
    if dist.get_rank() != 0:
        return {}
    found, expected = engine.optimizer.state_dict(), reference(level, recipe, 2)[1]
    torch.save({"optimizer": found, "model": engine.module.state_dict()}, Path(folder, kind))
    assert found["state"].keys() == expected["state"].keys()
    assert [g["params"] for g in found["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    errors: dict[str, float] = {}
    for key, values in expected["state"].items():
        assert found["state"][key].keys() == values.keys()
        for name, value in values.items():
            assert found["state"][key][name].shape == value.shape
            difference = float((found["state"][key][name] - value).abs().max() / value.abs().max())
            errors[name] = max(errors.get(name, 0.0), difference)
    return errors


def load_case(saved: str, kind: str, level: int, recipe: str, folder: str) -> dict[str, Any]:
    """Three more steps, on other ranks than those that saved."""
    checkpoint = torch.load(Path(folder, saved), weights_only=True)
    model = fresh_model()
    model.load_state_dict(checkpoint["model"])
    engine = Engine(kind, model, groups_of(model, level, recipe))
    # Both sharded optimizers empty the entries of other ranks in what they are given.
    given = copy.deepcopy(checkpoint["optimizer"])
    engine.optimizer.load_state_dict(given)
    engine.train(five_steps()[2:])
    return {
        "error": error_of(model, reference(level, recipe, 5)[0]),
        "emptied": [key for key, values in given["state"].items() if not values],
        "kept": [key for key, values in checkpoint["optimizer"]["state"].items() if values],
        "moments": sum(s["exp_avg"].numel() for s in engine.inner.state.values()),
    }


def guarded_case(kind: str) -> dict[str, Any]:
    """The loop that everyone writes, with the default buckets of ShardedDataParallel: zero_grad leaves None behind."""
    engine = built(kind, 2, "paper")
    taken, message = 0, "no error"
    try:
        for step in five_steps():
            engine.train([step])
            taken += 1
    except ValueError as error:
        message = str(error)
    return {
        "taken": taken,
        "message": message,
        "error": error_of(engine.module, reference(2, "paper", taken)[0]),
    }


def overlap_case() -> str:
    """The message of ZeroRedundancyOptimizer when it is to step within the backward pass of DDP."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    try:
        ZeroRedundancyOptimizer(list(fresh_model().parameters()), GWTAdamW, overlap_with_ddp=True)
    except ValueError as error:
        return str(error)
    return "no error"

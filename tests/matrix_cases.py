"""What the ranks of `test_matrix.py` run: one model that has every shape, under each engine.

It has a block for each level and recipe, and the optimizer a group for each block, so that one engine on one number of
ranks covers all of them at once.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import fairscale_cases
import fsdp1_cases
import fsdp2_cases
import whole_tensor_cases
import zero_engine_cases
from gwt_dist import GWTAdamW, attach, initialize
from gwt_dist.kernels.choice import VARIABLE
from zero_cases import Dot, Experts, Scale, gradients, load, options, shapes_of
from zero_engine_cases import Recorder, initial

Weights = dict[str, Tensor]
STEPS = 3
COMBINATIONS = [
    *((level, recipe) for level in (1, 2, 3) for recipe in ("paper", "energy")),
    *((2, recipe) for recipe in ("orthogonal", "normuon", "foam", "critical", "came", "adalomo")),
    *((0, recipe) for recipe in ("adafactor", "galore", "fira")),
]
# Blocks of each kind of model, and what a block's name says beside a recipe.
BLOCKS = {"shapes": COMBINATIONS, "vectors": [(2, "paper")]}
# For traffic: groups whose matrices have one program, with numbers of rows and without, in both dtypes of products.
BLOCKS["travelling"] = [*COMBINATIONS, (1, "orthogonal"), *((level, "bf16") for level in (1, 3))]
# For checkpoints of stacks: state of every extent, norms of a limiter and priorities among it.
BLOCKS["stacks"] = [(2, "paper"), (1, "normuon"), (2, "critical"), (1, "came"), (0, "fira")]
# State in every format, of fp32 weights or masters, and of bf16 weights that are rounded by chance.
FORMATTED = [(1, "energy8"), (2, "energy16"), (2, "foam8"), (1, "muon8"), (2, "muon16")]
BLOCKS |= {"formats": FORMATTED, "rounded": [(level, f"rounded {name}") for level, name in FORMATTED]}
DTYPES = {"formats": torch.float32, "rounded": torch.bfloat16}  # of weights; fp64, or fp32 under DeepSpeed, in others
NAMED: dict[str, dict[str, Any]] = {"normuon": {"recipe": "orthogonal", "nor": 0.95}}
NAMED["adafactor"] = {"recipe": "factored", "least_level": 0}
NAMED["galore"] = {"recipe": "low-rank", "rank": 3, "update_proj_gap": 2, "refresh_offset": 1}
NAMED["fira"] = {"recipe": "low-rank", "rank": 4, "residual": True, "proj_type": "full", "randomized": True}
NAMED["critical"] = {"recipe": "energy", "critical": 2}
NAMED["bf16"] = {**NAMED["normuon"], "products": "bf16"}
NAMED |= {
    "energy8": {"recipe": "energy", "state_dtype": "int8"},
    "energy16": {"recipe": "energy", "state_dtype": "bf16", "rounding_seed": 7},
    "foam8": {"recipe": "foam", "state_dtype": "int8"},
    "muon8": {"recipe": "orthogonal", "state_dtype": "int8", "nor": 0.95, "products": "fp32"},
    "muon16": {"recipe": "orthogonal", "state_dtype": "bf16", "nesterov": True, "products": "fp32"},
}
NAMED |= {f"rounded {name}": {**NAMED[name], "stochastic_rounding": True} for _, name in FORMATTED}


class Shapes(nn.Module):
    """Every shape: units that end at no boundary, rows and elements fewer than ranks, tied, 1-D, frozen, unused.

    And a stack of an odd number of matrices; its group says so, which is nothing to the other tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attn_q = Dot(66, 97)
        self.mlp_down = Dot(16, 683, bias=True)  # odd, as the 16 x 5461 of the field's 1B LLaMA is
        self.norm = Scale(11)
        self.mlp_row = Dot(1, 29)
        self.mlp_thin = Dot(2, 3)
        self.mlp_tiny = Dot(1, 2)
        self.mlp_one = Dot(1, 1)
        self.experts = Experts(3, 6, 11)
        self.attn_tied = Dot(66, 97)
        self.attn_tied.weight = self.attn_q.weight
        self.unused = Dot(7, 9)
        self.frozen = Dot(5, 5)
        self.frozen.requires_grad_(False)

    def forward(self, gradients: dict[str, Weights]) -> Tensor:
        # Half of the gradient comes through each name; halves of eighths are exact.
        half = {"weight": gradients["attn_q"]["weight"] / 2}
        gradients = {**gradients, "attn_q": half, "attn_tied": half}
        return sum((getattr(self, name)(g) for name, g in gradients.items()), torch.zeros(()))


class Vectors(nn.Module):
    """1-D tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Scale(11)
        self.mlp_scale = Scale(3)

    def forward(self, gradients: dict[str, Weights]) -> Tensor:
        return sum((getattr(self, name)(g) for name, g in gradients.items()), torch.zeros(()))


class Cells(Vectors):
    """What cells of 64 coefficients make of shapes: several in a row, fewer than one, fewer elements than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_q = Dot(66, 97)
        self.mlp_down = Dot(16, 683, bias=True)
        self.norm = Scale(131)
        self.experts = Experts(3, 2, 150)
        self.mlp_tiny = Dot(1, 2)


class Stacks(Vectors):
    """A stack of matrices beside a matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_q = Dot(6, 9)
        self.experts = Experts(3, 6, 11)


class Model(nn.Module):
    """A block for each level and recipe."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        block = {"vectors": Vectors, "formats": Cells, "rounded": Cells, "stacks": Stacks}.get(kind, Shapes)
        for level, recipe in BLOCKS[kind]:
            self.add_module(f"{recipe}{level}", block())

    def forward(self, gradients: dict[str, dict[str, Weights]]) -> Tensor:
        return sum((getattr(self, name)(g) for name, g in gradients.items()), torch.zeros(()))


def fresh(kind: str, dtype: torch.dtype | None = None) -> Model:
    """The model with its known weights, in the dtype of the kind if no other is said."""
    model = Model(kind).to(dtype or DTYPES.get(kind, torch.float64))
    load(model, initial(shapes_of(model)))
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """A group for each block, whatever wrappers its parameters are in."""
    groups: dict[str, dict[str, Any]] = {}
    names = {f"{recipe}{level}" for blocks in BLOCKS.values() for level, recipe in blocks}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = next(part for part in name.split(".") if part in names)
            keys = {**options(int(block[-1]), block[:-1]), **NAMED.get(block[:-1], {})}
            group = groups.setdefault(block, {"params": [], "stacked": True, **keys})
            group["params"].append(parameter)
    return list(groups.values())


def steps_of(kind: str) -> list[Weights]:
    """The gradients of each step, of what the forward pass uses."""
    shapes = shapes_of(Model(kind))
    return [{n: g for n, g in step.items() if "unused" not in n} for step in gradients(shapes, STEPS)]


@cache
def reference(kind: str, dtype: torch.dtype, unused: str) -> Weights:
    """The weights of one process; what the forward pass does not use has no gradient, or one of zeros."""
    model = fresh(kind, dtype)
    optimizer = GWTAdamW(groups_of(model))
    for step in steps_of(kind):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (name in step or unused == "zeros"):
                parameter.grad = step[name].to(dtype) if name in step else torch.zeros_like(parameter)
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def nested(step: Weights, dtype: torch.dtype) -> dict[str, dict[str, Weights]]:
    """The input of the forward pass that gives these gradients once they are averaged: rank 0 brings all of them."""
    factor = dist.get_world_size() if dist.get_rank() == 0 else 0
    found: dict[str, dict[str, Weights]] = {}
    for name, gradient in step.items():
        block, module, parameter = name.split(".")
        found.setdefault(block, {}).setdefault(module, {})[parameter] = gradient.to(dtype) * factor
    return found


@dataclass
class Built:
    """A model under an engine: how it takes a step, and its whole weights, or the part of expected ones it holds."""

    optimizer: GWTAdamW
    take: Callable[[Weights], None]
    weights: Callable[[], Weights]
    part: Callable[[str, Tensor], Tensor] = lambda _, whole: whole
    stale: Callable[[Weights], float] = lambda _: 0.0  # what the model computes with, against `weights`
    model: Any = None  # as it is wrapped, or the DeepSpeed engine


@contextlib.contextmanager
def deepspeed(kind: str, config: dict[str, Any], zero_init: bool = False) -> Iterator[Built]:
    """A DeepSpeed JSON."""
    from deepspeed import zero

    config = copy.deepcopy(config)
    model: Any = fresh(kind, torch.float32)
    if zero_init:
        known = {n: p.detach().clone() for n, p in model.named_parameters()}
        with zero.Init(config_dict_or_path=config):
            model = Model(kind)
        for name, parameter in model.named_parameters():
            with zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    parameter.data.copy_(known[name])
    engine: Any = initialize(model=model, optimizer=GWTAdamW(groups_of(model)), config=config)[0]

    def take(step: Weights) -> None:
        engine.backward(engine(nested(step, next(model.parameters()).dtype)))
        engine.step()

    def weights() -> Weights:
        return zero_engine_cases.masters(engine, model)

    yield Built(
        engine.basic_optimizer, take, weights, stale=lambda found: zero_engine_cases.stale(model, found), model=engine
    )
    engine.destroy()


@contextlib.contextmanager
def fsdp2(kind: str, layout: str) -> Iterator[Built]:
    """A layout of `fsdp2_cases`."""
    model = fsdp2_cases.shard(fresh(kind), layout)
    optimizer, dtype = GWTAdamW(groups_of(model)), next(model.parameters()).dtype

    def take(step: Weights) -> None:
        optimizer.zero_grad()
        if layout in ("columns", "tensor parallel"):
            fsdp2_cases.inject(model, step)
        else:
            model(nested(step, dtype)).backward()
        optimizer.step()

    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    yield Built(
        optimizer,
        take,
        lambda: {n: fsdp2_cases.local(p).detach() for n, p in named.items()},
        lambda name, whole: fsdp2_cases.part_of(whole, named[name]),
        model=model,
    )


def taking(model: nn.Module, optimizer: GWTAdamW) -> Callable[[Weights], None]:
    """A step through a backward pass whose gradients are those that it is given."""

    def take(step: Weights) -> None:
        optimizer.zero_grad()
        model(nested(step, dtype)).backward()
        optimizer.step()

    dtype = next(model.parameters()).dtype
    return take


@contextlib.contextmanager
def fsdp1(kind: str, strategy: str, use_orig_params: bool) -> Iterator[Built]:
    """A sharding strategy; blocks are units, and within them what is wide or frozen."""
    options = fsdp1_cases.unit_options(strategy, use_orig_params)
    model: Any = fresh(kind)
    for name, block in model.named_children():
        for inner in {"mlp_down", "frozen"} & {n for n, _ in block.named_children()}:
            setattr(block, inner, FullyShardedDataParallel(getattr(block, inner), **options))
        setattr(model, name, FullyShardedDataParallel(block, **options))
    model = FullyShardedDataParallel(model, **options)
    optimizer = GWTAdamW(groups_of(model))
    attach(optimizer, model)

    def weights() -> Weights:
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {
                n.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for n, p in model.named_parameters()
                if p.requires_grad
            }

    yield Built(optimizer, taking(model, optimizer), weights, model=model)


@contextlib.contextmanager
def fairscale(kind: str, flattening: str) -> Iterator[Built]:
    """Fairscale's FullyShardedDataParallel, lent CUDA streams."""
    with fairscale_cases.streams_on_cpu() as wrap:
        options = {"compute_device": torch.device("cpu"), "flatten_parameters": flattening != "tensors"}
        model: Any = fresh(kind, torch.float32)  # fairscale takes no other to begin with
        for name, block in model.named_children():
            if hasattr(block, "frozen"):
                del block.frozen  # summon_full_params fails beside a frozen one
            if flattening == "modules":
                for inner, child in list(block.named_children()):
                    # In one unit: tensors that are tied, and what does not run, which fairscale cannot have alone.
                    if inner not in ("attn_q", "attn_tied", "unused"):
                        setattr(block, inner, wrap(child, **options))
            setattr(model, name, wrap(block, **options))
        model = wrap(model, **options).to(DTYPES.get(kind, torch.float64))
        optimizer = GWTAdamW(groups_of(model))
        attach(optimizer, model)

        def weights() -> Weights:
            with model.summon_full_params():
                return {n: p.detach().clone() for n, p in model.named_parameters()}

        yield Built(optimizer, taking(model, optimizer), weights, model=model)


@contextlib.contextmanager
def whole(kind: str, engine_kind: str) -> Iterator[Built]:
    """An engine of `whole_tensor_cases`."""
    model = fresh(kind)
    ddp = {"find_unused_parameters": True} if hasattr(next(model.children()), "unused") else {}
    engine = whole_tensor_cases.Engine(engine_kind, model, groups_of(model), **ddp)

    def take(step: Weights) -> None:
        engine.zero_grad()
        engine.model(nested(step, dtype)).backward()
        engine.optimizer.step()

    dtype = next(model.parameters()).dtype

    yield Built(engine.inner, take, lambda: whole_tensor_cases.weights_of(model), model=model)


FAMILIES = {"deepspeed": deepspeed, "fsdp2": fsdp2, "fsdp1": fsdp1, "fairscale": fairscale, "whole": whole}


def matrix_case(family: str, arguments: tuple[Any, ...], kind: str, unused: str) -> dict[str, Any]:
    """A few steps of a model under an engine: by block and tensor, how far from one process it is; the collectives."""
    # Kernels that round weights are builds of their own, half a minute of a compiler each, and have tests of their own.
    with patch.dict(os.environ, {VARIABLE: "eager"} if kind == "rounded" else {}):
        return _stepped(family, arguments, kind, unused)


def _stepped(family: str, arguments: tuple[Any, ...], kind: str, unused: str) -> dict[str, Any]:
    dtype = torch.float32 if family == "deepspeed" else DTYPES.get(kind, torch.float64)
    expected, start = reference(kind, dtype, unused), initial(shapes_of(Model(kind)))
    with FAMILIES[family](kind, *arguments) as built, Recorder() as recorder:
        collectives = recorder.watch(built.optimizer)
        for step in steps_of(kind):
            built.take(step)
        found = built.weights()
        stale = built.stale(found)
        assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
        errors = {}
        for name, tensor in found.items():
            change = float((expected[name] - start[name]).abs().max())
            difference = (tensor - built.part(name, expected[name])).abs()
            errors[name] = float(difference.max()) / (change or 1.0) if tensor.numel() else 0.0
        return {
            "errors": errors,
            "stale": stale,
            "collectives": [len(calls) for calls in collectives],
            "groups": [max((names.count(n) for n in names), default=0) for names in map(_names, collectives)],
        }


def _names(calls: list[tuple[str, int]]) -> list[str]:
    return [name for name, _ in calls]


def rerun_case(family: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Whether the same run twice gives the same bits of weights and state, and how many cut units it completes."""
    runs, cut = [], 0
    for _ in range(2):
        with FAMILIES[family]("shapes", *arguments) as built:
            for step in steps_of("shapes"):
                built.take(step)
            state = built.optimizer.state
            tensors = list(built.weights().values())
            tensors += [fsdp2_cases.local(t).clone() for values in state.values() for t in values.values()]
            cut = sum(len(plan.exchange.receives) for plan in built.optimizer._steps.plans.values())
        runs.append(tensors)
    return {"same": zero_engine_cases.same_bits(*runs), "cut": cut}

"""What this rank holds of a run: buffers with fragments of named tensors, of weights, masters and state alike."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gwt_dist import dtensor, extents
from gwt_dist.checkpoint.dtypes import safetensors_dtype
from gwt_dist.checkpoint.elements import flat
from gwt_dist.checkpoint.format import WEIGHT, CheckpointError
from gwt_dist.declare import Extent, Field
from gwt_dist.engines.attach import find_optimizer, unwrapped
from gwt_dist.engines.weights import Local, Weights, clean, read_weights
from gwt_dist.layout import Fragment
from gwt_dist.optimizer import GWTAdamW
from gwt_dist.plan import Plan
from gwt_dist.stacks import together
from gwt_dist.steps import Group
from gwt_dist.units import level_of

Numbers = dict[str, float | list[float]]  # by field: of a tensor, or of each matrix of a stack
MASTER = "master weight"  # a weight in the precision of the optimizer; stored as the weight


@dataclass(frozen=True, slots=True)
class Holding:
    """Elements of a stored tensor in a buffer of this rank, as `flat` returned it, counted in row-major order."""

    kind: str  # WEIGHT, MASTER, or the name of a field of state
    fragment: Fragment  # in the index space of the stored tensor, at its offset in `buffer`
    owned: Fragment  # the part that this rank may write; the rest another rank writes
    buffer: Tensor
    common: bool = False  # rank 0's counts


@dataclass(frozen=True, slots=True)
class Stepped:
    """An optimizer parameter: its plan, the number of its group, and the tensors that it stands for, in order.

    Each is one of the plan's; those that are matrices of one stack have its name, under which all of them are stored.
    """

    parameter: Tensor
    group: int
    plan: Plan
    names: tuple[str, ...]

    @property
    def held(self) -> list[tuple[int, str]]:
        """Place and name of the tensors of which this rank holds any element."""
        held = {self.stored(piece.fragment.fqn)[0] for piece in self.plan.pieces if piece.fragment.numel}
        return [(i, name) for i, name in enumerate(self.names) if name in held]

    def stored(self, fqn: str) -> tuple[str, int, int]:
        """Of a tensor of the plan: the name under which it is stored, its place there, and how many there are."""
        source, place, number = self.plan.shard.source(fqn)
        return clean(source) if self.plan.shard.local_shape is None else self.names[0], place, number

    @property
    def frozen(self) -> set[str]:
        """Names of the tensors that are in a buffer with others, and are not trained now."""
        return {
            name for name, owner in zip(self.names, self.plan.shard.owners, strict=False) if not owner.requires_grad
        }

    def fields(self, place: int) -> tuple[Field, ...]:
        """What the state of the tensor at `place` is made of."""
        return self.plan.form.fields(self.plan.shard.tensors[place].shape)

    def numbers(self, state: Mapping[str, Tensor]) -> dict[str, Numbers]:
        """By name, the fields that are one number a tensor: of a stack, those of its matrices."""
        names = [f.name for f in self.plan.fields if f.extent is Extent.TENSOR]
        values = {name: state[name].reshape(-1).tolist() for name in names}
        found: dict[str, Numbers] = {name: {} for name in self.names}
        for i, (name, tensor) in enumerate(zip(self.names, self.plan.shard.tensors, strict=True)):
            for field in (f.name for f in self.fields(i) if f.name in values):
                if tensor.fqn in self.plan.shard.stacks:
                    its = found[name].setdefault(field, [])
                    assert isinstance(its, list)
                    its.append(values[field][i])
                else:
                    found[name][field] = values[field][i]
        return found


@dataclass(frozen=True, slots=True)
class Traits:
    """What is said about a tensor that an optimizer steps, the same on all ranks."""

    group: int
    level: int
    wavelet: str
    recipe: str
    fields: tuple[Field, ...]
    is_taken: bool  # by the recipe's own program


class Run:
    """A model or engine and its optimizer on this rank.

    Raises:
        ValueError: If a layout cannot be read, or the optimizer holds parameters that are not the model's.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model = model
        self.optimizer: GWTAdamW = find_optimizer(optimizer)
        self.optimizer.refuse_copy()  # whose parameters are no model's, and it says more of them
        # ZeroRedundancyOptimizer and OSS have groups of their own, which schedules set and each step passes on.
        self.groups: list[list[Group]] = [w.param_groups for w in unwrapped(optimizer) if hasattr(w, "param_groups")]
        self.weights: Weights = weights_of(model, optimizer)
        self.stepped: list[Stepped] = list(self._stepped())

    def _stepped(self) -> Iterator[Stepped]:
        """The optimizer's parameters, in the order of the groups, and then those that the engine took out of them."""
        groups = self.optimizer.param_groups
        numbers = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        parameters = [p for group in groups for p in group["params"]]
        hidden = [p for p in self.optimizer.shards.keys() if id(p) not in numbers]
        for parameter in [*parameters, *hidden]:
            number = numbers.get(id(parameter), self.weights.group_of.get(id(parameter)))
            if number is None and id(parameter) in self.weights.flat:
                continue  # a frozen unit of FSDP1
            if number is None:
                raise CheckpointError(
                    "the optimizer has the layout of a flat parameter that is in none of its groups; pass the engine "
                    "and the optimizer that it was built with"
                )
            where = f"parameter of shape {tuple(parameter.shape)} in group {number}"
            plan = self.optimizer.plan_of(parameter, number)
            if plan is None:
                raise CheckpointError(f"a {where} of the optimizer was never given to it")
            if parameter in self.optimizer.shards:
                names = tuple(clean(plan.shard.source(tensor.fqn)[0]) for tensor in plan.shard.tensors)
            elif id(parameter) in self.weights.names:
                names = (self.weights.names[id(parameter)],) * len(plan.shard.tensors)
            else:
                raise CheckpointError(
                    f"a {where} of the optimizer is none of the model's as it is now: pass the model that this "
                    f"optimizer was built for, as it is wrapped"
                )
            yield Stepped(parameter, number, plan, names)

    def traits(self) -> dict[str, Traits]:
        """By name, of all tensors that the optimizer steps, those of which this rank has no element included."""
        found = {}
        for one in self.stepped:
            group = self.optimizer.param_groups[one.group]
            for i, (name, tensor) in enumerate(zip(one.names, one.plan.shard.tensors, strict=True)):
                level = level_of(tensor.shape, group["level"])
                found[name] = Traits(
                    one.group,
                    level,
                    group["wavelet"],
                    group["recipe"],
                    one.fields(i),
                    one.plan.form.takes(tensor.shape),
                )
        return found

    def state_holdings(self, one: Stepped, state: Mapping[str, Tensor]) -> Iterator[Holding]:
        """The state of an optimizer parameter, without its step and the fields that are one number a tensor."""
        for field in one.plan.fields:
            if field.extent is Extent.TENSOR:
                continue
            buffer = flat(dtensor.local(state[field.name]))
            for piece in one.plan.pieces:
                if field.name in piece.places:
                    where = one.stored(piece.fragment.fqn)
                    kept = together(piece.places[field.name], *where)
                    owned = together(extents.owned(field.extent, piece.fragment, piece.units), *where)
                    yield Holding(field.name, kept, owned, buffer)
            for fqn, its in one.plan.owned.items():
                if field.name in its:
                    kept = together(its[field.name], *one.stored(fqn))
                    yield Holding(field.name, kept, replace(kept, offset=0), buffer)

    def holdings(self, leave: Container[str] = ()) -> list[Holding]:
        """Everything that this rank could write, without the weights of these names."""
        found = list(weight_holdings(self.weights.model, WEIGHT, leave))
        found += weight_holdings(self.weights.masters, MASTER, leave)
        for one in self.stepped:
            if self.optimizer.state.get(one.parameter):
                found += self.state_holdings(one, self.optimizer.state[one.parameter])
        return found


def weights_of(model: Any, optimizer: Any) -> Weights:
    """The weights of a model or engine, whatever its optimizer is; `optimizer` may be None.

    Raises `ValueError` for a layout that cannot be read, and masters that cannot be found.
    """
    engine_optimizers = unwrapped(model) if "basic_optimizer" in vars(model) else ()
    return read_weights(model, [*unwrapped(optimizer), *engine_optimizers])


def weight_holdings(locals_: Iterable[Local], kind: str, leave: Container[str] = ()) -> Iterator[Holding]:
    """Weights of a model, or masters, without those of these names.

    Raises `ValueError` for tensors that checkpoints do not hold.
    """
    for local in locals_:
        wanted = [fragment for fragment in local.fragments if fragment.fqn not in leave]
        for fragment in wanted:
            _check_storable(local.buffer, fragment.fqn)  # before anything else is asked of it
            buffer = flat(local.buffer)
            if fragment.offset + fragment.numel > buffer.numel():
                raise CheckpointError(
                    f"the part of {fragment.fqn!r} that this rank holds is not where it was: call this outside of "
                    f"the forward and backward pass, and of contexts that gather the weights"
                )
            yield Holding(kind, fragment, fragment, buffer, local.common)


def _check_storable(tensor: Tensor, name: str) -> None:
    what = ""
    if tensor.layout != torch.strided:
        what = f"is of layout {str(tensor.layout).removeprefix('torch.')} and not dense"
    elif tensor.is_meta:
        what = "is on the meta device and has no elements"
    elif tensor.is_nested or hasattr(type(tensor), "__tensor_flatten__"):
        what = f"is a {type(tensor).__name__}, which is made of other tensors"
    if what:
        raise CheckpointError(
            f"{name!r} {what}, which checkpoints do not hold. Make it a plain tensor with memory, or leave it out "
            f"of the save with exclude="
        )
    safetensors_dtype(tensor.dtype, name)

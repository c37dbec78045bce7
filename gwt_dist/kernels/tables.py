"""Addresses and numbers of the tensors of one step, in the tables on a device that the Triton kernels read.

A table goes to the device when what it says has changed: where a tensor lies, its dtype, a number of a rule. What a
tensor is beside that is asked when it has moved. Learning rates that are tensors on the device are read there.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from gwt_dist.declare import Rule
from gwt_dist.formats import scale_of
from gwt_dist.kernels import guard
from gwt_dist.kernels.kept import Kept
from gwt_dist.kernels.work import Tensors, Work
from gwt_dist.piece import stored_dtype

_MOMENTS = "exp_avg", "exp_avg_sq"
_FLOATS, _WIDE = (torch.float32, torch.bfloat16), (torch.float32,)
_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")


class Rules(NamedTuple):
    """The rules that differ."""

    table: Tensor  # [rules, numbers] fp64
    which: list[int]  # of each parameter


class Kinds(NamedTuple):
    """What a kernel is compiled for, of each parameter."""

    weights: list[torch.dtype]
    gradients: list[torch.dtype]
    aligned: list[bool]  # weight, gradient and both moments to 16 bytes


def rules_of(tensors: Tensors, kept: Kept) -> Rules:
    """The rules of the parameters."""
    return tensors.once("rules", lambda: _rules(tensors.rules, kept))


def _rules(rules: Sequence[Rule], kept: Kept) -> Rules:
    distinct = {id(rule): rule for rule in rules}
    numbers = {key: i for i, key in enumerate(distinct)}
    rows = tuple(row(rule, kept.device) for rule in distinct.values())
    table: Tensor = kept.get("rules", rows, lambda: kept.upload(rows, torch.float64))
    for i, rule in enumerate(distinct.values()):
        if _on_device(rule.lr, kept.device):
            table[i, :1].copy_(rule.lr.view(-1))
    return Rules(table, [numbers[key] for key in map(id, rules)])


def row(rule: Rule, device: torch.device) -> tuple[float, ...]:
    """The numbers of a rule, in the order of the kernels."""
    from gwt_dist.kernels.triton_kernels import NUMBERS

    lr = 0.0 if _on_device(rule.lr, device) else float(rule.lr)
    return lr, *(float(rule[name]) for name in NUMBERS[1:])


def _on_device(lr: float | Tensor, device: torch.device) -> TypeGuard[Tensor]:
    """Whether a learning rate must not be read here: it would be to wait for the GPU."""
    return isinstance(lr, Tensor) and lr.device.type == device.type


def parameters_of(work: Work, tensors: Tensors, kept: Kept) -> tuple[Tensor, Kinds]:
    """Where weight, gradient, both moments, step and scales of each parameter lie and which rule it has.

    ``[parameters, 8]`` int64. Raises `ValueError` for a tensor that has moved and that the kernels cannot take.
    """
    return tensors.once("parameters", lambda: _parameters(work, tensors, kept))


def _parameters(work: Work, tensors: Tensors, kept: Kept) -> tuple[Tensor, Kinds]:
    which, state = rules_of(tensors, kept).which, tensors.state
    weights, gradients = list(map(_DTYPE, tensors.weights)), list(map(_DTYPE, tensors.gradients))
    stored = {field.name: stored_dtype(field, torch.float32) for field in work.program.fields}

    def of_state(name: str) -> list[int]:
        if name not in stored:
            none: list[int] = kept.get("none", len(which), lambda: [0] * len(which))  # one list, compared at once
            return none
        return _addresses(work, tensors, name, state[name], (stored[name],), (), kept)

    addresses = [
        _addresses(work, tensors, "weight", tensors.weights, _FLOATS, weights, kept),
        _addresses(work, tensors, "gradient", tensors.gradients, _FLOATS, gradients, kept),
        *map(of_state, _MOMENTS),
        _addresses(work, tensors, "step", tensors.steps, _WIDE, (), kept),
        which,
        *map(of_state, map(scale_of, _MOMENTS)),
    ]

    def make() -> tuple[Tensor, Kinds]:
        if any(n != 1 for n in map(Tensor.numel, tensors.steps)):
            guard.check(work, tensors)
        numbers = array("q", chain(*addresses))
        table = torch.frombuffer(numbers, dtype=torch.int64).view(len(addresses), -1).T.contiguous()
        kinds = Kinds(weights, gradients, (table[:, :4] % 16 == 0).all(1).tolist())
        return kept.upload(table, torch.int64), kinds

    found: tuple[Tensor, Kinds] = kept.get("parameters", addresses, make)
    return found


def limited_of(work: Work, tensors: Tensors, kept: Kept) -> Tensor:
    """Of each norm that is limited, where what is remembered of it lies, and which rule it has; ``[T, 2]`` int64.

    Raises `ValueError` as `parameters_of`.
    """
    return tensors.once("limited", lambda: _limited(work, tensors, kept))


def _limited(work: Work, tensors: Tensors, kept: Kept) -> Tensor:
    which, limited = rules_of(tensors, kept).which, tensors.state["limited_norm"]
    addresses = _addresses(work, tensors, "limited_norm", limited, _WIDE, (), kept)

    def make() -> Tensor:
        each = zip(addresses, which, work.norms, strict=True)
        places = [(address + _WIDE[0].itemsize * i, rule) for address, rule, count in each for i in range(count)]
        return kept.upload(places, torch.int64)

    found: Tensor = kept.get("limited", (addresses, which), make)
    return found


def _addresses(
    work: Work,
    tensors: Tensors,
    name: str,
    each: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    now: Sequence[torch.dtype],  # of each, where there is a choice
    kept: Kept,
) -> list[int]:
    """Of tensors of one kind, the same list for as long as they lie where they did; else they are checked."""
    try:
        addresses = list(map(Tensor.data_ptr, each))
    except (TypeError, RuntimeError):  # no tensor, or none of dense memory
        guard.check(work, tensors)  # says which
        raise

    def make() -> list[int]:
        _check_kind(work, tensors, name, each, dtypes, kept.device)
        return addresses

    found: list[int] = kept.get(name, (addresses, now), make)
    return found


def _check_kind(
    work: Work,
    tensors: Tensors,
    name: str,
    each: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Raise `ValueError` unless all tensors of one kind are dense, of these dtypes and on `device`."""
    kinds = set(zip(map(_DTYPE, each), map(_DEVICE, each), map(Tensor.is_contiguous, each), strict=True))
    if all(dtype in dtypes and place == device and is_dense for dtype, place, is_dense in kinds):
        return
    guard.check(work, tensors)  # says what differs from the plan
    dtype, place, is_dense = next(kind for kind in kinds if kind[0] not in dtypes or kind[1:] != (device, True))
    raise ValueError(
        f"a {name} of this step is {dtype} on {place}{'' if is_dense else ', not dense'}; the Triton kernels would "
        f"read wrong memory. Nothing was changed. They take dense {' or '.join(map(str, dtypes))} on {device}; "
        f"GWT_DIST_KERNEL=eager takes everything"
    )

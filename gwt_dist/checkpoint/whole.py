"""`full_state`: the state of one tensor, whole, on every rank."""

from __future__ import annotations

import difflib
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gwt_dist.checkpoint.elements import copy
from gwt_dist.checkpoint.files import Part
from gwt_dist.checkpoint.format import CheckpointError
from gwt_dist.checkpoint.holdings import Numbers, Run, Stepped
from gwt_dist.checkpoint.together import Together
from gwt_dist.comm import Shard
from gwt_dist.declare import Extent
from gwt_dist.layout import Fragment
from gwt_dist.piece import stored_dtype
from gwt_dist.plan import Plan

_Parts = tuple[float | None, Numbers, list[tuple[str, Fragment, Tensor]]]


def full_state(
    model: Any, optimizer: Any, name: str, *, process_group: ProcessGroup | None = None
) -> dict[str, Tensor]:
    """The state of the tensor `name` as one process has it, whichever ranks hold it. A collective.

    For a look at the moments of one tensor in a run; `gwt_dist.save` stores all of them without gathering any.

    Args:
        model: The model as it is wrapped, or the DeepSpeed engine; attached, where the engine needs it.
        optimizer: Its `GWTAdamW`, or any wrapper that holds it.
        name: Of the parameter, as the model had it before it was wrapped.
        process_group: The ranks that train this model, if they are not all; nobody else calls it.

    Returns:
        On every rank the same tensors on the CPU, copies: ``step`` (0-d fp32) and the fields of the tensor's recipe, in
        the shapes that `GWTAdamW` tells: ``exp_avg`` ``[R, ceil(C / 2**level)]`` and so on; fp32, or fp64 for fp64
        parameters. In another ``state_dtype`` they are as they are stored: bf16, or codes (int8, of ``exp_avg_sq``
        uint8) with the scales (``exp_avg_scale``, fp32, ``[R, ceil(K / 64)]``) beside them; `formulas.codecs.decode`
        makes numbers of them. Empty before the first step of the tensor.

    Raises:
        CheckpointError: On all ranks, if the optimizer steps no tensor of that name on any of them, or a layout cannot
            be read. On one rank, if that is not in `process_group`.
    """
    together = Together.of(process_group, "gwt_dist.full_state")
    run = together.each(lambda: Run(model, optimizer))
    one, place = together.each(lambda: _find(run, name))
    everyone: list[_Parts] = together.gather(together.each(lambda: _parts(run, one, place, name)))
    step = next((step for step, _, _ in everyone if step is not None), None)
    if step is None:
        return {}
    tensor = one.plan.shard.tensors[place]
    is_stack = tensor.fqn in one.plan.shard.stacks
    shape = (one.stored(tensor.fqn)[2], *tensor.shape) if is_stack else tensor.shape
    whole_shard = Shard.whole(name, shape)
    plan = Plan.of(whole_shard.unstacked() if is_stack else whole_shard, one.plan.form)
    state = {"step": torch.tensor(step, dtype=torch.float32)}
    numbers = next(numbers for step, numbers, _ in everyone if step is not None)
    for field in plan.fields:
        dtype = stored_dtype(field, one.parameter.dtype)
        parts = [(fragment, values) for _, _, held in everyone for kind, fragment, values in held if kind == field.name]
        if field.extent is Extent.TENSOR:
            state[field.name] = torch.tensor(numbers[field.name], dtype=dtype)
            continue
        whole = torch.zeros(prod(plan.shapes[field.name]), dtype=dtype)
        for fragment, values in parts:
            for overlap in fragment.intersect(Fragment(name, fragment.shape, 0, whole.numel())):
                copy(whole, values, overlap)
        state[field.name] = whole.view(plan.shapes[field.name])
    return state


def _find(run: Run, name: str) -> tuple[Stepped, int]:
    """The parameter that holds a tensor, and the tensor's place in it."""
    places = {its: (one, i) for one in run.stepped for i, its in enumerate(one.names)}
    if name not in places:
        near = difflib.get_close_matches(name, places, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(f"the optimizer steps no tensor {name!r} of this model{hint}")
    return places[name]


def _parts(run: Run, one: Stepped, place: int, name: str) -> _Parts:
    """Steps, numbers and values that this rank owns of a tensor's state; no steps where it holds no element of it."""
    state = run.optimizer.state.get(one.parameter)
    if not state or (place, name) not in one.held:
        return None, {}, []
    parts = []
    for holding in run.state_holdings(one, state):
        if holding.owned.fqn == name:
            part = Part(name, holding.kind, "", holding.owned, holding.fragment, holding.buffer)
            parts.append((holding.kind, holding.owned, part.dense().clone()))
    return float(state["step"]), one.numbers(state)[name], parts

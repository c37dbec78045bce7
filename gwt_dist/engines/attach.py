"""`attach`: give the optimizer the layout that an engine hides, once it has been checked against the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gwt_dist.comm import Peers, Shard, alone
from gwt_dist.engines import deepspeed, deepspeed_by_name, fairscale, fsdp1, refusals
from gwt_dist.engines.flat import FlatBuffer
from gwt_dist.exchange import join
from gwt_dist.layout import Fragment, LayoutError
from gwt_dist.optimizer import GWTAdamW
from gwt_dist.replaced import CARRY


def attach(optimizer: Any, engine: Any) -> None:
    """Tell `optimizer` which elements of which weights the flat buffers of `engine` hold.

    Call it once, on all ranks, after the engine is built and before the first step or the loading of a checkpoint.
    Where an engine hides nothing (one process, DDP with or without `ZeroRedundancyOptimizer`, fairscale's OSS, ZeRO
    stage 0 in fp32) there is nothing to do. With fairscale's `ShardedDataParallel` every later step checks that the
    gradients are the reduced ones.

    Args:
        optimizer: The `GWTAdamW`, or any wrapper that holds it as ``.optimizer`` or ``.optim``.
        engine: A DeepSpeed engine or its ZeRO optimizer, or a model that is wrapped in FSDP1 or by fairscale.

    Raises:
        ValueError: If there is no `GWTAdamW` in `optimizer`, it holds none of the sharded parameters, or the engine has
            a layout or setting that cannot be right.
        LayoutError: If a fragment does not hold the weights that it should, or an element is held by no rank or
            several.
    """
    refusals.refuse_swapped(list(unwrapped(optimizer)), list(unwrapped(engine)))
    inner = find_optimizer(optimizer)
    refusals.refuse(getattr(engine, "_config", None))
    fairscale.guard_gradients(inner, engine)
    for wrapper in unwrapped(engine):
        for adapter in (deepspeed, fsdp1, fairscale):
            buffers = adapter.read(wrapper)
            if buffers is not None:
                _refuse_left_out(inner, buffers, wrapper)
                attach_buffers(inner, buffers)
                deepspeed_by_name.refuse_states(wrapper)
                return


def find_optimizer(optimizer: Any) -> GWTAdamW:
    """The `GWTAdamW` that `optimizer` is or holds; raises `ValueError` if there is none."""
    inner = next((o for o in unwrapped(optimizer) if isinstance(o, GWTAdamW)), None)
    if inner is None:
        raise ValueError(
            f"{type(optimizer).__name__} holds no GWTAdamW (looked at it and at .optimizer and .optim of its "
            f"wrappers); pass the optimizer that the engine was built with. Under DeepSpeed transformers' Trainer "
            f"leaves its argument optimizers=(...) out and trains with torch's AdamW: give it **trainer_kwargs(args)"
        )
    return inner


def attach_buffers(optimizer: GWTAdamW, buffers: Sequence[FlatBuffer]) -> None:
    """Check the buffers of all ranks and attach them; either every rank attaches or every rank raises."""
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # ZeRO-3 takes the parameters out of the groups between steps.
    if given and buffers and not any(id(buffer.parameter) in given for buffer in buffers):
        raise ValueError(
            f"the optimizer holds none of the {len(buffers)} sharded parameters of the model, which took the place of "
            f"those that it was given: its steps would change nothing. Build it after the model is wrapped"
        )
    by_group: dict[ProcessGroup | None, list[FlatBuffer]] = {}
    for buffer in buffers:
        by_group.setdefault(buffer.group, []).append(buffer)
    shards: dict[Tensor, Shard] = {}
    for group, members in by_group.items():
        for buffer, shard in zip(members, _joined(members, group), strict=True):
            shards[buffer.parameter] = shard
    optimizer.attach(shards)


def _refuse_left_out(optimizer: GWTAdamW, buffers: Sequence[FlatBuffer], model: Any) -> None:
    """Raise `ValueError` where a unit was wrapped after the optimizer was built, which still holds what it took in.

    An optimizer that holds none of the units is `attach_buffers`'s to refuse.
    """
    its = {id(parameter) for parameter in (model.parameters() if isinstance(model, nn.Module) else ())}
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    loose = Counter(tuple(p.shape) for p in held.values() if id(p) not in its)
    for buffer in buffers if any(id(buffer.parameter) in held for buffer in buffers) else ():
        taken_in = Counter(fragment.shape for fragment in buffer.fragments)
        if id(buffer.parameter) not in held and buffer.parameter.requires_grad and loose and taken_in <= loose:
            raise ValueError(
                f"the optimizer does not hold the flat parameter of {buffer.fragments[0].fqn!r} but parameters of the "
                f"shapes of its tensors, which the model does not have: it was wrapped after the optimizer was built, "
                f"and would not move. Build the optimizer after the model is wrapped. {CARRY}"
            )


def _joined(buffers: Sequence[FlatBuffer], group: ProcessGroup | None) -> list[Shard]:
    mine = ([b.fragments for b in buffers], _mismatch(buffers))
    everyone: list[Any] = [mine]
    if group is not None:
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
    for rank, (_, mismatch) in enumerate(everyone):
        if mismatch:
            raise LayoutError(f"rank {rank}: {mismatch}")
    groups = (group,) if group is not None and len(everyone) > 1 else ()
    return [
        Shard(
            tensors=join([fragments[i] for fragments, _ in everyone]),
            fragments=buffer.fragments,
            groups=groups,
            row_groups=groups,
            peers=_peers([fragments[i] for fragments, _ in everyone], group),
            local_shape=_whole_shape(buffer),
            owners=buffer.owners,
        )
        for i, buffer in enumerate(buffers)
    ]


def _peers(ranks: Sequence[Sequence[Fragment]], group: ProcessGroup | None) -> Peers:
    # Most ranks hold no element of most tensors, and their number is that of ranks times tensors.
    held = [tuple(fragment for fragment in fragments if fragment.numel) for fragments in ranks]
    if group is None or len(held) == 1:
        return alone(held[0])
    return Peers(tuple(dist.get_process_group_ranks(group)), dist.get_rank(group), group, held.__getitem__)


def _whole_shape(buffer: FlatBuffer) -> tuple[int, ...] | None:
    """The shape of a parameter that is one tensor, whole and in its own shape."""
    shape = tuple(buffer.parameter.shape)
    return shape if buffer.group is None and [f.shape for f in buffer.fragments] == [shape] else None


def _mismatch(buffers: Sequence[FlatBuffer]) -> str | None:
    """What is wrong with the fragments of this rank, compared bit for bit with the weights of the model."""
    for buffer in buffers:
        for fragment, weight in zip(buffer.fragments, buffer.weights, strict=True):
            # A slice, which may come out short, so that a wrong offset is told to all ranks and not raised on one.
            held = buffer.parameter.detach().reshape(-1)[fragment.offset : fragment.offset + fragment.numel]
            if held.numel() != fragment.numel or not _same_bits(held.to(weight.dtype), weight.detach().to(held.device)):
                return (
                    f"elements {fragment.start}..{fragment.stop} of {fragment.fqn!r}, read at {fragment.offset} of a "
                    f"flat buffer of {buffer.parameter.numel()}, are not those of the model's weight; this version of "
                    f"the engine lays its buffers out in another way, and a step would change the wrong elements"
                )
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # NaN equals nothing, itself included; its bits do.
    return torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


def unwrapped(thing: Any) -> Iterator[Any]:
    """`thing` and the optimizers that it wraps, outermost first."""
    seen: set[int] = set()
    while thing is not None and id(thing) not in seen:
        seen.add(id(thing))
        yield thing
        thing = getattr(thing, "optimizer", None) or getattr(thing, "optim", None)

"""Where the weights that a model computes with lie on this rank, and the masters that an engine keeps beside them.

What a checkpoint needs beside the optimizer's own layout: parameters that no optimizer holds, frozen ones and buffers;
the copies that must follow when a master is loaded; and the counters of an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gwt_dist import dtensor
from gwt_dist.engines import deepspeed, deepspeed_state, fairscale, fsdp1
from gwt_dist.layout import Fragment
from gwt_dist.optimizer import GWTAdamW

# What wrappers put into the names of the modules that they wrap.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module")


@dataclass(frozen=True, slots=True)
class Local:
    """A buffer of this rank, and the elements of the model's tensors in it."""

    buffer: Tensor
    fragments: tuple[Fragment, ...]
    common: bool = False  # a module's buffer, which ranks may not agree on: rank 0's counts


@dataclass(slots=True)
class Weights:
    """All weights of a model on this rank."""

    model: list[Local] = field(default_factory=list)
    copies: list[Local] = field(default_factory=list)  # further copies of `model`, which must stay the same
    masters: list[Local] = field(default_factory=list)  # of what `model` holds the rounding of
    flat: set[int] = field(default_factory=set)  # ids of the model's flat parameters
    names: dict[int, str] = field(default_factory=dict)  # id of a parameter that is one tensor -> its name
    group_of: dict[int, int] = field(default_factory=dict)  # id of a flat parameter -> its group, where that hides it
    requires_grad: set[str] = field(default_factory=set)  # names of the parameters that do
    tied: dict[str, str] = field(default_factory=dict)  # further name of a parameter -> its name here


def clean(name: str) -> str:
    """The name of a parameter without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrap(model: Any) -> nn.Module:
    """The user's module in a DeepSpeed engine, DistributedDataParallel, ShardedDataParallel or a compiled module."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        wraps_whole = isinstance(model, nn.parallel.DistributedDataParallel) or any(
            key in vars(model) for key in ("basic_optimizer", "_should_bucket_grad")
        )
        if inner is None and wraps_whole:
            inner = model.module
        if inner is None:
            break
        model = inner
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is no model: pass the module that is trained, as it is wrapped, or the DeepSpeed "
            f"engine"
        )
    return model


def read_weights(model: Any, optimizers: Iterable[Any]) -> Weights:
    """The weights of a model or DeepSpeed engine, and the masters in any of `optimizers` (wrappers of each other).

    Raises `ValueError` for parameters whose layout cannot be read, and masters that none of `optimizers` leads to.
    """
    module, optimizers, found = unwrap(model), list(optimizers), Weights()
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # after a forward pass alone the root still has whole tensors
    for buffer in fsdp1.read(module) or ():
        found.flat.add(id(buffer.parameter))
        # The slices of FSDP1's own shard, which are there whatever state its views are in.
        found.model += [Local(w, (_at_start(f),)) for f, w in zip(buffer.fragments, buffer.weights, strict=True)]
        found.requires_grad |= {clean(f.fqn) for f in buffer.fragments if buffer.parameter.requires_grad}
    for buffer in fairscale.read(module) or ():
        found.flat.add(id(buffer.parameter))
        found.model.append(Local(buffer.parameter.detach(), tuple(map(_cleaned, buffer.fragments))))
        found.requires_grad |= {clean(fragment.fqn) for fragment in buffer.fragments}  # frozen ones are not read
    for raw_name, parameter in module.named_parameters():
        name = clean(raw_name)
        if id(parameter) not in found.flat:
            _read_parameter(name, parameter, found)
    for raw_name, parameter in module.named_parameters(remove_duplicate=False):
        first = found.names.get(id(parameter))
        if first is not None and clean(raw_name) != first:
            found.tied[clean(raw_name)] = first
    for path, part in module.named_modules():
        for key, value in part.named_buffers(recurse=False):
            if key not in part._non_persistent_buffers_set:
                found.model.append(_whole(clean(f"{path}.{key}".removeprefix(".")), value, common=True))
    for wrapper in optimizers:
        buffers = deepspeed.read(wrapper)
        if buffers is not None:
            found.masters = [Local(b.parameter.detach(), tuple(map(_cleaned, b.fragments))) for b in buffers]
            numbers = deepspeed_state.group_numbers(wrapper)
            found.group_of = {id(b.parameter): number for b, number in zip(buffers, numbers, strict=True)}
            break
    _check_owners(module, optimizers, found)
    return found


def _check_owners(module: nn.Module, optimizers: Iterable[Any], found: Weights) -> None:
    """Raise `ValueError` if an engine steps copies of the weights that were not read: they would undo a load."""
    known = found.names.keys() | found.flat | found.group_of.keys()
    for optimizer in optimizers:
        for group in getattr(optimizer, "param_groups", None) or ():
            for parameter in group["params"]:
                if id(parameter) not in known:
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} of the {type(optimizer).__name__} is none of "
                        f"the model's as it is now: pass the model that this optimizer was built for, as it is "
                        f"wrapped, and if an engine keeps copies of the weights, the engine"
                    )
    if not found.masters:
        for name, parameter in module.named_parameters():
            if deepspeed_state.has_master(parameter):
                raise ValueError(
                    f"DeepSpeed keeps a master of {clean(name)!r}, which is not reached from the module within, so it "
                    f"would be left out: pass the engine"
                )


def _read_parameter(name: str, parameter: Tensor, found: Weights) -> None:
    found.names[id(parameter)] = name
    if parameter.requires_grad:
        found.requires_grad.add(name)
    if hasattr(parameter, "ds_tensor"):
        fragment, partition, whole = deepspeed_state.partition(parameter, name)
        found.model.append(Local(partition, (fragment,)))
        if whole is not None:
            found.copies.append(_whole(name, whole))
    elif isinstance(parameter, DTensor):
        fragments = dtensor.shard_of(parameter, name).fragments
        found.model.append(Local(dtensor.local(parameter.detach()), fragments))
    elif hasattr(parameter, "_fsdp_flattened") or hasattr(parameter, "_is_sharded"):
        raise ValueError(
            f"{name!r} is a part of a flat parameter whose layout cannot be read here: a frozen one of fairscale, or "
            f"one of a wrapper within another. Pass the outermost wrapper"
        )
    else:
        found.model.append(_whole(name, parameter))


def _whole(name: str, tensor: Tensor, common: bool = False) -> Local:
    shape = tuple(tensor.shape)
    return Local(tensor.detach(), (Fragment(name, shape, 0, tensor.numel()),), common)


def _cleaned(fragment: Fragment) -> Fragment:
    return replace(fragment, fqn=clean(fragment.fqn))


def _at_start(fragment: Fragment) -> Fragment:
    return replace(fragment, fqn=clean(fragment.fqn), offset=0)


def counters(model: Any) -> dict[str, Any] | None:
    """What a DeepSpeed engine counts, as plain numbers; None for any other model."""
    return deepspeed_state.counters(model) if _is_engine(model) else None


def set_counters(model: Any, values: Mapping[str, Any] | None, step: int) -> None:
    """Give a DeepSpeed engine the counters of another, or those of `step` steps; nothing is done to any other model."""
    if _is_engine(model):
        deepspeed_state.set_counters(model, values, step)


def check_boundary(model: Any, optimizer: GWTAdamW, what: str) -> None:
    """Raise `ValueError` where gradients are held that no step has taken: `what`, said in the message, has no place
    for them. Those of a loop without an engine or `fuse_backward` are seen by a save, if the loop calls `zero_grad` of
    the optimizer: what it loads into may have gradients left that it clears first.
    """
    held = ""
    if _is_engine(model):
        held = deepspeed_state.accumulated(model)
    elif what == "save" and optimizer.is_waiting():
        held = "gradients since the last step (zero_grad() drops them, if no step is to have them)"
    if optimizer.holding:
        held = "micro-batches that ran under optimizer.accumulating()"
    if held:
        raise ValueError(
            f"{what} in the middle of a step: {held} are accumulated, and no checkpoint holds gradients, so the next "
            f"step would be another one. Finish the step first (the remaining micro-batches and step())"
        )


def schedule_of(model: Any) -> Any:
    """The learning-rate schedule that a DeepSpeed engine steps by itself; None for any other model."""
    return model.lr_scheduler if _is_engine(model) else None


def _is_engine(model: Any) -> bool:
    return "basic_optimizer" in vars(model)

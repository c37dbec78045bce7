"""What this rank holds of a parameter: as an engine's adapter read it, as its DTensor says, or the whole of it."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor

from gwt_dist import dtensor
from gwt_dist.comm import Shard


def is_flat(parameter: Tensor) -> bool:
    """Whether FSDP1 or fairscale says of a parameter that it is flat; DeepSpeed's buffers do not say so."""
    marks = hasattr(parameter, "_fsdp_flattened"), hasattr(parameter, "_param_shapes")
    return any(marks) or bool(getattr(parameter, "_is_sharded", False))


def shard_of(
    parameter: Tensor, attached: Mapping[Tensor, Shard], given: Container[Tensor], where: str, stacked: bool = False
) -> Shard | None:
    """The shard of a parameter; `given` are those that the user passed, `where` is its name for messages.

    Where its group says `stacked`, a tensor of three dimensions is as many tensors as it has matrices.

    None for the zero-gradient dry run that engines make on buffers of their own.

    Raises:
        ValueError: On the first real step of a buffer whose layout is unknown, for complex parameters and sparse
            gradients, and for what is no stack in a group that says so.
    """
    if isinstance(parameter, DTensor) and parameter not in attached:
        _refuse_kinds(parameter, where)
        return dtensor.shard_of(parameter, where, stacked)
    shard = _as_it_is(parameter, attached, given, where)
    return shard.unstacked() if stacked and shard is not None else shard


def _refuse_kinds(parameter: Tensor, where: str) -> None:
    if parameter.is_complex() or (parameter.grad is not None and parameter.grad.is_sparse):
        raise ValueError(f"{where} is complex or has a sparse gradient; GWTAdamW takes real, dense tensors")


def _as_it_is(
    parameter: Tensor, attached: Mapping[Tensor, Shard], given: Container[Tensor], where: str
) -> Shard | None:
    if parameter in attached:
        return attached[parameter]
    _refuse_kinds(parameter, where)
    if hasattr(parameter, "_fsdp_flattened"):
        raise ValueError(
            f"{where} is a part of a flat parameter of FSDP1, and the rows of its tensors are unknown. Without "
            f"them this step would be another optimizer. Add gwt_dist.attach(optimizer, model) after both are built"
        )
    if is_flat(parameter):
        raise ValueError(
            f"{where} is a flat parameter of fairscale's FullyShardedDataParallel, {parameter.numel()} elements of "
            f"tensors whose rows are unknown here. Without them this step would be another optimizer. Add "
            f"gwt_dist.attach(optimizer, model) after the model is wrapped (FlattenParamsWrapper alone is not read)"
        )
    if parameter in given:
        return Shard.whole(where, tuple(parameter.shape))
    if parameter.grad is None or not parameter.grad.any():
        return None
    if parameter.dim() >= 2:
        return Shard.whole(where, tuple(parameter.shape))
    raise ValueError(
        f"{where} is a flat buffer of {parameter.numel()} elements that was not among the parameters given to "
        f"GWTAdamW: a sharding engine made it, and the rows of its tensors are unknown. Without them this step "
        f"would be another optimizer. Add gwt_dist.attach(optimizer, engine) after the engine is built, or build "
        f"it with gwt_dist.initialize; a Trainer takes **trainer_kwargs(args), which has the AttachCallback"
    )

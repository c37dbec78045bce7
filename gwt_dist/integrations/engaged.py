"""`engage`: attach an optimizer to whatever a trainer made of the model, and see that it is what was asked for."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from gwt_dist import attach, ds_json
from gwt_dist.engines import refusals
from gwt_dist.engines.attach import find_optimizer
from gwt_dist.optimizer import GWTAdamW
from gwt_dist.replaced import refuse_left_state

logger = logging.getLogger(__name__)


def engage(optimizer: Any, model: nn.Module, asked: str | None) -> str:
    """Attach the `GWTAdamW` in `optimizer`, and return how it holds the weights.

    Call it on all ranks after the trainer wrapped both. State that a trainer loaded before it (transformers does when
    it resumes under DeepSpeed) is kept.

    Args:
        optimizer: The optimizer as the trainer has it, wrapped or not.
        model: The model as the trainer has it.
        asked: ``"DeepSpeed"``, ``"FSDP"`` or None, if the user asked for neither.

    Returns:
        ``"flat shards"`` (ZeRO), ``"DTensors"`` (FSDP2) or ``"whole tensors"`` (one process, DDP, ZeRO stage 0).

    Raises:
        ValueError: If the engine that was asked for is not on, which some trainers do not say, or one that is not
            tested here is.
    """
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError(
            "the trainer wrapped the model in FSDP1, where the names of weights no longer say which get which level; "
            "this is not tested through trainers. Set the version of FSDP to 2 (fsdp_version or fsdp_config.version)"
        )
    zero = _zero_optimizer(optimizer)
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if asked == "DeepSpeed" and file != "none":
        ds_json.read(file)  # Accelerate takes the last of equal keys
    if asked == "DeepSpeed" and zero is None:
        raise ValueError(
            f"DeepSpeed was asked for and is not on: the optimizer is a {type(optimizer).__name__} around plain "
            f"parameters, so the run would be DDP in silence, with the whole state on every rank. Remove cpu=True "
            f"of Accelerate (which switches it off), and start with a launcher"
        )
    if zero is not None:
        _refuse(optimizer, zero)
        _attach_loaded(find_optimizer(optimizer), optimizer, zero)
    inner = find_optimizer(optimizer)
    held = how_held(inner)
    if asked == "FSDP" and held != "DTensors":
        raise ValueError(
            f"FSDP was asked for and is not on: no parameter of the optimizer is a DTensor ({held}), so the run would "
            f"be DDP in silence, with the whole state on every rank. Accelerate shards on accelerators alone, not on "
            f"CPUs; pass model and optimizer to one prepare, and use FSDP version 2"
        )
    return held


def how_held(optimizer: GWTAdamW) -> str:
    """``"flat shards"``, ``"DTensors"`` or ``"whole tensors"``."""
    if optimizer.shards:
        return "flat shards"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return "DTensors" if any(isinstance(p, DTensor) for p in parameters) else "whole tensors"


def asked_of_accelerate() -> str | None:
    """What the environment asks of Accelerate, which its launcher, plugins and transformers all set."""
    for name, engine in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(name, "false").lower() in ("true", "1"):
            return engine
    return None


def asked_for(args: Any) -> str | None:
    """``"DeepSpeed"``, ``"FSDP"`` or None: what transformers' `TrainingArguments` ask for, or else the environment."""
    # By the arguments first: what transformers tells Accelerate through the environment it may take back.
    asked = [name for name, key in (("DeepSpeed", "deepspeed"), ("FSDP", "fsdp")) if getattr(args, key, None)]
    return asked[0] if asked else asked_of_accelerate()


def warn_of_one_process() -> None:
    """Warn where Accelerate counts fewer processes than there are: it then gives every rank the same batches."""
    from accelerate.state import PartialState

    there = dist.get_world_size() if dist.is_initialized() else 1
    if PartialState().num_processes != there:
        warnings.warn(
            f"Accelerate counts {PartialState().num_processes} process and torch.distributed {there}: every rank would "
            f"train on the same batches. It does so on CPUs, unless cpu=True is set, which switches "
            f"DeepSpeed off; see spread_on_cpus in examples/tiny.py",
            stacklevel=3,
        )


def _zero_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's optimizer, which Accelerate wraps once; None if DeepSpeed is not on."""
    if any(kind.__name__ == "DeepSpeedOptimizerWrapper" for kind in type(optimizer).__mro__):
        return optimizer.optimizer
    return None


def _refuse(optimizer: Any, zero: Any) -> None:
    """Raise `ValueError` for settings of DeepSpeed under which the update could not be right."""
    chain = [thing for thing in (zero, getattr(zero, "optimizer", None)) if thing is not None]
    refusals.refuse_swapped([optimizer, *chain], chain)
    # ZeRO's optimizer does not know them, and transformers does not show the engine to callbacks.
    refusals.refuse(_settings())


def _settings() -> Any:
    """The DeepSpeed JSON, as Accelerate has filled it in."""
    from accelerate.state import AcceleratorState

    return AcceleratorState().deepspeed_plugin.deepspeed_config


def _attach_loaded(inner: GWTAdamW, optimizer: Any, zero: Any) -> None:
    """Attach once; moments that are there already were loaded for these very buffers, so they are put back."""
    if inner.shards:
        return
    loaded = dict(inner.state)
    inner.state.clear()
    attach(optimizer, zero)
    held = [parameter for group in inner.param_groups for parameter in group["params"]]
    refuse_left_state(loaded, [*held, *inner.shards])
    inner.state.update(loaded)
    if note := refusals.offload_note(_settings(), inner):  # after the first attach alone
        logger.warning(note)

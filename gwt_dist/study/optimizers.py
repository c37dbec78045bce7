"""The optimizers of a study: their options, and how they are built over a model.

`gwt_dist.study.entries` has the table of those with names. A study file may also name any function
`build(matrices, rest, lr, rest_lr, options)` as `module:function`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gwt_dist.blocks import matrices_of
from gwt_dist.study.entries import ENTRIES, Build, Options
from gwt_dist.targets import first_match
from gwt_dist.train.config import refuse_unknown_keys

TARGETS = ("attn", "mlp")


def split(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters by name: the weight matrices of attention and MLP, and the rest."""
    known = matrices_of(model)
    matrices: dict[str, nn.Parameter] = {}
    rest: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        chosen = matrices if first_match(TARGETS, known.get(id(parameter))) else rest
        chosen[name] = parameter
    return matrices, rest


def options_of(optimizer: str, given: Options, where: str) -> Options:
    """All options of a row: those given over the published ones, and what they imply.

    A function by its path has what is given alone.

    Raises:
        ValueError: an optimizer or an option that is not known (the nearest is named), or a wrong value of one of ours.
    """
    if ":" in optimizer:
        return dict(given)
    refuse_unknown_keys([optimizer], ENTRIES, f"optimizer of {where}")
    entry = ENTRIES[optimizer]
    refuse_unknown_keys(given, (*entry.options, *entry.more), f"options of {where}")
    options = entry.options | entry.instead(given) | given
    options |= entry.implied(options)
    try:
        entry.check(options)
    except ValueError as error:
        raise ValueError(f"options of {where}: {error}") from None
    return options


def package_of(optimizer: str) -> str:
    """The distribution that an optimizer comes from; the module of a function by its path."""
    return optimizer.partition(":")[0] if ":" in optimizer else ENTRIES[optimizer].package


def version_of(optimizer: str) -> str:
    """The version of that distribution, '' for what is not installed as one."""
    try:
        return importlib.metadata.version(package_of(optimizer))
    except importlib.metadata.PackageNotFoundError:
        return ""


def build(optimizer: str, model: nn.Module, lr: float, rest_lr: float, options: Options) -> list[torch.optim.Optimizer]:
    """The optimizers that step together, over all parameters of `model`.

    Raises:
        ImportError: the package of the optimizer is not there.
        ValueError: the function of a path is not there, or parameters are missing in what it returns.
    """
    matrices, rest = split(model)
    function = function_at(optimizer) if ":" in optimizer else ENTRIES[optimizer].build
    built = function(matrices, rest, lr, rest_lr, dict(options))
    optimizers = built if isinstance(built, list) else [built]
    taken = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    left = [name for name, p in model.named_parameters() if id(p) not in taken]
    if left:
        raise ValueError(f"{optimizer} leaves {len(left)} parameters untrained, {left[0]} first")
    return optimizers


def function_at(path: str) -> Build:
    """The function at `module:function`; the working directory is searched as well.

    Raises:
        ImportError: no such module.
        ValueError: no such function in it.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"optimizer {path!r}: {module} has no function {name!r}")
    function: Build = found
    wanted = len(inspect.signature(function).parameters)
    if wanted != 5:
        raise ValueError(f"{path} takes {wanted} arguments; expected (matrices, rest, lr, rest_lr, options)")
    return function


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Every group's rate: `factor` times that of the first call's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group.setdefault("top_lr", float(group["lr"]))
            if isinstance(group["lr"], Tensor):  # torchao compiles with it
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

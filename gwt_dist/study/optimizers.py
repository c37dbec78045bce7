"""The optimizers of a study, each through its own package, with the settings that were published for it.

An entry is a function `build(matrices, rest, lr, rest_lr, options)` that returns an optimizer, or a list of them that
step one after the other. `matrices` and `rest` map names to parameters. A study file may name any such function as
`module:function`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gwt_dist.groups import first_match, keys_of_rest
from gwt_dist.keys import of_recipes
from gwt_dist.recipes import DEFAULT, RECIPES, check_group, meaning, resolved
from gwt_dist.train.config import refuse_unknown_keys

Parameters = Mapping[str, nn.Parameter]
Options = dict[str, Any]
Built = torch.optim.Optimizer | list[torch.optim.Optimizer]
Build = Callable[[Parameters, Parameters, float, float, Options], Built]
TARGETS = ("attn", "mlp")


@dataclass(frozen=True, slots=True)
class Entry:
    """An optimizer that a study can name: `options` with their defaults, `more` names without, and what they imply."""

    build: Build
    options: Options
    package: str = "torch"
    more: tuple[str, ...] = field(default=())
    implied: Callable[[Options], Options] = field(default=lambda options: {})
    check: Callable[[Options], None] = field(default=lambda options: None)  # raises `ValueError` for a wrong value


def split(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters by name: the Linear weights of attention and MLP, and the rest."""
    linear = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    matrices: dict[str, nn.Parameter] = {}
    rest: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        chosen = matrices if first_match(TARGETS, linear.get(id(parameter))) else rest
        chosen[name] = parameter
    return matrices, rest


def _groups(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, **only: Any) -> list[dict[str, Any]]:
    """Groups of both, each with its rate; `only` are keys of the matrices'."""
    return [
        {"params": list(matrices.values()), "lr": lr, **only},
        {"params": list(rest.values()), "lr": rest_lr},
    ]


def _plain(package: str, name: str) -> Build:
    """A class that takes every parameter alike, and the options as keywords."""

    def build(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
        kind = getattr(importlib.import_module(package), name)
        built: Built = kind(_groups(matrices, rest, lr, rest_lr), lr=lr, **options)
        return built

    return build


def _low_rank(package: str, name: str, of_the_group: tuple[str, ...]) -> Build:
    """A class that projects the groups which have a rank."""

    def build(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
        kind = getattr(importlib.import_module(package), name)
        only = {key: options[key] for key in of_the_group}
        others = {key: value for key, value in options.items() if key not in only}
        built: Built = kind(_groups(matrices, rest, lr, rest_lr, **only), lr=lr, **others)
        return built

    return build


def _gwt(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
    from gwt_dist import GWTAdamW

    others = options.pop("rest", None) or {}
    groups = _groups(matrices, rest, lr, rest_lr)
    return GWTAdamW([groups[0] | options, groups[1] | keys_of_rest(options, others)], lr=lr)


def _check_gwt(options: Options) -> None:
    keys = {key: value for key, value in options.items() if key != "rest"}
    check_group({"wavelet": "haar", **keys}, "a group")
    keys_of_rest(keys, options.get("rest") or {})


def _of_the_recipe(options: Options) -> Options:
    """What the recipe says of keys that are not given: a run that was made with another recipe is another run."""
    refuse_unknown_keys([options["recipe"]], RECIPES, "recipes")
    group = {"recipe": options["recipe"]}
    implied = {"scale": resolved(group)[1]["scale"], **meaning(group)}
    return {key: value for key, value in implied.items() if options.get(key) is None}


def _muon(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
    options = dict(options)
    betas, eps = options.pop("betas"), options.pop("eps")
    adam = {"lr": rest_lr, "betas": betas, "eps": eps, "weight_decay": options["weight_decay"]}
    return [torch.optim.Muon(list(matrices.values()), lr=lr, **options), torch.optim.AdamW(list(rest.values()), **adam)]


class _Named(nn.Module):
    """Parameters under their names, for an optimizer that asks a model for them."""

    def __init__(self, named: Parameters) -> None:
        super().__init__()
        self._named = dict(named)

    def named_parameters(self, *arguments: Any, **keywords: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named.items()


def _adam_mini(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
    kind = importlib.import_module("pytorch_optimizer").AdamMini
    built: torch.optim.Optimizer = kind(_Named({**matrices, **rest}), lr=lr, **options)
    for group in built.param_groups:
        group["lr"] = rest_lr if group["name"] in rest else lr
    return built


_ADAM: Options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_GALORE = ("rank", "update_proj_gap", "scale", "proj_type")
_APOLLO: Options = {"update_proj_gap": 200, "proj": "random", "proj_type": "std", "betas": (0.9, 0.999), "eps": 1e-6}
_APOLLO_GROUP = ("rank", "update_proj_gap", "scale", "proj", "proj_type", "scale_type")

ENTRIES: dict[str, Entry] = {
    "gwt": Entry(
        _gwt,
        {"level": 2, "recipe": DEFAULT, "weight_decay": 0.0},
        "gwt_dist",
        ("betas", "eps", "wavelet", "rest", *of_recipes()),
        _of_the_recipe,
        _check_gwt,
    ),
    "adamw": Entry(_plain("torch.optim", "AdamW"), _ADAM, more=("amsgrad",)),
    "sgd": Entry(_plain("torch.optim", "SGD"), {"momentum": 0.9, "weight_decay": 0.0}, more=("nesterov", "dampening")),
    "adafactor": Entry(
        _plain("torch.optim", "Adafactor"), {"beta2_decay": -0.8, "d": 1.0, "weight_decay": 0.0}, more=("eps",)
    ),
    # With AdamW for what is no hidden matrix, as the documentation of torch.optim.Muon asks for.
    "muon": Entry(
        _muon,
        {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw", **_ADAM},
    ),
    "galore": Entry(
        _low_rank("galore_torch", "GaLoreAdamW", _GALORE),
        {"rank": 32, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "betas": (0.9, 0.999), "eps": 1e-6}
        | {"weight_decay": 0.0, "no_deprecation_warning": True},
        "galore-torch",
    ),
    "apollo": Entry(
        _low_rank("apollo_torch", "APOLLOAdamW", _APOLLO_GROUP),
        {"rank": 32, "scale": 1.0, "scale_type": "channel", "weight_decay": 0.0, **_APOLLO},
        "apollo-torch",
        ("scale_front", "disable_nl"),
    ),
    "apollo-mini": Entry(
        _low_rank("apollo_torch", "APOLLOAdamW", _APOLLO_GROUP),
        {"rank": 1, "scale": 128.0, "scale_type": "tensor", "weight_decay": 0.0, **_APOLLO},
        "apollo-torch",
        ("scale_front", "disable_nl"),
    ),
    "fira": Entry(
        _low_rank("pytorch_optimizer", "Fira", ("rank", "update_proj_gap", "scale", "projection_type")),
        {"rank": 32, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std", "betas": (0.9, 0.999)}
        | {"eps": 1e-6, "weight_decay": 0.0},
        "pytorch_optimizer",
    ),
    "came": Entry(
        _plain("pytorch_optimizer", "CAME"),
        {"betas": (0.9, 0.999, 0.9999), "eps1": 1e-30, "eps2": 1e-16, "clip_threshold": 1.0, "weight_decay": 0.0},
        "pytorch_optimizer",
    ),
    # Widths of the model (configs/models) are for its blocks of queries and keys, one for each head.
    "adam-mini": Entry(
        _adam_mini, {"num_embeds": 128, "num_heads": 4, **_ADAM}, "pytorch_optimizer", ("num_query_groups",)
    ),
    "adam-8bit": Entry(
        _plain("bitsandbytes.optim", "AdamW8bit"), _ADAM, "bitsandbytes", ("min_8bit_size", "percentile_clipping")
    ),
    "adam-8bit-torchao": Entry(_plain("torchao.optim", "AdamW8bit"), _ADAM, "torchao", ("block_size",)),
}


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
    options = entry.options | given
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

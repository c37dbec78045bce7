"""The table of optimizers that a study can name, with the settings that were published for each.

An entry's function is `build(matrices, rest, lr, rest_lr, options)` and returns an optimizer, or a list of them that
step one after the other. `matrices` and `rest` map names to parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gwt_dist.groups import keys_of_rest
from gwt_dist.keys import of_recipes
from gwt_dist.recipes import DEFAULT, LEVEL, RECIPES, check_group, level_of, own_keys, resolved
from gwt_dist.study.bare import class_in
from gwt_dist.study.peers import foam, scale
from gwt_dist.study.peers import matrices as peers
from gwt_dist.train.config import refuse_unknown_keys

Parameters = Mapping[str, nn.Parameter]
Options = dict[str, Any]
Built = torch.optim.Optimizer | list[torch.optim.Optimizer]
Build = Callable[[Parameters, Parameters, float, float, Options], Built]


@dataclass(frozen=True, slots=True)
class Entry:
    """An optimizer that a study can name: `options` with their defaults, `more` names without, and what they imply.

    `instead` are other defaults where these options are given.
    """

    build: Build
    options: Options
    package: str = "torch"
    more: tuple[str, ...] = field(default=())
    implied: Callable[[Options], Options] = field(default=lambda options: {})
    check: Callable[[Options], None] = field(default=lambda options: None)  # raises `ValueError` for a wrong value
    instead: Callable[[Options], Options] = field(default=lambda given: {})


def _groups(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, **only: Any) -> list[dict[str, Any]]:
    """Groups of both, each with its rate; `only` are keys of the matrices'."""
    return [
        {"params": list(matrices.values()), "lr": lr, **only},
        {"params": list(rest.values()), "lr": rest_lr},
    ]


def _adamw(groups: list[dict[str, Any]], lr: float, **options: Any) -> torch.optim.AdamW:
    """AdamW of torch, fused where all parameters are on a GPU.

    A CPU has a fused form too, with other bits, which is why it is not taken there: runs that were recorded would not
    be those that are made.
    """
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=lr, fused=True if on_gpu else None, **options)


def _adam_of(parameters: Iterable[nn.Parameter], rest_lr: float, options: Options) -> torch.optim.AdamW:
    """AdamW for what an optimizer of matrices leaves; takes `betas` and `eps` out of `options`."""
    adam = {"betas": options.pop("betas"), "eps": options.pop("eps"), "weight_decay": options["weight_decay"]}
    return _adamw([{"params": list(parameters)}], rest_lr, **adam)


def _adamw_of_all(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
    return _adamw(_groups(matrices, rest, lr, rest_lr), lr, **options)


def _plain(package: str, name: str) -> Build:
    """A class that takes every parameter alike, and the options as keywords."""

    def build(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
        kind = getattr(importlib.import_module(package), name)
        built: Built = kind(_groups(matrices, rest, lr, rest_lr), lr=lr, **options)
        return built

    return build


def _low_rank(find: Callable[[], Any], of_the_group: tuple[str, ...]) -> Build:
    """A class that projects the groups which have a rank."""

    def build(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
        only = {key: options[key] for key in of_the_group}
        others = {key: value for key, value in options.items() if key not in only}
        built: Built = find()(_groups(matrices, rest, lr, rest_lr, **only), lr=lr, **others)
        return built

    return build


def _with_adamw(kind: Callable[..., torch.optim.Optimizer]) -> Build:
    """A class for matrices, and AdamW with its own rate, the options `betas` and `eps`, and the same decay."""

    def build(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
        options = dict(options)
        of_rest = _adam_of(rest.values(), rest_lr, options)
        return [kind(list(matrices.values()), lr=lr, **options), of_rest]

    return build


def _foam(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
    of_rest = _adam_of(rest.values(), rest_lr, dict(options))
    return [foam.FOAM(list(matrices.values()), lr, **options), of_rest]


def _scale(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
    """Embeddings and heads have the rate of the matrices, as in the authors' code, and vectors `rest_lr`."""
    options = dict(options)
    embeddings, heads, vectors = scale.parts(rest, options.pop("embedding"), options.pop("head"))
    of_vectors = [_adam_of(vectors, rest_lr, options)] if vectors else []
    others = {key: options[key] for key in ("momentum", "weight_decay")}
    return [scale.SCALE(matrices.values(), embeddings, heads, lr, **others), *of_vectors]


def _gwt(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: Options) -> Built:
    from gwt_dist import GWTAdamW

    others = options.pop("rest", None) or {}
    groups = _groups(matrices, rest, lr, rest_lr)
    return GWTAdamW([groups[0] | options, groups[1] | keys_of_rest(options, others)], lr=lr)


def _check_gwt(options: Options) -> None:
    keys = {key: value for key, value in options.items() if key != "rest"}
    check_group({"wavelet": "haar", **keys}, "a group")
    keys_of_rest(keys, options.get("rest") or {})


# Runs were recorded with these before a recipe said which keys it reads.
_RECORDED = "second_moment", "detail_gain", "limiter"


def _of_the_recipe(options: Options) -> Options:
    """What the recipe says of keys that are not given: a run that was made with another recipe is another run."""
    refuse_unknown_keys([options["recipe"]], RECIPES, "recipes")
    recipe, implied = resolved({"recipe": options["recipe"]})
    its = [key for key in sorted(own_keys()) if key in (*_RECORDED, *recipe.keys)]
    return {key: implied[key] for key in its if options.get(key) is None}


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
_MUON: Options = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw", **_ADAM}
_GALORE = ("rank", "update_proj_gap", "scale", "proj_type")
_APOLLO: Options = {"update_proj_gap": 200, "proj": "random", "proj_type": "std", "betas": (0.9, 0.999), "eps": 1e-6}
_APOLLO_GROUP = ("rank", "update_proj_gap", "scale", "proj", "proj_type", "scale_type")
_apollo = _low_rank(lambda: class_in("apollo_torch", "apollo", "AdamW"), _APOLLO_GROUP)

ENTRIES: dict[str, Entry] = {
    "gwt": Entry(
        _gwt,
        {"level": LEVEL, "recipe": DEFAULT, "weight_decay": 0.0},
        "gwt_dist",
        ("betas", "eps", "wavelet", "rest", *of_recipes()),
        _of_the_recipe,
        _check_gwt,
        lambda given: {"level": level_of(given.get("recipe"))},
    ),
    "adamw": Entry(_adamw_of_all, _ADAM, more=("amsgrad",)),
    "sgd": Entry(_plain("torch.optim", "SGD"), {"momentum": 0.9, "weight_decay": 0.0}, more=("nesterov", "dampening")),
    "adafactor": Entry(
        _plain("torch.optim", "Adafactor"), {"beta2_decay": -0.8, "d": 1.0, "weight_decay": 0.0}, more=("eps",)
    ),
    # With AdamW for what is no hidden matrix, as the documentation of torch.optim.Muon asks for; so are those below.
    # It is looked up when it is built, as torch has it since 2.9 alone.
    "muon": Entry(_with_adamw(lambda *matrices, **options: torch.optim.Muon(*matrices, **options)), _MUON),
    "muon-bf16": Entry(_with_adamw(peers.Muon), {**_MUON, "momentum_dtype": "bf16"}, "gwt_dist", check=peers.check),
    # arXiv 2509.23106: blocks of 2048, linear codes. AdamW's state stays in fp32.
    "muon-8bit": Entry(_with_adamw(peers.Muon), {**_MUON, "momentum_dtype": "int8"}, "gwt_dist", check=peers.check),
    # arXiv 2510.05491: both betas are 0.95, and an element moves by 0.2 of the rate.
    "normuon": Entry(_with_adamw(peers.NorMuon), {**_MUON, "beta2": 0.95}, "gwt_dist", check=peers.check),
    # arXiv 2603.20527, with the factor of the rate and the Nesterov step of the authors' code.
    "rmnp": Entry(
        _with_adamw(peers.RMNP),
        {"momentum": 0.95, "nesterov": True, "adjust_lr_fn": "original", **_ADAM},
        "gwt_dist",
        check=peers.check,
    ),
    # arXiv 2506.16659. Published rates: 1e-3, and 20 times as much for vectors (rest_factor: 20).
    "scale": Entry(_scale, {"momentum": 0.9, "embedding": "embed", "head": "lm_head", **_ADAM}, "gwt_dist"),
    # arXiv 2512.07112, as in the authors' code; their rate is 0.01. Our form of it is gwt with recipe: foam.
    "foam": Entry(
        _foam,
        {"level": 2, "scale": 0.25, "second_moment": "energy", "correct_bias": True, **_ADAM},
        "gwt_dist",
        check=foam.check,
    ),
    "galore": Entry(
        _low_rank(lambda: class_in("galore_torch", "adamw", "AdamW"), _GALORE),
        {"rank": 32, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "betas": (0.9, 0.999), "eps": 1e-6}
        | {"weight_decay": 0.0, "no_deprecation_warning": True},
        "galore-torch",
    ),
    "apollo": Entry(
        _apollo,
        {"rank": 32, "scale": 1.0, "scale_type": "channel", "weight_decay": 0.0, **_APOLLO},
        "apollo-torch",
        ("scale_front", "disable_nl"),
    ),
    "apollo-mini": Entry(
        _apollo,
        {"rank": 1, "scale": 128.0, "scale_type": "tensor", "weight_decay": 0.0, **_APOLLO},
        "apollo-torch",
        ("scale_front", "disable_nl"),
    ),
    "fira": Entry(
        _low_rank(
            lambda: importlib.import_module("pytorch_optimizer").Fira,
            ("rank", "update_proj_gap", "scale", "projection_type"),
        ),
        {"rank": 32, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std", "betas": (0.9, 0.999)}
        | {"eps": 1e-6, "weight_decay": 0.0},
        "pytorch_optimizer",
    ),
    "came": Entry(
        _plain("pytorch_optimizer", "CAME"),
        {"betas": (0.9, 0.999, 0.9999), "eps1": 1e-30, "eps2": 1e-16, "clip_threshold": 1.0, "weight_decay": 0.0},
        "pytorch_optimizer",
    ),
    # Stable-SPAM (arXiv 2502.17055): Adam of gradients with clipped spikes and even norms; moments are begun anew.
    "stable-spam": Entry(
        _plain("pytorch_optimizer", "StableSPAM"),
        {"gamma1": 0.7, "gamma2": 0.9, "theta": 0.999, "update_proj_gap": 1000, **_ADAM},
        "pytorch_optimizer",
        ("t_max", "eta_min"),
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

"""torchtitan: a container that knows the optimizer name ``GWTAdamW``, and its configuration for a model.

Run with torchtitan 0.3.0, whose `OptimizersContainer` builds optimizers by name and pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from gwt_dist import GWTAdamW
from gwt_dist.groups import keys_of_rest
from gwt_dist.recipes import DEFAULT, level_of

NAME = "GWTAdamW"


class GWTOptimizersContainer(OptimizersContainer[Any]):
    """torchtitan's container, for which ``GWTAdamW`` is a name beside those that it knows.

    Its state is keyed by names of parameters, as torchtitan's is, and its checkpoints are torch's own.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As torchtitan's."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        if name == NAME:
            return GWTAdamW
        factory: Callable[..., torch.optim.Optimizer] = OptimizersContainer._resolve_optimizer_factory(name)
        return factory


def optimizer_config(
    level: int | None = None,
    targets: Sequence[str] | Mapping[str, int] = (r"attention.*\.weight$", r"feed_forward.*\.weight$"),
    rest: Mapping[str, Any] | None = None,
    **options: Any,
) -> GWTOptimizersContainer.Config:
    """Configuration of the container: parameters that match a target get the level, all others level 0 (AdamW).

    Targets are torchtitan's patterns, searched in the full name of a parameter (such as
    ``layers.0.feed_forward.w1.weight``), the first that matches; their default is what torchtitan's Llama calls
    attention and MLP. torchtitan raises for a pattern that matches nothing. Normalisation weights that a target matches
    are 1-D, which is level 0 whatever their group says.

    Args:
        level: Level of the weights that match; None is what `GWTAdamW` has for the recipe.
        targets: Patterns, or a mapping from pattern to level.
        rest: Keys of what matches no target, ``level`` among them (0), as in `gwt_dist.param_groups`.
        options: Further keywords of `GWTAdamW`, for all groups.

    Raises:
        ValueError: If a pattern is not a regular expression, or there is none, or `rest` makes no sense.
    """
    level = level_of(options.get("recipe")) if level is None else level
    patterns = dict(targets) if isinstance(targets, Mapping) else dict.fromkeys(targets, level)
    if not patterns or isinstance(targets, str):
        raise ValueError(f"targets={targets!r} must be a sequence of patterns, or a mapping from pattern to level")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"target {pattern!r} is not a regular expression: {error}") from error
    keys = {pattern: {**options, "level": chosen} for pattern, chosen in patterns.items()}
    keys[".*"] = keys_of_rest({"recipe": DEFAULT, **options}, rest or {})
    groups = [
        ParamGroupConfig(pattern=pattern, optimizer_name=NAME, optimizer_kwargs=its) for pattern, its in keys.items()
    ]
    # torch's choices of implementation mean nothing here; this one asks for neither.
    return GWTOptimizersContainer.Config(param_groups=groups, implementation="for-loop")

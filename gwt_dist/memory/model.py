"""A model as names and shapes, from a module; `configs` has them from a configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from gwt_dist.groups import Grouped
from gwt_dist.memory.state import GroupSpec
from gwt_dist.targets import Matrix, Targets, levels_by_pattern, unmatched

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter of a model."""

    name: str
    shape: tuple[int, ...]
    matrix: Matrix | None = None  # what a target can match
    unit: str = ""  # the block that is wrapped by itself under FSDP; "" for the rest of the model
    trained: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The parameters of a model in the order of `named_parameters`, a shared one once."""

    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def trained(self) -> tuple[TensorSpec, ...]:
        """Those that an optimizer has."""
        return tuple(tensor for tensor in self.tensors if tensor.trained)


def groups_of(
    model: ModelSpec,
    level: int,
    targets: Targets,
    *,
    rest: Mapping[str, Any] | None = None,
    **group_options: Any,
) -> list[GroupSpec]:
    """The groups that `param_groups` makes of the model itself, with the same arguments.

    Raises `ValueError` as that does and as `GWTAdamW` does for `group_options`.
    """
    patterns = levels_by_pattern(targets, level)
    by_keys: Grouped[tuple[str, tuple[int, ...]]] = Grouped(group_options, rest or {})
    matched = [by_keys.choose((tensor.name, tensor.shape), tensor.matrix, patterns) for tensor in model.trained]
    told = unmatched(patterns, matched, [tensor.matrix for tensor in model.trained if tensor.matrix])
    if told:
        logger.warning(told)
    return [
        GroupSpec.of(keys, tuple(tensors), f"parameter group {number}")
        for number, (keys, tensors) in enumerate(by_keys.groups())
    ]


def of_module(module: nn.Module, name: str) -> ModelSpec:
    """The parameters of a module, which may be on the meta device."""
    from gwt_dist.blocks import matrices_of, outermost, shape_of

    matrices, blocks = matrices_of(module), tuple(outermost(module))
    tensors = []
    for full, parameter in module.named_parameters():
        unit = next((block for block in blocks if full.startswith(f"{block}.")), "")
        matrix = matrices.get(id(parameter))
        tensors.append(TensorSpec(full, shape_of(parameter), matrix, unit, parameter.requires_grad))
    return ModelSpec(name, tuple(tensors))

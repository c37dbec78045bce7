"""`describe`: which tensors of an optimizer have which level, and what their state takes, as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, nn

from gwt_dist.dtensor import local
from gwt_dist.engines import deepspeed, deepspeed_state
from gwt_dist.engines.attach import unwrapped
from gwt_dist.memory.state import ADAMW, GroupSpec
from gwt_dist.optimizer import GWTAdamW
from gwt_dist.shards import is_flat
from gwt_dist.units import level_of

VECTORS = "vectors and scalars"


@dataclass(frozen=True, slots=True)
class Row:
    """Tensors of a parameter group that have one shape, and names which differ in numbers alone."""

    name: str  # with ``*`` for numbers, '' where nobody knows it; `VECTORS` for all of less than two dimensions
    shape: tuple[int, ...]  # of each tensor; () for `VECTORS`
    group: int  # number of the parameter group
    level: int  # 0 for scalars and vectors
    update: str  # the recipe, or AdamW
    tensors: int
    elements: int
    bytes: int  # of the state of the whole tensors, on all ranks together; each once
    stacked: bool = False  # each is as many matrices as its first dimension says


@dataclass(frozen=True, slots=True)
class Description:
    """What `describe` found; as text a table, the highest level first."""

    rows: tuple[Row, ...]
    held: int  # bytes of state that this rank has now, 0 before the first step

    @property
    def elements(self) -> int:
        """Weights that the optimizer has."""
        return sum(row.elements for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of the state of all tensors, each once."""
        return sum(row.bytes for row in self.rows)

    def share(self, least: int = 1) -> float:
        """Of the weights, the part in tensors of level `least` or more, 0 to 1."""
        return sum(row.elements for row in self.rows if row.level >= least) / max(1, self.elements)

    def __str__(self) -> str:
        taken = sum(row.elements for row in self.rows if row.update != ADAMW) / max(1, self.elements)
        all_of_them = Row(f"({taken:.2%} not as {ADAMW})", (), 0, 0, "", 0, 0, 0)
        lines = [
            ("level", "update", "tensors", "elements", "share", "state", "shape", "name"),
            *(_line(row, str(row.level), row.elements / max(1, self.elements)) for row in self._sorted()),
            _line(replace(all_of_them, **self._sums()), "all", 1.0),
        ]
        columns = [list(column) for column in zip(*lines, strict=True)]
        for i, column in enumerate(columns):
            width = max(map(len, column))
            columns[i] = [cell.ljust(width) if i in (1, 6, 7) else cell.rjust(width) for cell in column]
        table = [*("  ".join(line).rstrip() for line in zip(*columns, strict=True))]
        held = f" This rank has {_size(self.held)} of state." if self.held else ""
        both = (
            f"{_size(self.bytes)} of state on all ranks together, where AdamW in fp32 has {_size(8 * self.elements)}."
        )
        return "\n".join([*table, both + held])

    def _sorted(self) -> list[Row]:
        return sorted(self.rows, key=lambda row: (-row.level, row.update == ADAMW, row.group))

    def _sums(self) -> dict[str, Any]:
        return {key: sum(getattr(row, key) for row in self.rows) for key in ("tensors", "elements", "bytes")}


def _line(row: Row, level: str, share: float) -> tuple[str, ...]:
    numbers = str(row.tensors), f"{row.elements:,}", f"{share:.2%}", _size(row.bytes)
    number, *matrix = row.shape if row.stacked else (0, *row.shape)
    shape = "x".join(map(str, matrix))
    return level, row.update, *numbers, f"{number} of {shape}" if number else shape, row.name


def describe(optimizer: Any, model: nn.Module | None = None) -> Description:
    """What got which level: ``print(gwt_dist.describe(optimizer))``.

    Shapes and bytes are those of whole tensors, whatever the engine, and the same on all ranks; no rank waits for
    another. Names are those of `model`, of the engine that the optimizer is attached to, or of the groups
    (``param_names``), or nobody knows them.

    Args:
        optimizer: A `GWTAdamW`, or what an engine or Accelerate has wrapped around one.
        model: The model whose parameters it has; under ZeRO it is not needed.

    Raises:
        ValueError: For another optimizer, for flat parameters of an engine that were never attached, and between the
            steps of ZeRO-3 for a `GWTAdamW` that is not passed as the engine's wrapper has it.
    """
    wrappers = list(unwrapped(optimizer))
    ours = next((one for one in wrappers if isinstance(one, GWTAdamW)), None)
    if ours is None:
        raise ValueError(
            f"{type(optimizer).__name__} is no GWTAdamW, nor around one, so nothing is known of its levels. Under "
            f"DeepSpeed transformers' Trainer leaves optimizers=(...) out: give it **trainer_kwargs(args)"
        )
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    rows: list[Row] = []
    for number, (group, parameters) in enumerate(zip(ours.param_groups, _members(ours, wrappers), strict=True)):
        keys = {key: its for key, its in group.items() if key not in ("params", "param_names")}
        spec = GroupSpec.of(keys, (), f"parameter group {number}")
        for (name, shape, level, update), shapes in _alike(ours, group, parameters, spec, names).items():
            sizes = sum(map(spec.whole, shapes))
            stacked = spec.stacked and len(shape) == 3
            rows.append(Row(name, shape, number, level, update, len(shapes), sum(map(prod, shapes)), sizes, stacked))
    held = [its for state in ours.state.values() for its in state.values() if isinstance(its, Tensor)]
    return Description(tuple(rows), sum(local(its).nbytes for its in held))


def _members(optimizer: GWTAdamW, wrappers: Iterable[Any]) -> list[list[Tensor]]:
    """The parameters of each group; those that stage 3 takes out of the groups between steps as DeepSpeed has them."""
    found: list[list[Tensor]] = [list(group["params"]) for group in optimizer.param_groups]
    held = {id(parameter) for parameters in found for parameter in parameters}
    for wrapper in wrappers:
        buffers = deepspeed.read(wrapper)
        numbers = [] if buffers is None else deepspeed_state.group_numbers(wrapper)
        for buffer, number in zip(buffers or (), numbers, strict=True):
            if id(buffer.parameter) not in held:
                found[number].append(buffer.parameter)
                held.add(id(buffer.parameter))
    if any(id(parameter) not in held for parameter in optimizer.shards):
        raise ValueError(
            "ZeRO-3 takes parameters out of the groups between steps, so it is not known which level they have. Pass "
            "the optimizer of the engine: gwt_dist.describe(engine.optimizer)"
        )
    return found


def _alike(
    optimizer: GWTAdamW, group: Mapping[str, Any], parameters: list[Tensor], spec: GroupSpec, names: Mapping[int, str]
) -> dict[tuple[str, tuple[int, ...], int, str], list[tuple[int, ...]]]:
    """Shapes of the tensors of a group by what a row says of them."""
    found: dict[tuple[str, tuple[int, ...], int, str], list[tuple[int, ...]]] = {}
    for name, shape in _tensors(optimizer, group, parameters, names):
        said = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), shape) if len(shape) >= 2 else (VECTORS, ())
        key = *said, level_of(shape, spec.level), str(group["recipe"]) if spec.takes(shape) else ADAMW
        found.setdefault(key, []).append(shape)
    return found


def _tensors(
    optimizer: GWTAdamW, group: Mapping[str, Any], parameters: list[Tensor], names: Mapping[int, str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names, '' for those that are not known, and shapes of the tensors of a group, in order."""
    own = group.get("param_names", ())
    own = own if len(own) == len(parameters) else [""] * len(parameters)  # an engine put a buffer in their place
    for name, parameter in zip(own, parameters, strict=True):
        if parameter in optimizer.shards:
            yield from ((one.fqn, one.shape) for one in optimizer.shards[parameter].tensors)
        elif is_flat(parameter) or not optimizer.is_given(parameter):
            raise ValueError(
                f"a flat parameter of {parameter.numel()} elements holds tensors that are unknown here, so what got "
                f"which level would be a guess. Call gwt_dist.attach(optimizer, engine) first"
            )
        else:
            yield names.get(id(parameter), name), tuple(getattr(parameter, "ds_shape", parameter.shape))


def _size(number: float) -> str:
    """Bytes as text, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"

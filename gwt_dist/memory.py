"""Optimizer-state bytes of a rank, from shapes alone: before anything is allocated, and exactly.

The fragments that ZeRO will make are written down here by arithmetic, without an engine; `layout` turns them into
moments as it does in a run. What an engine really made is read in `engines`, and tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from gwt_dist.kernels import level_of, units_of
from gwt_dist.layout import Fragment

FP32 = 4  # bytes; moments are fp32 whatever the weights are


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A parameter group by shapes: the trainable tensors in order, as ``(fqn, shape)``."""

    level: int
    wavelet: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of optimizer state on one rank, by the level of the tensors, beside AdamW's in fp32 on the same
    elements.
    """

    wavelet: int  # both moments of tensors with level > 0, cut units counted wherever they are kept
    wavelet_cut: int  # the part of `wavelet` that another rank owns
    wavelet_adamw: int  # what AdamW would hold for the elements of these tensors
    rest: int  # both moments of level-0 tensors, which is what AdamW holds
    scalars: int  # steps and limiter norms

    @property
    def total(self) -> int:
        """All state of the rank."""
        return self.wavelet + self.rest + self.scalars

    @property
    def adamw(self) -> int:
        """Moments of AdamW for the same elements."""
        return self.wavelet_adamw + self.rest


def specs(named_parameters: Iterable[tuple[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[GroupSpec]:
    """The groups that `param_groups` returned, by shapes; under `deepspeed.zero.Init` too."""
    names = {id(parameter): name for name, parameter in named_parameters}
    return [
        GroupSpec(
            group["level"],
            group.get("wavelet", "haar"),
            tuple((names[id(p)], tuple(getattr(p, "ds_shape", p.shape))) for p in group["params"]),
        )
        for group in groups
    ]


def plan_zero(
    groups: Sequence[GroupSpec], *, stage: int, world_size: int, rank: int, sub_group_size: int = 1_000_000_000
) -> StateBytes:
    """State bytes of `rank` under DeepSpeed ZeRO stage 1, 2 or 3 over `world_size` ranks."""
    split = _stage_3 if stage == 3 else _stage_1_and_2
    buffers = [(group, fragments) for group in groups for fragments in split(group, world_size, rank, sub_group_size)]
    return measure(buffers)


def measure(buffers: Iterable[tuple[GroupSpec, Sequence[Fragment]]]) -> StateBytes:
    """State bytes for flat buffers, each of which holds `fragments` of all tensors of one optimizer parameter.

    A tensor of which the rank holds nothing is an empty fragment: its limiter norm is kept by every rank.
    """
    wavelet = cut = wavelet_adamw = rest = scalars = 0
    for group, fragments in buffers:
        scalars += FP32 * (1 + len(fragments))
        for fragment in fragments:
            units = units_of(fragment.shape, group.level, group.wavelet)
            kept = units.moments(fragment).numel
            first, last = units.owned(fragment)
            if level_of(fragment.shape, group.level):
                wavelet += 2 * FP32 * kept
                cut += 2 * FP32 * (kept - fragment.rows * (last - first) * units.coefficients)
                wavelet_adamw += 2 * FP32 * fragment.numel
            else:
                rest += 2 * FP32 * kept
    return StateBytes(wavelet, cut, wavelet_adamw, rest, scalars)


def _stage_1_and_2(group: GroupSpec, world_size: int, rank: int, _: int) -> list[list[Fragment]]:
    """One buffer: the concatenated tensors in equal parts of an even number of elements."""
    numel = sum(prod(shape) for _, shape in group.tensors)
    part = 2 * ceil(numel / (2 * world_size))
    fragments, begin = [], 0
    for fqn, shape in group.tensors:
        start = min(max(0, rank * part - begin), prod(shape))
        stop = min(max(0, (rank + 1) * part - begin), prod(shape))
        fragments.append(Fragment(fqn, shape, start, stop))
        begin += prod(shape)
    return [fragments]


def _stage_3(group: GroupSpec, world_size: int, rank: int, sub_group_size: int) -> list[list[Fragment]]:
    """Each tensor in equal slots; a buffer takes tensors until their slots reach `sub_group_size`."""
    buffers: list[list[Fragment]] = [[]]
    filled = 0
    for fqn, shape in group.tensors:
        if filled >= sub_group_size:
            buffers.append([])
            filled = 0
        slot = ceil(prod(shape) / world_size)
        start = min(prod(shape), rank * slot)
        buffers[-1].append(Fragment(fqn, shape, start, min(prod(shape), start + slot)))
        filled += slot
    return buffers

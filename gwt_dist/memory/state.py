"""Optimizer-state bytes of one rank under ZeRO, from shapes alone: what a run is told before it allocates anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gwt_dist.layout import Fragment
from gwt_dist.memory import splits
from gwt_dist.units import level_of, units_of

# That of `GWTAdamW`, where a group does not say.
DEFAULT_RECIPE = "energy"
# Whether the limiter of a recipe is on where a group does not say: `recipes.RECIPES`, which needs torch.
LIMITED = {"paper": True, "energy": False, "orthogonal": False}
# Whether it keeps a second moment of tensors with level > 0 where a group does not say.
SECOND_MOMENT = {"paper": True, "energy": True, "orthogonal": False}
FP32 = 4  # bytes; moments are fp32 whatever the weights are, except for fp64 weights


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A parameter group by shapes: the trainable tensors in order, as ``(fqn, shape)``."""

    level: int
    wavelet: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    limited: bool = LIMITED[DEFAULT_RECIPE]  # a limiter above 0, so that norms are summed over ranks
    second_moment: bool = True  # of tensors with level > 0, whose momentum is orthogonalized if they have none

    @property
    def moments(self) -> int:
        """Moments of a tensor with level > 0."""
        return 1 + self.second_moment


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of optimizer state on one rank, by the level of the tensors, beside AdamW's in fp32 on the same
    elements.
    """

    wavelet: int  # moments of tensors with level > 0, cut units counted wherever they are kept
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
            LIMITED[group.get("recipe", DEFAULT_RECIPE)] if group.get("limiter") is None else group["limiter"] > 0,
            _second_moment(group),
        )
        for group in groups
    ]


def _second_moment(group: Mapping[str, Any]) -> bool:
    chosen = group.get("second_moment")
    return SECOND_MOMENT[group.get("recipe", DEFAULT_RECIPE)] if chosen is None else chosen != "none"


def plan_zero(
    groups: Sequence[GroupSpec], *, stage: int, world_size: int, rank: int, sub_group_size: int = 1_000_000_000
) -> StateBytes:
    """State bytes of `rank` under DeepSpeed ZeRO stage 1, 2 or 3 over `world_size` ranks."""
    buffers = []
    for group in groups:
        names, shapes = [name for name, _ in group.tensors], [shape for _, shape in group.tensors]
        if stage == 3:
            for numbers in splits.sub_groups(shapes, world_size, sub_group_size):
                slots = [splits.zero_3(shapes[i], world_size).fragments([names[i]], rank)[0] for i in numbers]
                buffers.append((group, slots))
        else:
            buffers.append((group, splits.zero_1_and_2(shapes, world_size)[0].fragments(names, rank)))
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
                wavelet += group.moments * FP32 * kept
                cut += group.moments * FP32 * (kept - fragment.rows * (last - first) * units.coefficients)
                wavelet_adamw += 2 * FP32 * fragment.numel
            else:
                rest += 2 * FP32 * kept
    return StateBytes(wavelet, cut, wavelet_adamw, rest, scalars)

"""Which tensors of a checkpoint go into which of the model's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gwt_dist.checkpoint.dtypes import safetensors_dtype
from gwt_dist.checkpoint.exclude import shown
from gwt_dist.checkpoint.format import FLOATS, WEIGHT, CheckpointError, Index
from gwt_dist.engines.weights import Weights

logger = logging.getLogger(__name__)
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Left:
    """Tensors that `load` did not touch, by name; each is false where there are none.

    Those of the model are what they were before, their masters included.

    Attributes:
        in_checkpoint: The model does not have them.
        in_model: The checkpoint does not have them.
        other_shape: Their shapes in the checkpoint, and here.
        excluded: They were left out of the save.
    """

    in_checkpoint: tuple[str, ...] = ()
    in_model: tuple[str, ...] = ()
    other_shape: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether any was left."""
        return bool(self.in_checkpoint or self.in_model or self.other_shape or self.excluded)


@dataclass(frozen=True, slots=True)
class Match:
    """What goes where."""

    sources: dict[str, str]  # name of a tensor here -> its name in the checkpoint; nothing for those that are left
    left: Left


def match(index: Index, weights: Weights, where: str, *, strict: bool, weights_only: bool) -> Match:
    """Find the tensor of a checkpoint for each of the model.

    With `weights_only` a tied parameter is found under any of its names, and `strict` says whether names of one side
    only, and other shapes, are errors; else they always are.

    Raises:
        CheckpointError: For those, if nothing matches at all, and for dtypes that are no rounding of each other.
    """
    here = {fragment.fqn: fragment.shape for local in weights.model for fragment in local.fragments}
    here |= {fragment.fqn: fragment.shape for local in weights.masters for fragment in local.fragments}
    saved = {name: entry.shape for name, entry in index.tensors.items()}
    saved |= {name: one.shape for name, one in index.excluded.items()}
    pairs = ((name, _source(name, saved, index, weights, weights_only)) for name in here)
    found = {name: source for name, source in pairs if source is not None}
    alone, missing = sorted(saved.keys() - found.values()), sorted(here.keys() - found)
    way_out = (
        "strict=False leaves" if weights_only else "weights_only=True with strict=False takes the weights and leaves"
    )
    way_out = f"; {way_out} such tensors as they are here"
    if strict:
        for names, lacks in ((alone, "this model"), (missing, where)):
            if names:
                raise CheckpointError(
                    f"{lacks} does not have {shown(names)}: the checkpoint is of another model{way_out}"
                )
    differ = {name: (saved[source], here[name]) for name, source in found.items() if saved[source] != here[name]}
    for name, (then, now) in differ.items():
        if strict:
            raise CheckpointError(
                f"{name!r} has shape {then} in {where} and {now} in this model: the checkpoint is of another "
                f"model{way_out}"
            )
    out = sorted(name for name, source in found.items() if source in index.excluded)
    sources = {name: source for name, source in found.items() if name not in differ and source in index.tensors}
    if not sources and saved:
        raise CheckpointError(
            f"nothing in {where} fits this model: it has {shown(saved)}, and the model {shown(here)}. Load it into the "
            f"module that it is of, before that is wrapped in another or renamed"
        )
    _check_dtypes(index, weights, sources, where)
    return Match(sources, Left(tuple(alone), tuple(missing), differ, tuple(out)))


def _source(name: str, saved: Iterable[str], index: Index, weights: Weights, by_any_name: bool) -> str | None:
    names = [name]
    if by_any_name:
        names += [other for other, first in weights.tied.items() if first == name]
        names += [index.tied[one] for one in names if one in index.tied]
    return next((one for one in names if one in saved), None)


def _check_dtypes(index: Index, weights: Weights, sources: Mapping[str, str], where: str) -> None:
    for local in [*weights.model, *weights.masters]:
        for fragment in local.fragments:
            if fragment.fqn not in sources:
                continue
            stored = index.tensors[sources[fragment.fqn]].parts[WEIGHT].dtype
            dtype = safetensors_dtype(local.buffer.dtype, fragment.fqn)
            if stored != dtype and not {stored, dtype} <= FLOATS:
                raise CheckpointError(f"{fragment.fqn!r} is {stored} in {where} and {dtype} here, which is no rounding")


def tell(left: Left, where: str) -> None:
    """Log what `strict=False` left."""
    shapes = (f"{name} {then} in place of {now}" for name, (then, now) in left.other_shape.items())
    for what, names in (
        ("are in the checkpoint alone", left.in_checkpoint),
        ("are in the model alone and stay as they are", left.in_model),
        ("have another shape and stay as they are", shapes),
        ("were left out of the save and stay as they are", left.excluded),
    ):
        if told := list(names):
            logger.warning("%s: %d tensors %s: %s", where, len(told), what, ", ".join(told))

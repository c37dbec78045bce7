"""State on its way from the formats of a checkpoint into those of this optimizer.

    chunks of the files  ->  as it was saved, whole cells, fp32 numbers  ->  as it is kept here

The noise of the rounding is that of the step that was saved, so the bits depend on no layout, and a conversion that is
made again, on other ranks, comes to the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gwt_dist import dtensor, extents, noise
from gwt_dist.checkpoint.elements import copy, flat
from gwt_dist.checkpoint.format import CheckpointError, Entry
from gwt_dist.checkpoint.holdings import Holding, Stepped
from gwt_dist.declare import Extent, Field
from gwt_dist.formats import FORMATS, scale_of
from gwt_dist.kernels.stored import StoredField
from gwt_dist.layout import Fragment
from gwt_dist.piece import Piece, stored_dtype
from gwt_dist.stacks import together


@dataclass(frozen=True, slots=True)
class Conversion:
    """One field over coefficients of one piece, saved in another format than it has here."""

    where: tuple[str, int, int]  # of the tensor in the checkpoint, see `Stepped.stored`
    saved: Field
    wanted: Field
    source: Piece  # in cells that are large enough for both formats, so that it has all that `target` keeps
    target: Piece
    stored: Mapping[str, Tensor]  # as saved: memory of its own, 1-D, codes and scales
    state: Mapping[str, Tensor]  # of this optimizer
    key: Tensor  # of the noise
    shift: int  # to the bits of it that the field takes

    @property
    def converted(self) -> set[tuple[str, str]]:
        """Tensor and field of what is not read as it stands."""
        return {(self.where[0], name) for field in (self.saved, self.wanted) for name in _parts(field)}

    def holdings(self) -> Iterator[Holding]:
        """What is to be filled from the checkpoint, in the formats that it has."""
        for name, buffer in self.stored.items():
            kept = together(self.source.places[name], *self.where)
            yield Holding(name, kept, kept, buffer)

    def finish(self) -> None:
        """Once `stored` is filled: put it into the state."""
        here = self.target.places[self.wanted.name]
        if not here.numel:
            return
        views = {}
        for name in _parts(self.wanted):
            place = self.target.places[name]
            views[name] = flat(dtensor.local(self.state[name])).narrow(0, place.offset, place.numel)
        values = StoredField.of(self.saved, self.source, self.stored).read()
        wanted = torch.empty(here.numel, dtype=values.dtype, device=values.device)
        for overlap in self.source.moments.intersect(replace(here, offset=0)):
            copy(wanted, values, overlap)
        StoredField.of(self.wanted, self.target, views).write(wanted, self.key, self.shift)


def conversions(
    one: Stepped, entries: Mapping[str, Entry], state: Mapping[str, Tensor], seed: int
) -> Iterator[Conversion]:
    """All that is needed of an optimizer parameter; `seed` is the "rounding_seed" of its group.

    Raises `CheckpointError` for cells that an index says of coefficients that have none.
    """
    places = {tensor.fqn: i for i, tensor in enumerate(one.plan.shard.tensors)}
    for target in one.plan.pieces:
        place = places[target.fragment.fqn]
        entry, fields = entries[one.names[place]], one.fields(place)
        before = {field.name: field for field in entry.fields}
        for number, wanted in enumerate(f for f in fields if f.extent is Extent.UNIT):
            saved = before[wanted.name]
            if saved == wanted:
                continue
            source = _source(one, target, saved, wanted, entry.name)
            device = dtensor.local(state[wanted.name]).device
            step = torch.tensor(entry.step, device=device)
            what, shift = noise.of_moment(number)
            yield Conversion(
                one.stored(target.fragment.fqn),
                saved,
                wanted,
                source,
                target,
                {
                    name: torch.zeros(source.places[name].numel, dtype=dtype, device=device)
                    for name, dtype in _parts(saved).items()
                },
                state,
                noise.key(step, what, seed, target.salt),
                shift,
            )


def _source(one: Stepped, target: Piece, saved: Field, wanted: Field, name: str) -> Piece:
    """The piece of the same fragment, whose places are those of one field as it was saved."""
    form, fragment = one.plan.form, target.fragment
    cell = max(FORMATS[f.format].cell for f in (saved, wanted))
    units = replace(target.units, cell=max(cell, target.units.cell))
    if cell > 1 and units.coefficients > 1:
        raise CheckpointError(
            f"{saved.name} of {name!r} is said to be stored in {saved.format}, {cell} neighbours together, which "
            f"wavelet={form.wavelet!r} has not: nothing says which number has which scale. The index is damaged"
        )
    moments = extents.kept(Extent.UNIT, fragment, units)
    kept: dict[str, Fragment] = {saved.name: moments}
    if FORMATS[saved.format].scaled:
        kept[scale_of(saved.name)] = extents.kept(Extent.CELL, fragment, units)
    return Piece.of(fragment, moments, form.level, form.wavelet, kept, units.cell)


def _parts(field: Field) -> dict[str, torch.dtype]:
    """Names and dtypes of the tensors that have a field over coefficients."""
    found = {field.name: stored_dtype(field, torch.float32)}
    return found | ({scale_of(field.name): torch.float32} if FORMATS[field.format].scaled else {})

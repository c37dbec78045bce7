"""What the ranks of `test_checkpoint_fields.py` run: state whose every number is known, whatever recipe it is of."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_cases import Trained, place
from gwt_dist import dtensor
from gwt_dist.checkpoint.holdings import Run, Stepped, flat
from gwt_dist.declare import Extent, Field, Pass, Program
from gwt_dist.layout import Fragment
from gwt_dist.programs import Options
from gwt_dist.recipes import RECIPES, Recipe

# A recipe that keeps something of every extent but an owner's, other things at level 0, and has no formula.
EVERY = "every extent"


def _program(options: Options) -> Program:
    fields = (Field(extent.value, extent) for extent in Extent if extent not in (Extent.CELL, Extent.OWNED))
    codes = Field("more", Extent.UNIT, "int8"), Field("more_scale", Extent.CELL)
    return Program("none", (*fields, *codes), (Pass("step", writes=True),))


def _plain(options: Options) -> Program:
    return Program("none", (Field("column", Extent.COLUMN), Field("unit", Extent.UNIT)), (Pass("step", writes=True),))


EVERY_EXTENT = Recipe(_program, _plain, lambda options: {}, ())


def known(name: str, fragment: Fragment, dtype: torch.dtype) -> Tensor:
    """The numbers of a field, called `name`, in the place of `fragment`."""
    random = torch.Generator().manual_seed(zlib.crc32(f"{fragment.fqn} {name}".encode()))
    whole = torch.randn(fragment.shape, generator=random).mul(50).to(dtype).view(-1)
    return torch.cat([whole[:0], *(whole[start:stop] for start, stop in fragment.intervals)])


def kept(one: Stepped, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Fragment, Tensor]]:
    """Of each field and tensor, what this rank keeps and where it is."""
    names = {tensor.fqn: name for tensor, name in zip(one.plan.shard.tensors, one.names, strict=True)}
    for piece in one.plan.pieces:
        for field, at in piece.places.items():
            numbers = flat(dtensor.local(state[field]))[at.offset : at.offset + at.numel]
            name = names.get(piece.fragment.fqn, one.names[0])
            yield field, Fragment(name, at.shape, at.start, at.stop, 0, at.rows), numbers


def fill(run: Run) -> None:
    """State after three steps, of known numbers."""
    for one in run.stepped:
        state = run.optimizer.state[one.parameter]
        state |= one.plan.fresh_state(one.parameter)
        state["step"].fill_(3)
        for field, fragment, numbers in kept(one, state):
            numbers.copy_(known(field, fragment, numbers.dtype))


def wrong(run: Run) -> list[str]:
    """What is not as `fill` fills it, empty if all is."""
    found = []
    for one in run.stepped:
        state = run.optimizer.state[one.parameter]
        if state.keys() != {"step", *one.plan.shapes} or state["step"] != 3:
            found.append(f"{one.names}: {list(state)} at step {state.get('step')}")
            continue
        for field, fragment, numbers in kept(one, state):
            if not torch.equal(numbers, known(field, fragment, numbers.dtype)):
                found.append(f"{field} of {fragment}")
    return found


def filled_case(folder: str, kinds: Sequence[str], recipe: str, save: bool) -> list[str]:
    """Save state of known numbers under each of these engines, or load all that was saved under each: what is wrong."""
    RECIPES.setdefault(EVERY, EVERY_EXTENT)
    found = []
    for kind in kinds:
        trained = Trained(kind, recipe=recipe)
        if save:
            fill(Run(trained.model, trained.optimizer))
            trained.save(place(folder, kind, torch.float32, 0), 3, random_states=False)
        else:
            for path in sorted(Path(folder).iterdir()):
                trained.load(str(path))
                found += [f"{path.name} in {kind}: {what}" for what in wrong(Run(trained.model, trained.optimizer))]
        trained.close()
    return found

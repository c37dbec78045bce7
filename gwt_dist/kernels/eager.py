"""Any program in torch operations, one piece after the other: the reference that every other kernel must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gwt_dist import noise
from gwt_dist.declare import Extent, Pass, Travel
from gwt_dist.formats import FORMATS, FP32, scale_of
from gwt_dist.formulas import FORMULAS, WRITES, Share
from gwt_dist.formulas.codecs import round_bf16
from gwt_dist.formulas.weights import decay_factor
from gwt_dist.kernels import guard
from gwt_dist.kernels.items import Part, Place
from gwt_dist.kernels.stored import StoredField
from gwt_dist.kernels.work import Tensors, Work
from gwt_dist.piece import math_dtype


def check(work: Work, tensors: Tensors) -> None:
    """Raise `ValueError` for a tensor that is not as its plan says; comes before all else, and changes nothing."""
    guard.check(work, tensors)


def count(work: Work, tensors: Tensors, first: Sequence[bool]) -> None:
    """Count this step of the parameters of which `first` is true; comes before all phases.

    Of the others, tensors that are stepped in another call before this one, it is counted.
    """
    steps = [step for step, is_first in zip(tensors.steps, first, strict=True) if is_first]
    if steps:
        torch._foreach_add_(steps, 1)


def phase(number: int, work: Work, tensors: Tensors, sums: list[Tensor]) -> None:
    """Phase `number`, a `Pass`, of all parts.

    `sums` has a vector (fp64) for each phase up to this one: what those before made of their complete sums, and the one
    to which this adds what this rank owns, at the places of its parts.
    """
    formula, program = FORMULAS[work.program.formula], work.program
    its = program.phases[number]
    assert isinstance(its, Pass), "whole matrices go by `rounds`"
    function = getattr(formula, its.function)
    for part in work.parts:
        its_share = share(part, work, tensors, sums[:number])
        found = function(its_share)
        _check_stored(its_share, its.function)
        if its.writes:
            write(part, work, tensors, found)
        else:
            for place in part.sums[number]:
                _add(part, place, found[place.name], sums[number])


def step(work: Work, tensors: Tensors) -> None:
    """All phases of tensors that this process holds whole, and what stands between them."""
    if not tensors.weights:
        return
    sums: list[Tensor] = []
    for number, its in enumerate(work.program.phases):
        assert isinstance(its, Pass), "whole matrices go by `rounds`"
        device = tensors.weights[0].device
        sums.append(torch.zeros(work.sizes[number], dtype=torch.float64, device=device))
        phase(number, work, tensors, sums)
        if its.then:
            settle(number, work, tensors, sums[-1])


def send(number: int, work: Work, tensors: Tensors, sums: list[Tensor], landing: Tensor) -> None:
    """State updated, and what is sent of each part put at its place in `landing`, ``[elements]``, fp32, bf16 or fp64.

    Phase `number` is a `Travel`; `sums` are the vectors of the phases before it, fp64. What is sent is rounded to the
    dtype of `landing`; padding of units is left out, and so are elements of cut cells that other ranks hold.
    """
    its = work.program.phases[number]
    assert isinstance(its, Travel), "only what travels is sent"
    function = getattr(FORMULAS[work.program.formula], its.send)
    for part in work.parts:
        its_share = share(part, work, tensors, sums[:number])
        u_NU = function(its_share)
        _check_stored(its_share, its.send)
        for target, padded in part.piece.views(landing, u_NU.view(-1), part.landing):
            target.copy_(padded)


def keep(number: int, work: Work, tensors: Tensors, landing: Tensor) -> None:
    """The weights of each part take what came back of it, at its place in `landing`, ``[elements]``."""
    its = work.program.phases[number]
    assert isinstance(its, Travel), "only what travels is kept"
    function = getattr(FORMULAS[work.program.formula], its.keep)
    for part in work.parts:
        fragment, rule = part.piece.fragment, tensors.rules[part.parameter]
        weight = tensors.weights[part.parameter].view(-1).narrow(0, fragment.offset, fragment.numel)
        elements = landing.narrow(0, part.landing, fragment.numel).to(math_dtype(weight.dtype))
        _take(part, work, tensors, weight, function(elements, fragment.shape, rule), 0)


def settle(number: int, work: Work, tensors: Tensors, sums: Tensor) -> None:
    """Put in the place of the complete sums of phase `number`, fp64, what later phases read of them.

    Of `tensors` TENSOR fields and rules are read; those of members without a gradient are among them.
    """
    program, its = work.program, work.program.phases[number]
    assert isinstance(its, Pass) and its.then, "there is nothing between these phases"
    known = {name: tensors.state[name] for name in program.names(Extent.TENSOR)}
    sums.copy_(getattr(FORMULAS[program.formula], its.then)(sums, work.lengths[number], known, tensors.rules))


def share(part: Part, work: Work, tensors: Tensors, sums: list[Tensor]) -> Share:
    """What a function of the formula is given; `sums` are those of the phases before, which are complete."""
    piece, program = part.piece, work.program
    stored = {}
    fields = [field for field in program.fields if field.extent is not Extent.OWNED]
    for field in fields:
        place = piece.places[field.name]
        stored[field.name] = tensors.state[field.name][part.parameter].view(-1).narrow(0, place.offset, place.numel)
    scales = {scale_of(f.name) for f in fields if FORMATS[f.format].scaled}
    kept = {f.name: StoredField.of(f, piece, stored) for f in fields if f.name not in scales}
    state = {name: its.read() for name, its in kept.items()}
    state |= {name: state[name][0] for name in program.names(Extent.TENSOR)}
    known = {place.name: place.read(vector) for its, vector in zip(part.sums, sums, strict=False) for place in its}
    rule, step = tensors.rules[part.parameter], tensors.steps[part.parameter]

    changes = {name: state[name]._version for name in kept if kept[name].field.format != FP32}

    def store(name: str) -> None:
        if name in changes:  # else it is the state itself
            what, shift = noise.of_moment(program.names(Extent.UNIT).index(name))
            kept[name].write(state[name], noise.key(step, what, int(rule["rounding_seed"]), piece.salt), shift)
            changes[name] = state[name]._version

    weight = tensors.weights[part.parameter].view(-1).narrow(0, piece.fragment.offset, piece.fragment.numel)
    return Share(gather(part, tensors), weight, state, known, step, rule, program, piece, store, changes)


def _check_stored(its: Share, function: str) -> None:
    """Raise `ValueError` if a function has changed what it did not `Share.keep`."""
    lost = [name for name, version in its.changes.items() if its.state[name]._version != version]
    if lost:
        raise ValueError(
            f"{function!r} of formula {its.program.formula!r} changed {', '.join(lost)} and did not keep it, so the "
            f"change would be lost: what is stored is codes. Call share.keep({lost[0]!r}) after the update"
        )


def gather(part: Part, tensors: Tensors) -> Tensor:
    """The gradient of the touched units, (units, U), cut cells completed, zeros at the padding of rows."""
    piece, gradient = part.piece, tensors.gradients[part.parameter].view(-1)
    dtype = math_dtype(tensors.weights[part.parameter].dtype)
    x_NU = torch.zeros((piece.touched, piece.units.length), dtype=dtype, device=gradient.device)
    for source, padded in piece.views(gradient, x_NU.view(-1), piece.fragment.offset):
        padded.copy_(source)
    for cut in part.cuts:
        its = x_NU.view(-1).narrow(0, cut.unit * piece.units.length, cut.length)
        its.copy_(tensors.exchange.narrow(0, cut.slot, cut.length))
    return x_NU


def write(part: Part, work: Work, tensors: Tensors, change: Tensor) -> None:
    """Write the weights of a part; `change` is (units, U)."""
    weight, fragment = tensors.weights[part.parameter].view(-1), part.piece.fragment
    for block, (source, padded) in zip(
        part.piece.blocks, part.piece.views(weight, change.view(-1), fragment.offset), strict=True
    ):
        _take(part, work, tensors, source, padded, block.source)


def _take(part: Part, work: Work, tensors: Tensors, weight: Tensor, change: Tensor, first: int) -> None:
    """Change `weight` in place, elements of a part from `first` on, in the precision of `change`; both of one shape."""
    rule, piece = tensors.rules[part.parameter], part.piece
    w = weight.to(change.dtype)
    WRITES[work.program.write](w, change, decay_factor(rule, change))
    if work.program.rounding == "stochastic" and weight.dtype == torch.bfloat16:
        its_key = noise.key(tensors.steps[part.parameter], noise.WEIGHT, int(rule["rounding_seed"]), piece.salt)
        its_noise = noise.noise(*piece.elements_at(first, weight.shape, weight.device), its_key)
        weight.copy_(round_bf16(w, noise.chance(its_noise)))
    elif w is not weight:
        weight.copy_(w)


def _add(part: Part, place: Place, values: Tensor | tuple[Tensor, ...], sums: Tensor) -> None:
    """Add the values of coefficients that this rank owns, (N,) fp64 for each number, to their places.

    A value of 0 dimensions is one of what this rank holds, of which no other rank holds anything.
    """
    piece = part.piece
    first, width, _ = piece.window
    for number, values_N in enumerate(values if isinstance(values, tuple) else (values,)):
        owned = piece.owned_matrix(values_N) if values_N.dim() else values_N
        if place.extent is Extent.TENSOR:
            sums[place.index[number]] += owned.sum()
            continue
        places = place.places(number, sums.device)
        if place.extent is Extent.ROW:
            sums.index_add_(0, places, owned.sum(1))
        else:
            sums.index_add_(0, places[first : first + width], owned.sum(0))

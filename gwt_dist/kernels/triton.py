"""All phases on a GPU in Triton: one launch for all items of one level and dtype. See `triton_kernels.py`.

Nothing here waits for the GPU: tables go there from pinned memory when what they say has changed, and never into memory
that was written before, which a captured CUDA graph may read again at each replay. Steps are read on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gwt_dist.declare import Pass, Program
from gwt_dist.formats import FORMATS, FP32
from gwt_dist.kernels import eager, guard
from gwt_dist.kernels.build import BuildError
from gwt_dist.kernels.items import Item
from gwt_dist.kernels.kept import Kept
from gwt_dist.kernels.tables import Kinds, limited_of, parameters_of, rules_of
from gwt_dist.kernels.variant import PASSES, parts
from gwt_dist.kernels.work import Tensors, Work
from gwt_dist.piece import stored_dtype

SUFFIX = ".py"  # of the files of `variant`
STORES: Sequence[str] = (*FORMATS, "nearest", "stochastic")
CHUNK = 1 << 12  # elements of a program: small, so that many programs hide each other's waiting for memory
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_TURNS = 4  # of a program whose places are not plain: all at once would take most registers for places
_PARTIALS = 1024  # partial norms and ...
_SIZES = 32  # ... step sizes ...
_WARPS = 32  # that a program has at most
_NORMS = 256  # ... and norms that a program takes at once


def check(work: Work, tensors: Tensors) -> None:
    """As `eager.check`, of sizes of state; what else there is to ask is asked when tensors have moved, see `tables`."""
    numels, state = work.numels, tensors.state
    try:
        fits = all(tuple(map(Tensor.numel, state[name])) == numels[name] for name in work.program.names())
    except TypeError:  # one of them is no tensor
        fits = False
    if not fits:
        guard.check(work, tensors)  # says which

    if not tensors.weights:
        return
    kept = _kept_of(work, tensors.exchange.device)
    parameters_of(work, tensors, kept)
    if any(isinstance(its, Pass) and its.then for its in work.program.phases):
        limited_of(work, tensors, kept)


def count(work: Work, tensors: Tensors, first: Sequence[bool]) -> None:
    """As `eager.count`, with all numbers that change from step to step: one launch."""
    if work.program.travels:  # what changes from step to step is made when it is sent
        eager.count(work, tensors, first)
        return
    kept, length = _kept_of(work, tensors.exchange.device), len(tensors.weights)
    programs = (-(-length // _SIZES),)
    _kernels().count[programs](
        parameters_of(work, tensors, kept)[0],
        kept.get("first", first, lambda: kept.upload(first, torch.float32)),
        rules_of(tensors, kept).table,
        _sizes(length, kept),
        length,
        OF_DETAIL=_functions(work.program)["details"].sizes,
        BLOCK=_SIZES,
        **{**OPTIONS, "num_warps": 1},
    )


def phase(number: int, work: Work, tensors: Tensors, sums: list[Tensor]) -> None:
    """As `eager.phase`."""
    if work.program.travels:
        _travel().norms(work, tensors, sums[number])
    else:
        _phase(number, work, tensors, _kept_of(work, tensors.exchange.device), sums)


def settle(number: int, work: Work, tensors: Tensors, sums: Tensor) -> None:
    """As `eager.settle`, in one launch."""
    kept = _kept_of(work, sums.device)
    limited, rules = limited_of(work, tensors, kept), rules_of(tensors, kept).table
    if len(limited):
        programs = (-(-len(limited) // _NORMS),)
        _kernels().limit[programs](limited, rules, sums, len(limited), BLOCK=_NORMS, **OPTIONS)


def step(work: Work, tensors: Tensors) -> None:
    """As `eager.step`; without a limiter the gradient is read once."""
    kept = _kept_of(work, tensors.exchange.device)
    empty = partial(torch.empty, dtype=torch.float64, device=kept.device)
    sums: list[Tensor] = kept.get("sums", work.sizes, lambda: [empty(size) for size in work.sizes])
    for number in range(len(sums)):
        _phase(number, work, tensors, kept, sums, whole=True)


def send(number: int, work: Work, tensors: Tensors, sums: list[Tensor], landing: Tensor) -> None:
    """As `eager.send`."""
    _travel().send(work, tensors, sums[0], landing)


def keep(number: int, work: Work, tensors: Tensors, landing: Tensor) -> None:
    """As `eager.keep`."""
    _travel().keep(work, tensors, landing)


def _travel() -> Any:
    from gwt_dist.kernels import triton_travel  # which asks for the tables here

    return triton_travel


def prepare(program: Program | None = None) -> None:
    """Raises `BuildError` if triton is not installed or finds no GPU; `program` is compiled when launched."""
    try:
        import triton
    except ImportError as error:
        raise BuildError(
            f"the Triton kernels of gwt_dist need the package triton ({error}); steps on a GPU would run several times "
            f"slower without it. Install the version that torch names: pip install triton"
        ) from error
    if interpreted():
        return
    try:
        triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        raise BuildError(f"the Triton kernels of gwt_dist need a GPU, and triton finds none: {error}") from error


def takes(device: torch.device) -> bool:
    """Whether the kernels can run on `device`: a GPU, or the CPU where ``TRITON_INTERPRET=1`` interprets them."""
    return device.type == ("cpu" if interpreted() else "cuda")


def interpreted() -> bool:
    """Whether Triton interprets the kernels, which was decided when they were imported."""
    try:
        kernels = _kernels()
    except ImportError:
        return False
    return type(kernels.phase).__name__ == "InterpretedFunction"


@cache
def _kernels() -> Any:
    from gwt_dist.kernels import triton_kernels

    return triton_kernels


@cache
def _functions(program: Program) -> dict[str, Any]:
    """The modules of the files that the kernels of `program` are put together from, by folder."""
    return {folder: import_module(f"gwt_dist.kernels.{folder}.{name}") for folder, name in parts(program).items()}


@dataclass(frozen=True, slots=True)
class _Group:
    """Items that one launch takes."""

    level: int
    weight: str  # names of dtypes
    gradient: str
    plain: bool
    items: Tensor


@dataclass(frozen=True, slots=True)
class _Programs:
    """All items of a work, by launch, and where their norms are added up."""

    groups: list[_Group]
    cell: int  # units that are in one turn of a program
    noisy: bool  # `takes_noise` of what they run
    norms: Tensor  # [norms, 3]: place in the vector of squared norms; first partial norm and the one after the last
    partials: Tensor  # scratch


def options(plain: bool, level: int, cell: int = 1, noisy: bool = False) -> dict[str, Any]:
    """With what the kernel of all phases is compiled, beside its functions and dtypes.

    A program takes whole cells of `cell` units at once; `noisy` is `takes_noise` of what it runs.
    """
    # Where places are not plain, no fewer elements than a warp has lanes: the first may lie anywhere in its line. Noise
    # and codes take registers.
    elements = (CHUNK if plain else max(32, CHUNK // _TURNS)) // (2 if noisy else 1)
    block = max(cell, elements >> level, 1)
    more = max(1, (block << level) // elements)  # for no more elements of a thread where cells are long
    return {**OPTIONS, "PLAIN": plain, "BLOCK": block, "num_warps": min(_WARPS, (8 if plain else 4) * more)}


def takes_noise(program: Program) -> bool:
    """Whether anything that `program` stores is rounded by noise."""
    return program.rounding == "stochastic" or any(field.format != FP32 for field in program.fields)


def formats(program: Program, *names: str) -> list[Any]:
    """The dtypes in which Triton has these fields stored; of those that a program has not, that of fp32."""
    import triton.language as tl

    stored = {field.name: stored_dtype(field, torch.float32) for field in program.fields}
    return [getattr(tl, str(stored.get(name, torch.float32)).removeprefix("torch.")) for name in names]


_kept: WeakKeyDictionary[Work, Kept] = WeakKeyDictionary()


def _kept_of(work: Work, device: torch.device) -> Kept:
    kept = _kept.get(work)
    if kept is None or kept.device != device:
        kept = _kept[work] = Kept(device)
    return kept


def _sizes(count: int, kept: Kept) -> Tensor:
    """What `count` leaves for the phases after it, ``[parameters, sizes]`` fp64."""
    shape = count, _kernels().SIZES.value
    found: Tensor = kept.get("sizes", shape, lambda: torch.empty(shape, dtype=torch.float64, device=kept.device))
    return found


def _phase(number: int, work: Work, tensors: Tensors, kept: Kept, sums: list[Tensor], whole: bool = False) -> None:
    """A phase; of a `whole` step with what follows it, and then `sums` may hold anything."""
    import triton.language as tl

    if not tensors.weights:
        return
    its = work.program.phases[number]
    assert isinstance(its, Pass), "whole matrices go by `rounds`"
    moments, write = PASSES[its.function]
    kernels, functions, rules = _kernels(), _functions(work.program), rules_of(tensors, kept).table
    parameters, kinds = parameters_of(work, tensors, kept)
    programs: _Programs = kept.get("programs", (kinds,), lambda: _programs(work, kinds, kept))
    sizes = _sizes(len(tensors.weights), kept)
    moments_of = "exp_avg", "exp_avg_sq"
    exp_avg, exp_avg_sq = kept.get("formats", moments_of, lambda: formats(work.program, *moments_of))
    for group in programs.groups:
        kernels.phase[(len(group.items),)](
            group.items,
            parameters,
            rules,
            sizes,
            tensors.exchange,
            sums[number - 1] if write and not moments else sizes,
            programs.partials,
            SECOND=functions["formulas"].second,
            CHANGE=functions["details"].change,
            WRITTEN=functions["writes"].written,
            MOMENTS=moments,
            WRITE=write,
            LEVEL=group.level,
            GAIN=2.0 ** (-group.level / 2),
            WEIGHT=getattr(tl, group.weight),
            GRADIENT=getattr(tl, group.gradient),
            EXP_AVG=exp_avg,
            EXP_AVG_SQ=exp_avg_sq,
            STOCHASTIC=work.program.rounding == "stochastic",
            **options(group.plain, group.level, programs.cell, programs.noisy),
        )
    if not write and len(programs.norms):
        limit = whole and bool(its.then)
        kernels.add_partials[(len(programs.norms),)](
            programs.partials,
            programs.norms,
            limited_of(work, tensors, kept) if limit else programs.norms,
            rules,
            sums[number],
            ADD=not whole,
            LIMIT=limit,
            BLOCK=_PARTIALS,
            **OPTIONS,
        )


def _programs(work: Work, kinds: Kinds, kept: Kept) -> _Programs:
    """The items of a work, grouped by what a kernel is compiled for."""
    table = work.table(CHUNK, joined=False)  # a cell lies in one turn of a program
    column = dict(zip(Item._fields, table.unbind(1), strict=True))
    number, level, norm = column["parameter"], column["level"], column["norm"]
    plain = torch.tensor(kinds.aligned)[number] & (column["rows"] == 1) & (column["slot"] < 0)
    plain &= column["last"] == 1 << level
    for name in ("element", "moment", "units"):
        plain &= column[name] % 16 == 0
    plain &= (column["landing"] % 16 == 0) | (column["landing"] < 0)
    noisy = takes_noise(work.program)
    if noisy:
        # Noise is of rows and columns: 16 neighbours are of one row, see `triton_formats.ALIKE`.
        unit, row_units = column["column"] >> level, -(-column["columns"] >> level)
        plain &= (unit % 16 + row_units % 16 == 0) | (unit + column["units"] <= row_units)

    # Partial norms of one tensor lie side by side, whichever launch they come from.
    counted = (norm >= 0).nonzero().view(-1)
    counted = counted[norm[counted].argsort(stable=True)]
    place = torch.full_like(norm, -1)
    place[counted] = torch.arange(len(counted))
    places, lengths = norm[counted].unique_consecutive(return_counts=True)
    ends = lengths.cumsum(0)

    items = torch.cat([table, place[:, None]], 1)
    wide = [[dtype == torch.float32 for dtype in each] for each in (kinds.weights, kinds.gradients)]
    keys = torch.stack([level, *(torch.tensor(each)[number].long() for each in wide), plain.long()], 1)
    groups = []
    for key in keys.unique(dim=0):
        chosen = items[(keys == key).all(1)]
        of_level, weight, gradient, is_plain = key.tolist()
        dtypes = ("bfloat16", "float32")
        groups.append(
            _Group(of_level, dtypes[weight], dtypes[gradient], bool(is_plain), kept.upload(chosen, torch.int64))
        )
    norms = kept.upload(torch.stack([places, ends - lengths, ends], 1), torch.int64)
    cell = max((part.piece.units.cell for part in work.parts), default=1)
    partials = torch.empty(len(counted), dtype=torch.float64, device=kept.device)
    return _Programs(groups, cell, noisy, norms, partials)

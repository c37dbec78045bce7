"""All phases on a GPU in Triton: one launch for all items of one level and dtype. See `triton_kernels.py`.

Nothing here waits for the GPU: tables go there from pinned memory when what they say has changed, and never into memory
that was written before, which a captured CUDA graph may read again at each replay. Steps are read on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gwt_dist.declare import Pass, Program
from gwt_dist.kernels import guard
from gwt_dist.kernels.build import BuildError
from gwt_dist.kernels.kept import Kept
from gwt_dist.kernels.tables import Kinds, limited_of, parameters_of, rules_of
from gwt_dist.kernels.variant import PASSES, parts
from gwt_dist.kernels.work import Item, Tensors, Work

SUFFIX = ".py"  # of the files of `variant`
CHUNK = 1 << 12  # elements of a program: small, so that many programs hide each other's waiting for memory
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_TURNS = 4  # of a program whose places are not plain: all at once would take most registers for addresses
_PARTIALS = 1024  # partial norms and ...
_SIZES = 32  # ... step sizes ...
_NORMS = 256  # ... and norms that a program takes at once


def check(work: Work, tensors: Tensors) -> None:
    """As `eager.check`, of sizes; what else is asked of tensors is asked when they have moved, see `tables`."""
    names = work.program.names()
    sizes = [map(Tensor.numel, tensors.weights), *(work.numels[name] for name in names)]
    found = [tensors.gradients, *(tensors.state[name] for name in names)]
    try:
        fits = all(list(map(Tensor.numel, its)) == list(expected) for expected, its in zip(sizes, found, strict=True))
    except TypeError:  # one of them is no tensor
        fits = False
    if not fits:
        guard.check(work, tensors)  # says which

    def look(kept: Kept) -> None:
        parameters_of(work, tensors, kept)
        if work.norms:
            limited_of(work, tensors, kept)

    _run(work, tensors.exchange.device, look)


def count(steps: list[Tensor]) -> None:
    """As `eager.count`."""
    torch._foreach_add_(steps, 1)


def phase(number: int, work: Work, tensors: Tensors, sums: list[Tensor]) -> None:
    """As `eager.phase`."""
    _run(work, tensors.exchange.device, lambda kept: _phase(number, work, tensors, kept, sums))


def settle(work: Work, tensors: Tensors, sums: Tensor) -> None:
    """As `eager.settle`, in place; of `tensors` state and rules are read."""
    _run(work, sums.device, lambda kept: _settle(work, tensors, kept, sums))


def step(work: Work, tensors: Tensors) -> None:
    """As `eager.step`; without a limiter the gradient is read once."""

    def phases(kept: Kept) -> None:
        sums = [torch.zeros(size, dtype=torch.float64, device=kept.device) for size in work.sizes]
        for number, its in enumerate(work.program.phases):
            _phase(number, work, tensors, kept, sums)
            if isinstance(its, Pass) and its.then:
                _settle(work, tensors, kept, sums[number])

    _run(work, tensors.exchange.device, phases)


def send(number: int, work: Work, tensors: Tensors, sums: list[Tensor], landing: Tensor) -> None:
    """As `eager.send`."""
    raise NotImplementedError("nothing that travels has compiled kernels yet")


def keep(number: int, work: Work, tensors: Tensors, landing: Tensor) -> None:
    """As `eager.keep`."""
    raise NotImplementedError("nothing that travels has compiled kernels yet")


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
    norms: Tensor  # [norms, 3]: place in the vector of squared norms; first partial norm and the one after the last
    partials: Tensor  # scratch


_kept: WeakKeyDictionary[Work, Kept] = WeakKeyDictionary()


def _run(work: Work, device: torch.device, do: Callable[[Kept], None]) -> None:
    """Call `do` on `device` with what is kept there of `work`."""
    kept = _kept.get(work)
    if kept is None or kept.device != device:
        kept = _kept[work] = Kept(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        do(kept)


def _phase(number: int, work: Work, tensors: Tensors, kept: Kept, sums: list[Tensor]) -> None:
    its = work.program.phases[number]
    assert isinstance(its, Pass), "whole matrices go by `rounds`"
    moments, write = PASSES[its.function]
    rho = sums[number - 1] if write and not moments else None
    _launch((moments, write), work, tensors, kept, None if write else sums[number], rho)


def _settle(work: Work, tensors: Tensors, kept: Kept, sums: Tensor) -> None:
    limited, rules = limited_of(work, tensors, kept), rules_of(tensors, kept).table
    if len(limited):
        programs = (-(-len(limited) // _NORMS),)
        _kernels().limit[programs](limited, rules, sums, len(limited), BLOCK=_NORMS, **OPTIONS)


def _launch(
    phase: tuple[bool, bool],
    work: Work,
    tensors: Tensors,
    kept: Kept,
    squared_norms: Tensor | None,
    rho: Tensor | None,
) -> None:
    import triton.language as tl

    kernels, count, (moments, write) = _kernels(), len(tensors.weights), phase
    if not count:
        return
    functions, rules = _functions(work.program), rules_of(tensors, kept).table
    parameters, kinds = parameters_of(work, tensors, kept)
    programs: _Programs = kept.get("programs", (kinds,), lambda: _programs(work, kinds, kept))
    shape = count, kernels.SIZES.value
    sizes = kept.get("sizes", shape, lambda: torch.empty(shape, dtype=torch.float64, device=kept.device))
    if write:
        programs_of_sizes = (-(-count // _SIZES),)
        kernels.step_sizes[programs_of_sizes](
            parameters,
            rules,
            sizes,
            count,
            OF_DETAIL=functions["details"].sizes,
            BLOCK=_SIZES,
            **{**OPTIONS, "num_warps": 1},
        )
    for group in programs.groups:
        kernels.phase[(len(group.items),)](
            group.items,
            parameters,
            rules,
            sizes,
            tensors.exchange,
            sizes if rho is None else rho,
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
            PLAIN=group.plain,
            BLOCK=max(1, (CHUNK if group.plain else CHUNK // _TURNS) >> group.level),
            **OPTIONS,
        )
    if squared_norms is not None and len(programs.norms):
        kernels.add_partials[(len(programs.norms),)](programs.partials, programs.norms, squared_norms, BLOCK=_PARTIALS)


def _programs(work: Work, kinds: Kinds, kept: Kept) -> _Programs:
    """The items of a work, grouped by what a kernel is compiled for."""
    table = work.table(CHUNK)
    column = dict(zip(Item._fields, table.unbind(1), strict=True))
    number, level, norm = column["parameter"], column["level"], column["norm"]
    plain = torch.tensor(kinds.aligned)[number] & (column["rows"] == 1) & (column["slot"] < 0)
    plain &= column["last"] == 1 << level
    for name in ("element", "moment", "units"):
        plain &= column[name] % 16 == 0

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
    return _Programs(groups, norms, torch.empty(len(counted), dtype=torch.float64, device=kept.device))

"""All phases on a GPU in Triton: one launch for all items of one level and dtype. See `triton_kernels.py`.

Nothing here waits for the GPU: tables go there from pinned memory when what they say has changed, and never into memory
that was written before, which a captured CUDA graph may read again at each replay. Learning rates that are tensors, and
steps, are read on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gwt_dist.declare import Pass, Program, Rule
from gwt_dist.kernels import eager, guard
from gwt_dist.kernels.build import BuildError
from gwt_dist.kernels.kept import Kept
from gwt_dist.kernels.variant import PASSES, parts
from gwt_dist.kernels.work import Item, Tensors, Work

SUFFIX = ".py"  # of the files of `variant`
CHUNK = 1 << 12  # elements of a program: small, so that many programs hide each other's waiting for memory
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_TURNS = 4  # of a program whose places are not plain: all at once would take most registers for places
_PARTIALS = 1024  # partial norms and ...
_SIZES = 32  # ... step sizes that a program takes at once
_FLOATS = (torch.float32, torch.bfloat16)


def check(work: Work, tensors: Tensors) -> None:
    """As `eager.check`, of sizes alone; what else is asked of tensors is asked when they have moved, see `_check`."""
    sizes = [[weight.numel() for weight in tensors.weights], *(work.numels[name] for name in work.program.names())]
    found = [tensors.gradients, *(tensors.state[name] for name in work.program.names())]
    for expected, its in zip(sizes, found, strict=True):
        if [tensor.numel() for tensor in its] != list(expected):
            guard.check(work, tensors)


def count(steps: list[Tensor]) -> None:
    """As `eager.count`."""
    torch._foreach_add_(steps, 1)


def phase(number: int, work: Work, tensors: Tensors, sums: list[Tensor]) -> None:
    """As `eager.phase`."""
    its = work.program.phases[number]
    assert isinstance(its, Pass), "whole matrices go by `rounds`"
    if work.program.travels:
        _travel().norms(work, tensors, sums[number])
        return
    moments, write = PASSES[its.function]
    rho = sums[number - 1] if write and not moments else None
    _run((moments, write), work, tensors, None if write else sums[number], rho)


def step(work: Work, tensors: Tensors) -> None:
    """As `eager.step`; without a limiter the gradient is read once."""
    eager.in_turn(phase, work, tensors)


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
    norms: Tensor  # [norms, 3]: place in the vector of squared norms; first partial norm and the one after the last
    partials: Tensor  # scratch


def options(plain: bool, level: int) -> dict[str, Any]:
    """With what the kernel of all phases is compiled, beside its functions and dtypes."""
    # Where places are not plain, no fewer elements than a warp has lanes: the first may lie anywhere in its line.
    if plain:
        return {**OPTIONS, "PLAIN": True, "BLOCK": max(1, CHUNK >> level)}
    return {**OPTIONS, "PLAIN": False, "BLOCK": max(1, max(32, CHUNK // _TURNS) >> level), "num_warps": 4}


_kept: WeakKeyDictionary[Work, Kept] = WeakKeyDictionary()


def _run(
    phase: tuple[bool, bool], work: Work, tensors: Tensors, squared_norms: Tensor | None, rho: Tensor | None
) -> None:
    if not tensors.weights:
        return
    device = tensors.weights[0].device
    kept = _kept.get(work)
    if kept is None or kept.device != device:
        kept = _kept[work] = Kept(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _launch(phase, work, tensors, kept, squared_norms, rho)


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
    functions = _functions(work.program)
    rules, which = _rules(tensors.rules, kept)
    parameters, programs = _tables(work, tensors, which, kept)
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
            **options(group.plain, group.level),
        )
    if squared_norms is not None and len(programs.norms):
        kernels.add_partials[(len(programs.norms),)](programs.partials, programs.norms, squared_norms, BLOCK=_PARTIALS)


def _rules(rules: Sequence[Rule], kept: Kept) -> tuple[Tensor, list[int]]:
    """The numbers of the rules that differ, ``[rules, numbers]`` fp64, and which of them each parameter has."""
    distinct = {id(rule): rule for rule in rules}
    numbers = {key: i for i, key in enumerate(distinct)}
    rows = tuple(_row(rule, kept.device) for rule in distinct.values())
    table: Tensor = kept.get("rules", rows, lambda: kept.upload(rows, torch.float64))
    for i, rule in enumerate(distinct.values()):
        if _on_device(rule.lr, kept.device):
            table[i, :1].copy_(rule.lr.view(-1))
    return table, [numbers[id(rule)] for rule in rules]


def _row(rule: Rule, device: torch.device) -> tuple[float, ...]:
    lr = 0.0 if _on_device(rule.lr, device) else float(rule.lr)
    return lr, *(float(rule[name]) for name in _kernels().NUMBERS[1:])


def _on_device(lr: float | Tensor, device: torch.device) -> TypeGuard[Tensor]:
    """Whether a learning rate must not be read here: it would be to wait for the GPU."""
    return isinstance(lr, Tensor) and lr.device.type == device.type


def _tables(work: Work, tensors: Tensors, which: list[int], kept: Kept) -> tuple[Tensor, _Programs]:
    """Where the tensors of each parameter lie, ``[parameters, 6]`` int64, and the programs that go with them."""
    lists = tensors.weights, tensors.gradients, tensors.state["exp_avg"], tensors.state["exp_avg_sq"], tensors.steps
    pointers = [tuple(tensor.data_ptr() for tensor in each) for each in lists]
    dtypes = [tuple(tensor.dtype for tensor in each) for each in lists[:2]]

    def make() -> tuple[Tensor, _Programs]:
        _check(tensors, kept.device)
        aligned = [all(pointer % 16 == 0 for pointer in each) for each in zip(*pointers[:4], strict=True)]
        programs = kept.get("programs", (*dtypes, *aligned), lambda: _programs(work, tensors, aligned, kept))
        return kept.upload(list(zip(*pointers, which, strict=True)), torch.int64), programs

    source = *pointers, *dtypes, tuple(which)
    tables: tuple[Tensor, _Programs] = kept.get("tables", source, make)
    return tables


def _check(tensors: Tensors, device: torch.device) -> None:
    kinds = {
        "weight": (tensors.weights, _FLOATS),
        "gradient": (tensors.gradients, _FLOATS),
        "exp_avg": (tensors.state["exp_avg"], [torch.float32]),
        "exp_avg_sq": (tensors.state["exp_avg_sq"], [torch.float32]),
        "step": (tensors.steps, [torch.float32]),
    }
    for name, (each, dtypes) in kinds.items():
        for i, tensor in enumerate(each):
            if tensor.device != device or tensor.dtype not in dtypes or not tensor.is_contiguous():
                raise ValueError(
                    f"the {name} of parameter {i} of this step, shape {tuple(tensor.shape)}, is {tensor.dtype} on "
                    f"{tensor.device}{'' if tensor.is_contiguous() else ', not dense'}; the Triton kernels would read "
                    f"wrong memory. They take dense {' or '.join(map(str, dtypes))} on {device}; "
                    f"GWT_DIST_KERNEL=eager takes everything"
                )


def _programs(work: Work, tensors: Tensors, aligned: list[bool], kept: Kept) -> _Programs:
    """The items of a work, grouped by what a kernel is compiled for."""
    table = work.table(CHUNK)
    column = dict(zip(Item._fields, table.unbind(1), strict=True))
    number, level, norm = column["parameter"], column["level"], column["norm"]
    plain = torch.tensor(aligned)[number] & (column["rows"] == 1) & (column["slot"] < 0)
    plain &= column["last"] == 1 << level
    for name in ("element", "moment", "units"):
        plain &= column[name] % 16 == 0
    plain &= (column["landing"] % 16 == 0) | (column["landing"] < 0)

    # Partial norms of one tensor lie side by side, whichever launch they come from.
    counted = (norm >= 0).nonzero().view(-1)
    counted = counted[norm[counted].argsort(stable=True)]
    place = torch.full_like(norm, -1)
    place[counted] = torch.arange(len(counted))
    places, lengths = norm[counted].unique_consecutive(return_counts=True)
    ends = lengths.cumsum(0)

    items = torch.cat([table, place[:, None]], 1)
    wide = [[tensor.dtype == torch.float32 for tensor in each] for each in (tensors.weights, tensors.gradients)]
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

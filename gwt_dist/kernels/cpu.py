"""All phases on a CPU in C++: one pass over memory for each, many tensors in one call. See `cpu.cpp`, `travel.cpp`.

A library is built for each formula, details, write and rounding that a program names, on first use. All of them take
state in every format.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gwt_dist.declare import Extent, Field, Pass, Program, Rule
from gwt_dist.formats import FORMATS, scale_of
from gwt_dist.kernels import eager, guard
from gwt_dist.kernels.build import library_of, load
from gwt_dist.kernels.items import Item
from gwt_dist.kernels.variant import PASSES, parts
from gwt_dist.kernels.work import Tensors, Work
from gwt_dist.recipes import program_of

SUFFIX = ".h"  # of the files of `variant`
STORES: Sequence[str] = (*FORMATS, "nearest", "stochastic")
CHUNK = 1 << 16  # elements that a thread takes in one go: long enough to hide the taking, short enough to share out
CACHE = 1 << 21  # elements between the phases of tensors held whole: 8 MiB of fp32 gradients are still in a cache
_STEP = (True, True)
_NORMS, _SEND, _KEEP = 1, 2, 3  # phases of `travel.h`
_NONE = torch.empty(0, dtype=torch.float64)
_NOTHING = torch.empty(0)
_NO_BATCHES = torch.empty((0, 4), dtype=torch.int64)


def check(work: Work, tensors: Tensors) -> None:
    """As `eager.check`, without a call of torch for each tensor."""
    # Without sums nothing reads what is kept of a whole tensor.
    fields = [f for f in work.program.fields if work.norms or f.extent is not Extent.TENSOR]
    names = [field.name for field in fields]
    try:
        fits = _library(work.program).fits(
            work.needed(*names),
            tensors.weights,
            tensors.gradients,
            tensors.steps,
            [tensors.state[name] for name in names],
            [_number(field) for field in fields],
        )
    except TypeError:  # one of them is no tensor
        fits = False
    if not fits:
        guard.check(work, tensors)  # says which
        raise ValueError("the C++ kernels take dense fp32 or bf16 tensors on the CPU; GWT_DIST_KERNEL=eager takes more")


def count(work: Work, tensors: Tensors, first: Sequence[bool]) -> None:
    """As `eager.count`, without a call of torch for each."""
    steps = [step for step, is_first in zip(tensors.steps, first, strict=True) if is_first]
    _library(work.program).count(steps)


def phase(number: int, work: Work, tensors: Tensors, sums: list[Tensor]) -> None:
    """As `eager.phase`."""
    its = work.program.phases[number]
    assert isinstance(its, Pass), "whole matrices go by `rounds`"
    if work.program.travels:
        _travel(_NORMS, work, tensors, sums[number], _NOTHING)
        return
    moments, write = PASSES[its.function]
    limits = sums[number - 1] if write and not moments else _NONE
    _run((moments, write), work, tensors, _NONE if write else sums[number], limits)


def settle(number: int, work: Work, tensors: Tensors, sums: Tensor) -> None:
    """As `eager.settle`."""
    eager.settle(number, work, tensors, sums)


def step(work: Work, tensors: Tensors) -> None:
    """As `eager.step`, the gradient read from memory once, or twice where a tensor with a limiter fits no cache."""
    _run(_STEP, work, tensors, _NONE, _NONE)


def send(number: int, work: Work, tensors: Tensors, sums: list[Tensor], landing: Tensor) -> None:
    """As `eager.send`."""
    _travel(_SEND, work, tensors, sums[0], landing)


def keep(number: int, work: Work, tensors: Tensors, landing: Tensor) -> None:
    """As `eager.keep`."""
    _travel(_KEEP, work, tensors, _NONE, landing)


def _travel(what: int, work: Work, tensors: Tensors, sums: Tensor, landing: Tensor) -> None:
    rows, numbers = _rules(tensors.rules, work.program)
    _library(work.program).run(
        what,
        work.table(CHUNK),
        tensors.weights,
        tensors.gradients,
        _moments("exp_avg", work.program, tensors),
        tensors.steps,
        rows,
        numbers,
        tensors.exchange.float(),
        sums,
        landing,
    )


def _run(what: tuple[bool, bool], work: Work, tensors: Tensors, squared_norms: Tensor, rho: Tensor) -> None:
    moments, write = what
    rows, numbers = _rules(tensors.rules, work.program)
    _library(work.program).step(
        moments + 2 * write,
        work.table(CHUNK),
        work.batches(CHUNK, CACHE) if what == _STEP else _NO_BATCHES,
        tensors.weights,
        tensors.gradients,
        _moments("exp_avg", work.program, tensors),
        _moments("exp_avg_sq", work.program, tensors),
        tensors.steps,
        rows,
        numbers,
        tensors.exchange.float(),
        squared_norms,
        rho,
        tensors.state["limited_norm"] if work.norms else [],
    )


def _moments(name: str, program: Program, tensors: Tensors) -> tuple[int, list[Tensor], list[Tensor]]:
    """The number of its format, what is stored of each parameter, and the scales of each, if it has any."""
    field = next(field for field in program.fields if field.name == name)
    return _number(field), tensors.state[name], tensors.state.get(scale_of(name), [])


def _number(field: Field) -> int:
    return list(FORMATS).index(field.format)


def _rules(rules: Sequence[Rule], program: Program) -> tuple[list[tuple[float, ...]], list[int]]:
    """The numbers of the rules that differ, and which of them each parameter has."""
    distinct = {id(rule): rule for rule in rules}
    numbers = {key: i for i, key in enumerate(distinct)}
    return [_row(rule, program) for rule in distinct.values()], [numbers[id(rule)] for rule in rules]


def _row(rule: Rule, program: Program) -> tuple[float, ...]:
    return float(rule.lr), *(float(rule[name]) for name in program.numbers)


def prepare(program: Program | None = None) -> None:
    """Build or load the library for `program`, the default one if None; raises `BuildError` if it cannot be built."""
    _library(program or program_of({}, level=1))


def library(program: Program | None = None) -> Path:
    """Where the library for `program`, the default one if None, is or will be."""
    program = program or program_of({}, level=1)
    return library_of(_source(program), *_defines(program))[2]


_loaded: dict[tuple[str, ...], Any] = {}


@cache
def _library(program: Program) -> Any:
    defines = _defines(program)
    if defines not in _loaded:  # programs that differ in their phases alone share one
        _loaded[defines] = load(_source(program), *defines)
    return _loaded[defines]


def _source(program: Program) -> str:
    return "travel" if program.travels else "cpu"


def _defines(program: Program) -> tuple[str, ...]:
    """What a source is built with: the files of the program, and the order of what tables hold, said nowhere else."""
    folders = {"formulas": "FORMULA", "details": "DETAIL", "writes": "WRITE"}
    files = [f"-DGWT_{folders[folder]}={name}" for folder, name in parts(program).items()]
    names = {"NUMBERS": program.numbers, "ITEM": Item._fields, "FORMATS": FORMATS, "ROUNDING": [program.rounding]}
    return *files, *(f"-DGWT_{what}={','.join(its)}" for what, its in names.items())

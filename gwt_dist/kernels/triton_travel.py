"""Matrices that travel on a GPU in Triton: what is summed, sent and kept, one launch each for a level and dtypes.

See `triton_travel_kernels`. Tables and rules are those of `triton`, and no more waits for the GPU than there.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_dist.kernels import triton
from gwt_dist.kernels.kept import Kept
from gwt_dist.kernels.tables import parameters_of, rules_of
from gwt_dist.kernels.work import Tensors, Work

_PARAMETERS = 32  # whose numbers a program takes at once
_SENT = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def norms(work: Work, tensors: Tensors, sums: Tensor) -> None:
    """Add the two sums of each matrix to those in `sums`, ``[T]`` fp64."""
    if work.parts:
        _norms(work, tensors, _tables(work, tensors), sums)


def send(work: Work, tensors: Tensors, sums: Tensor, landing: Tensor) -> None:
    """As `eager.send`; `sums` are those of `norms`, complete."""
    if work.parts:
        _send(work, tensors, _tables(work, tensors), sums, landing)


def keep(work: Work, tensors: Tensors, landing: Tensor) -> None:
    """As `eager.keep`."""
    if work.parts:
        _keep(work, _tables(work, tensors), landing)


class _Tables(NamedTuple):
    """Where tensors lie and what is done with them, on their device."""

    kept: Kept
    rules: Tensor
    parameters: Tensor
    programs: triton._Programs


def _tables(work: Work, tensors: Tensors) -> _Tables:
    kept = triton._kept_of(work, tensors.exchange.device)
    parameters, kinds = parameters_of(work, tensors, kept)
    programs = kept.get("programs", (kinds,), lambda: triton._programs(work, kinds, kept))
    return _Tables(kept, rules_of(tensors, kept).table, parameters, programs)


def _norms(work: Work, tensors: Tensors, tables: _Tables, sums: Tensor) -> None:
    places, shape = tables.programs.norms, (2, len(tables.programs.partials))
    squares = tables.kept.get("squares", shape, lambda: torch.empty(shape, dtype=torch.float64, device=sums.device))
    for group in tables.programs.groups:
        _units(work, tensors, tables, group, None, sums, squares, squares, "float32")
    for which in range(2):  # the second number of a matrix is next to the first
        of_these = squares[which], places, places, tables.rules, sums[which:]
        triton._kernels().add_partials[(len(places),)](
            *of_these, ADD=True, LIMIT=False, BLOCK=triton._PARTIALS, **triton.OPTIONS
        )


def _send(work: Work, tensors: Tensors, tables: _Tables, sums: Tensor, landing: Tensor) -> None:
    _check(work, landing, tables.kept)
    kernels, kept, count = _kernels(), tables.kept, len(tensors.weights)
    shape = count, kernels.WEIGHTS.value
    weights = kept.get("weights", shape, lambda: torch.empty(shape, dtype=torch.float64, device=kept.device))
    kernels.momentum_weights[(-(-count // _PARAMETERS),)](
        tables.parameters,
        tables.rules,
        weights,
        count,
        BLOCK=_PARAMETERS,
        **{**triton.OPTIONS, "num_warps": 1},
    )
    for group in tables.programs.groups:
        _units(work, tensors, tables, group, weights, sums, sums, landing, _SENT[landing.dtype])


def _units(
    work: Work,
    tensors: Tensors,
    tables: _Tables,
    group: triton._Group,
    weights: Tensor | None,  # of `momentum_weights`; none for sums
    sums: Tensor,
    squares: Tensor,
    landing: Tensor,
    sent: str,
) -> None:
    import triton.language as tl

    formula = triton._functions(work.program)["formulas"]
    _kernels().units[(len(group.items),)](
        group.items,
        tables.parameters,
        tables.rules,
        squares if weights is None else weights,
        tensors.exchange,
        sums,
        squares,
        landing,
        len(tables.programs.partials),
        GAINED=formula.detail_gain,
        MOMENTUM=formula.momentum,
        U=formula.sent,
        SEND=weights is not None,
        LEVEL=group.level,
        GAIN=2.0 ** (-group.level / 2),
        GRADIENT=getattr(tl, group.gradient),
        EXP_AVG=tables.kept.get("formats", (), lambda: triton.formats(work.program, "exp_avg"))[0],
        SENT=getattr(tl, sent),
        **options(group.plain, group.level, tables.programs.cell, tables.programs.noisy),
    )


def _keep(work: Work, tables: _Tables, landing: Tensor) -> None:
    import triton.language as tl

    _check(work, landing, tables.kept)
    functions = triton._functions(work.program)
    for group in tables.programs.groups:
        _kernels().keep[(len(group.items),)](
            group.items,
            tables.parameters,
            tables.rules,
            landing,
            LOST=functions["formulas"].lost,
            WRITTEN=functions["writes"].written,
            LEVEL=group.level,
            WEIGHT=getattr(tl, group.weight),
            STOCHASTIC=work.program.rounding == "stochastic",
            **options(group.plain, 0),
        )


def options(plain: bool, level: int, cell: int = 1, noisy: bool = False) -> dict[str, Any]:
    """With what kernels of units of 2**level elements are compiled, beside their functions and dtypes."""
    its = triton.options(plain, level, cell, noisy)
    return {**its, "num_warps": max(8, its["num_warps"])}


@cache
def _kernels() -> Any:
    from gwt_dist.kernels import triton_travel_kernels

    return triton_travel_kernels


def _check(work: Work, landing: Tensor, kept: Kept) -> None:
    """Raise `ValueError` unless `landing` has a place for every part."""

    def check() -> None:
        end = max(part.landing + part.piece.fragment.numel for part in work.parts)
        least = min(part.landing for part in work.parts)
        if landing.dtype in _SENT and landing.is_contiguous() and landing.device == kept.device:
            if 0 <= least and end <= landing.numel():
                return
        raise ValueError(
            f"parts of matrices that travel lie at {least} to {end} of a landing buffer of {landing.numel()} elements, "
            f"{landing.dtype} on {landing.device}; the Triton kernels would read wrong memory. They take dense fp32 or "
            f"bf16 on {kept.device}; GWT_DIST_KERNEL=eager takes more"
        )

    kept.get("landing", (landing.numel(), landing.dtype, landing.is_contiguous(), landing.device), check)

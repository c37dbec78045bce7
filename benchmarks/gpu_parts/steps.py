"""Step times: all optimizers in turn on the same tensors, round after round, and the ratio to AdamW of each round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from statistics import median

import torch
from torch import nn

from gpu_parts.contenders import CONTENDERS, REFERENCE, SETS, TINY, Contender, Tensors, bytes_of
from gpu_parts.machine import copy_bandwidth
from gpu_parts.setting import NO_TIME, Row, Setting, summary

ROUNDS = 15
SECONDS = 4.0  # of the timed rounds of one set in one dtype; at least three rounds all the same


@dataclass
class _Turn:
    """A contender in the rounds of one set."""

    contender: Contender
    step: Callable[[], object]
    row: Row
    state: int
    device: list[float] = field(default_factory=list)  # milliseconds
    host: list[float] = field(default_factory=list)


def rows(setting: Setting) -> Iterator[Row]:
    """Of each set in each dtype."""
    bandwidth = copy_bandwidth(setting)
    # What is most asked for first: all sets in their first dtype, then in the second.
    sets = TINY if setting.smoke else SETS
    for place in range(2):
        for tensors in sets:
            if place < len(tensors.dtypes):
                yield from measured(setting, tensors, tensors.dtypes[place], bandwidth)
                setting.free()


def measured(setting: Setting, tensors: Tensors, dtype: torch.dtype, bandwidth: float) -> Iterator[Row]:
    """Rows of one set."""
    case: Row = {"case": tensors.name, "dtype": str(dtype)[6:]}
    if setting.left() < (0 if setting.smoke else 8):
        yield case | {"note": NO_TIME}
        return
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, device=setting.device).to(dtype)) for shape in tensors.shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    elements = sum(map(prod, tensors.shapes))
    turns = []
    for contender in CONTENDERS:
        its = case | {"optimizer": contender.name}
        if contender.on not in ("", tensors.name):
            if setting.smoke:
                there = "not in a smoke" if contender.installed else f"{contender.package} is not installed"
                yield its | {"note": there}
        elif not contender.installed:
            yield its | {"note": f"{contender.package} is not installed"}
        elif turns and setting.left() < 4:  # time for rounds of those that are there
            yield its | {"note": NO_TIME}
        else:
            try:
                turns.append(_prepared(setting, contender, parameters, its))
            except Exception as error:  # a row of the table, not the end of the run
                yield its | {"error": summary(error)}
    for number in range(_rounds(setting, turns)):
        if number and setting.left() < 1:  # rows come after the last round
            break
        for turn in turns:
            device, host = setting.timed(turn.step)
            turn.device.append(device)
            turn.host.append(host)
    reference = next((turn.device for turn in turns if turn.contender.name == REFERENCE), [])
    for turn in turns:
        yield turn.row | _numbers(turn, reference, elements, dtype.itemsize, bandwidth)


def _prepared(setting: Setting, contender: Contender, parameters: list[nn.Parameter], row: Row) -> _Turn:
    """An optimizer that has taken a few steps: state is there, kernels are compiled, tables are on the GPU."""
    optimizer = contender.make(parameters)
    for _ in range(3):
        optimizer.step()
    peak = setting.peak(optimizer.step)
    row = row | {"peak MiB": None if peak is None else peak / 2**20, "waits": setting.waits(optimizer.step)}
    return _Turn(contender, optimizer.step, row, sum(map(bytes_of, optimizer.state.values())))


def _rounds(setting: Setting, turns: list[_Turn]) -> int:
    if setting.smoke:
        return 3
    one = sum(max(setting.timed(turn.step)) for turn in turns) / 1e3
    return max(3, min(ROUNDS, int(SECONDS / max(one, 1e-9))))


def _numbers(turn: _Turn, reference: list[float], elements: int, size: int, bandwidth: float) -> Row:
    ms = median(turn.device)
    ratios = sorted(a / b for a, b in zip(turn.device, reference, strict=True)) if reference else []
    quarter = len(ratios) // 4
    moved = turn.contender.traffic(elements, size, turn.state) if turn.contender.passes else None
    return {
        "ms": ms,
        "host ms": median(turn.host),
        "ratio": median(ratios) if ratios else None,
        "quartiles": f"{ratios[quarter]:.3f}-{ratios[-1 - quarter]:.3f}" if ratios else None,
        "share of copy": None if moved is None else moved / (ms / 1e3) / bandwidth,
        "state B/param": turn.state / elements,
        "rounds": len(turn.device),
    }

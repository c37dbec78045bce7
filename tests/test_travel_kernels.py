"""The compiled kernels of matrices that travel against the eager reference: what is summed, sent and kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gwt_dist.declare import Pass, Program, Sum, Travel
from gwt_dist.kernels import choice, choose, cpu, eager, variant
from gwt_dist.piece import Piece
from test_layout import worlds
from travel_cases import OPTIONS, WIDE, Case, equal, rule, same, whole

# Divided and not by units and vectors, rows shorter than a unit, longer than a chunk, of three dimensions.
SHAPES = (66, 97), (3, 5461), (9, 3), (64, 64), (3, 2, 5), (0, 4), (2, 70_000), (300, 256)
HERE = torch.device("cpu")


@pytest.mark.parametrize("landing", WIDE, ids=str)
@pytest.mark.parametrize("level", range(9))
def test_matrices_of_any_shape(level: int, landing: torch.dtype) -> None:
    gain = "coherence" if level % 2 else 0.3
    rules = [rule(detail_gain=gain), rule(lr=torch.tensor(0.02), nesterov=True, detail_gain=gain)]
    equal(cpu, Case([whole(*SHAPES)], 0, level, rules, landing))


@settings(max_examples=40)
@given(worlds(), st.integers(1, 8), OPTIONS, st.sampled_from(WIDE), st.sampled_from([1, 2, 7]), st.integers(-3, 2))
def test_what_any_rank_holds(
    world: Any, level: int, options: dict[str, Any], landing: torch.dtype, t: int, size: int
) -> None:
    """Cut units, rectangles of columns, ranks without anything; gradients whose squares leave fp32 at both ends."""
    for rank in range(len(world[1])):
        equal(cpu, Case(world[1], rank, level, [rule(**options)], landing, t, 10.0 ** (10 * size)))


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True},
        {"correct_bias": False},
        {"cautious": True},
        {"detail_gain": 0.3},
        {"scale": 1.0},
        {"weight_decay": 0.0},
        {"lr": torch.tensor(0.02)},
        {"betas": (0.5, 0.999)},
    ],
    ids=str,
)
def test_every_option_changes_something(options: dict[str, Any]) -> None:
    """Else a kernel that left one out would not be seen."""
    plain, changed = (Case([whole((66, 97))], 0, 2, [rule(**its)]) for its in ({}, options))
    equal(cpu, changed)
    ours, theirs = changed.run(cpu), plain.run(cpu)
    assert not all(map(torch.equal, [ours.landing[3:-3], *ours.weights], [theirs.landing[3:-3], *theirs.weights]))


def test_the_rows_that_travel_along_are_not_the_kernels() -> None:
    case = Case([whole((66, 97), (5, 30))], 0, 2, [rule(nor=0.95)])
    equal(cpu, case)
    assert "exp_avg_sq_row" in case.work.program.names()
    assert cpu.library(case.work.program) != cpu.library(rule().program)  # another header, which includes the first


def test_bits_do_not_depend_on_threads_but_sums_on_the_size_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = torch.get_num_threads(), []
    case = Case([whole((300, 1024), (16, 5461))], 0, 3, [rule()])
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(case.run(cpu))
    finally:
        torch.set_num_threads(before)
    for its in found[1:]:
        same([its.sums, its.landing, *its.state, *its.weights], [t for t in _all(found[0])], "tensor")
    monkeypatch.setattr(cpu, "CHUNK", 500)
    equal(cpu, case)


def _all(result: Any) -> list[torch.Tensor]:
    return [result.sums, result.landing, *result.state, *result.weights]


@pytest.mark.parametrize(
    ("m", "a"), [(torch.nan, 1.0), (1.0, torch.nan), (torch.inf, 1.0), (torch.inf, torch.inf), (0, 0)]
)
def test_sums_that_are_no_numbers_do_what_they_do_in_the_reference(m: float, a: float) -> None:
    case = Case([whole((8, 16))], 0, 2, [rule()], pairs=[(torch.float32, torch.float32)])
    norms = torch.tensor([m, a], dtype=torch.float64)
    found, expected = case.run(cpu, norms), case.run(eager, norms)
    same([found.landing, *found.weights], [expected.landing, *expected.weights], "tensor")


def test_programs_that_travel_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([whole((8, 16))], 0, 2, [rule()])
    pieces, program = [part.piece for part in case.work.parts], rule().program
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    for its in (program, rule(nor=0.9).program, rule(detail_gain=1.0).program):
        assert choose(HERE, torch.bfloat16, its, pieces) is cpu
        assert variant.lacking(its, ".py") == ""
    assert choose(HERE, torch.float64, program, pieces) is eager
    for changed in (
        {"phases": (Pass("norms", (Sum("m_a"),)), program.phases[1])},
        {"phases": (Pass("others", (Sum("m_a", numbers=2),)), program.phases[1])},
        {"phases": (program.phases[0], Travel("momentum", "orthogonalize", "another"))},
        {"phases": (replace(program.phases[0], sums=()), program.phases[1])},
        {"formula": "another"},
        {"numbers": ()},
    ):
        another: Program = replace(program, **changed)
        assert choose(HERE, torch.float32, another, pieces) is eager, changed


def test_places_beyond_the_landing_buffer_and_tensors_of_other_sizes_are_refused() -> None:
    case = Case([whole((8, 16))], 0, 2, [rule()])
    case.length -= 4
    before = case.given()
    with pytest.raises(RuntimeError, match=r"a part has 128 elements at .* of the \d+ that travel"):
        case.run(cpu)
    tensors = case.given()
    tensors.state["exp_avg"][1] = tensors.state["exp_avg"][1][:-1]
    with pytest.raises(ValueError, match="exp_avg of t0 has shape"):
        cpu.check(case.work, tensors)
    same(tensors.weights, before.weights, "weight")
    with pytest.raises(RuntimeError, match="a matrix of level 9 travels"):
        parts = tuple(replace(p, piece=Piece.of(p.piece.fragment, p.piece.moments, 9, "haar")) for p in case.work.parts)
        cpu.phase(0, replace(case.work, parts=parts), before, [torch.zeros(8, dtype=torch.float64)])

"""What a recipe says of itself, in plain data: what it keeps, over what extent, and what stands between its phases.

State, schedule, kernels, plans of bytes and checkpoints are derived from a `Program`, and none of them asks which
recipe it came from. `recipes` builds programs, `formulas` has the mathematics that they name. Knows no torch.

    energy           Pass("step", writes)
    with a limiter   Pass("moments") -> one number a tensor, summed over ranks -> Pass("write", writes)
    orthogonal       Travel to the owner of the matrix and back; before it, where details go by coherence,
                     Pass("norms") -> two numbers a tensor, summed

Words: R rows, C columns, K coefficients a row, N coefficients of what a rank holds, U elements of a unit; a cell is the
neighbouring coefficients of a row that are stored together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from gwt_dist.formats import FORMATS, FP32, scale_of

RESERVED = "step", "weight", "params"  # keys of state and of checkpoints


class Extent(Enum):
    """What one number of a state tensor, or of a sum, stands for; its shape for a whole tensor ``[R, C]``."""

    UNIT = "unit"  # [R, K]  a coefficient: kept by every rank that touches its cell
    CELL = "cell"  # [R, ceil(K / coefficients of a cell)]  a cell: likewise
    ROW = "row"  # [R, 1]  a row: kept by every rank that touches it
    COLUMN = "column"  # [1, K]  a coefficient's place in a row: kept whole by every rank that touches the tensor
    TENSOR = "tensor"  # [1]  the tensor: kept by every rank that has the parameter
    OWNED = "owned"  # of the sides that its field says: kept whole by the one rank to which the matrix travels


# Dimensions of an OWNED field: the number of rows R, of columns C and the rank -> how many.
SIDES: Mapping[str, Callable[[int, int, int], int]] = {
    "rows": lambda rows, columns, rank: rows,
    "columns": lambda rows, columns, rank: columns,
    "long": lambda rows, columns, rank: max(rows, columns),
    "short": lambda rows, columns, rank: min(rows, columns),
    "rank": lambda rows, columns, rank: min(rows, columns, rank),
    "one": lambda rows, columns, rank: 1,
}


@dataclass(frozen=True, slots=True)
class Field:
    """One state tensor; `name` is its key in state, checkpoints and plans."""

    name: str
    extent: Extent
    format: str = FP32  # of `formats.FORMATS`; only coefficients, UNIT, have another, and OWNED one without scales
    sides: tuple[str, ...] = ()  # of OWNED: its dimensions, words of `SIDES`
    rank: int = 0  # of OWNED: what "rank" stands for, but for matrices with a shorter side than that

    def __post_init__(self) -> None:
        if (self.extent is Extent.OWNED) != bool(self.sides) or not set(self.sides) <= SIDES.keys():
            raise ValueError(
                f"field {self.name!r} over a {self.extent.value} has the sides {self.sides}: an owned one has some of "
                f"{', '.join(SIDES)}, and others have none"
            )
        may = [FP32]
        if self.extent in (Extent.UNIT, Extent.OWNED):
            may = [name for name, form in FORMATS.items() if self.extent is Extent.UNIT or not form.scaled]
        if self.format not in may:
            raise ValueError(
                f"field {self.name!r} over a {self.extent.value} cannot have the format {self.format!r}, only "
                f"{', '.join(may)}"
            )

    def __str__(self) -> str:
        its_sides = f" [{', '.join(self.sides)}] of rank {self.rank}" if self.sides else ""
        return self.name + its_sides + ("" if self.format == FP32 else f" in {self.format}")


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum of fp64 numbers over all coefficients of a tensor, a row or a column, whichever ranks hold them."""

    name: str
    extent: Extent = Extent.TENSOR  # TENSOR, ROW or COLUMN
    numbers: int = 1  # numbers of one coefficient, summed one by one


@dataclass(frozen=True, slots=True)
class Pass:
    """A phase over the units that this rank touches.

    It hands nothing to the next phase but its sums: what that needs again, it computes again from gradient and state.
    """

    function: str  # of the formula; takes a `formulas.Share`
    sums: tuple[Sum, ...] = ()  # complete, over all ranks, when the next phase begins
    then: str = ""  # function of the formula that makes of complete sums, one a tensor, what later phases read instead
    writes: bool = False  # the function returns the change of the weights, which ends the step

    def __post_init__(self) -> None:
        if self.then and [(s.extent, s.numbers) for s in self.sums] != [(Extent.TENSOR, 1)]:
            raise ValueError(f"phase {self.function!r}: what {self.then!r} takes is one sum of one number a tensor")
        if self.writes and self.sums:
            raise ValueError(f"phase {self.function!r} writes the weights and has sums, which nothing would read")


@dataclass(frozen=True, slots=True)
class Travel:
    """A phase that takes each whole matrix to one rank and back, and ends the step. Functions of the formula."""

    send: str  # (Share) -> (N, U): what is sent of a part
    # (matrices [n, R, C], {row field: [n, R]}, rules, seats) on the rank that owns them, in place. There are rules and
    # seats, `formulas.Seat`, for the first matrices alone, equal rules side by side; the others are zeros, and stay so.
    work: str
    keep: str  # (elements of a part of what came back, shape of the tensor, rule) -> change of its weights
    rows: tuple[str, ...] = ()  # ROW fields that go along, are updated there in place, and come back
    products: str = "auto"  # dtype of the matrices that travel and of their products: see `products.dtype_of`


@dataclass(frozen=True, slots=True)
class Program:
    """How one tensor is stepped, resolved. Hashable: two tensors with equal programs are stepped in one call."""

    formula: str  # where moments come from: a name of `formulas.FORMULAS`
    fields: tuple[Field, ...]
    phases: tuple[Pass | Travel, ...]
    detail: str = ""  # what the details of a unit contribute: a name of `formulas.DETAILS`
    write: str = "decay"  # how a weight takes its change: a name of `formulas.WRITES`
    numbers: tuple[str, ...] = ()  # names of the numbers that functions read of a `Rule`, in the order of kernel tables
    least_level: int = 1  # of the matrices that it steps; vectors, and matrices of lower levels, have the plain program
    rounding: str = "nearest"  # of bf16 weights; "stochastic": by noise, so that no small change is lost

    def __post_init__(self) -> None:
        names, sums = [f.name for f in self.fields], [s.name for s in self.sums]
        twice = [name for each in (names, sums) for name in each if each.count(name) > 1]
        taken = [name for name in names if name in RESERVED]
        ends = [isinstance(phase, Travel) or phase.writes for phase in self.phases]
        last = [*[False] * (len(ends) - 1), True]
        rows = {f.name for f in self.fields if f.extent is Extent.ROW}
        lost = [name for phase in self.phases if isinstance(phase, Travel) for name in phase.rows if name not in rows]
        scales = {f.name for f in self.fields if f.extent is Extent.CELL}
        bare = [f.name for f in self.fields if FORMATS[f.format].scaled and scale_of(f.name) not in scales]
        for wrong, what in (
            (twice, f"{', '.join(twice)} stand twice among its fields or sums"),
            (taken, f"a field cannot be called {', '.join(taken)}, which state and checkpoints have for other things"),
            (ends != last, "its last phase, and no other, must write the weights or travel"),
            (lost, f"{', '.join(lost)} travel along and are no fields over rows"),
            (bare, f"{', '.join(bare)} have no fields over cells for their scales"),
            (
                () if self.travels else self.names(Extent.OWNED),
                f"{', '.join(self.names(Extent.OWNED))} are kept by owners, and no matrix of it travels to any",
            ),
            (self.rounding not in ("nearest", "stochastic"), f"rounding {self.rounding!r} is none"),
        ):
            if wrong:
                raise ValueError(f"the program of formula {self.formula!r} cannot run: {what}")

    @property
    def travels(self) -> bool:
        """Whether whole matrices go to one rank."""
        return any(isinstance(phase, Travel) for phase in self.phases)

    @property
    def cell(self) -> int:
        """Coefficients that are kept together: where ranks share some of them, all of them keep all."""
        return max((FORMATS[f.format].cell for f in self.fields), default=1)

    @property
    def sums(self) -> tuple[Sum, ...]:
        """All sums over ranks in a step."""
        return tuple(s for phase in self.phases if isinstance(phase, Pass) for s in phase.sums)

    def names(self, *extents: Extent) -> tuple[str, ...]:
        """Names of the fields of these extents, in order; of all without any."""
        return tuple(f.name for f in self.fields if f.extent in extents or not extents)


@dataclass(frozen=True, slots=True)
class Rule:
    """A parameter group at one step: its programs, and the numbers that change from step to step or from run to run."""

    program: Program  # of matrices of its least level or more: those with level > 0, where nothing else is said
    plain: Program  # of all others
    lr: Any  # float, or 0-d tensor
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def of(self, level: int) -> Program:
        """The program of a matrix of this level."""
        return self.program if level >= self.program.least_level else self.plain

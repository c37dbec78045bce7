"""What each recipe makes of a resolved parameter group: the program that steps its tensors, and its numbers.

Functions of the keys of a group alone; `recipes` has the table of who is made of which. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from gwt_dist.declare import Extent, Field, Pass, Program, Sum, Travel
from gwt_dist.formats import FORMATS, FP32, STATE_DTYPES, scale_of
from gwt_dist.keys import PROJ_TYPES
from gwt_dist.units import check_haar

Options = Mapping[str, Any]  # a parameter group, every key of it resolved

EXP_AVG, EXP_AVG_SQ = Field("exp_avg", Extent.UNIT), Field("exp_avg_sq", Extent.UNIT)
EXP_AVG_SQ_ROW = Field("exp_avg_sq_row", Extent.ROW)
EXP_AVG_SQ_COL = Field("exp_avg_sq_col", Extent.COLUMN)
RESIDUAL = Field("exp_avg_res_row", Extent.ROW), Field("exp_avg_res_col", Extent.COLUMN)
LIMITED_NORM = Field("limited_norm", Extent.TENSOR)
_SQUARES = Sum("square_row", Extent.ROW), Sum("square_col", Extent.COLUMN)
_NOT_NEGATIVE = (EXP_AVG_SQ,)
# What compiled kernels read of a rule besides lr, in the order of their tables.
ADAM = (
    *("beta1", "beta2", "eps", "weight_decay", "scale", "detail_gain", "coherent", "limiter", "nesterov"),
    *("correct_bias", "rounding_seed"),
)
LOW_RANK = *ADAM, "residual", "randomized", "refresh_offset", "proj_type", "update_proj_gap"
FACTORED = *ADAM, "clip_threshold", "confidence_beta", "decay_rate"


@dataclass(frozen=True, slots=True)
class _Common:
    """What keys that all recipes here read say of a program."""

    state_dtype: str
    write: str
    rounding: str

    @classmethod
    def of(cls, options: Options) -> _Common:
        write = "cautious" if options["cautious"] else "decay"
        rounding = "stochastic" if options["stochastic_rounding"] else "nearest"
        return cls(options["state_dtype"], write, rounding)

    def fields(self, *moments: Field, others: tuple[Field, ...]) -> tuple[Field, ...]:
        """Moments in the formats that fit them, with scales where these need any, and `others` as they are."""
        formats = STATE_DTYPES[self.state_dtype]
        stored = [replace(m, format=formats[m in _NOT_NEGATIVE]) for m in moments]
        scales = [Field(scale_of(m.name), Extent.CELL) for m in stored if FORMATS[m.format].scaled]
        return (*stored, *scales, *others)


def adamw(options: Options) -> Program:
    """Level 0, which is AdamW: there are no details, and no scale, limiter or Nesterov acts."""
    return _adam_program(str(options["second_moment"]), "weighed", False, _Common.of(options))


def adam(options: Options) -> Program:
    """Adam's moments; two phases where a limiter is on."""
    limited = options["limiter"] > 0
    return _critical(_adam_program(options["second_moment"], "weighed", limited, _Common.of(options)), options)


def residual(options: Options) -> Program:
    """Adam's moments, with the residual of each element beside them. Haar alone."""
    if options["second_moment"] == "none":
        raise ValueError('second_moment="none" leaves nothing to divide by; write recipe="orthogonal"')
    check_haar(options["wavelet"], "the denominator of an element has the residual of its Haar unit in it")
    return _critical(_adam_program(options["second_moment"], "residual", False, _Common.of(options)), options)


@lru_cache
def _adam_program(second_moment: str, detail: str, limited: bool, common: _Common) -> Program:
    phases: tuple[Pass, ...] = (Pass("step", writes=True),)
    if limited:
        phases = Pass("moments", (Sum("update"),), then="limit"), Pass("write", writes=True)
    # What orthogonalizes has no second moment of its own to name; its tensors of level 0 have that of the default.
    formula = "adam_approximation" if second_moment == "approximation" else "adam_energy"
    fields = common.fields(EXP_AVG, EXP_AVG_SQ, others=(LIMITED_NORM,))
    return Program(formula, fields, phases, detail, common.write, ADAM, rounding=common.rounding)


def orthogonal(options: Options) -> Program:
    """A momentum whose matrices travel to be orthogonalized."""
    rows, coherent = options["nor"] > 0, isinstance(options["detail_gain"], str)
    program = _orthogonal_program(rows, coherent, options["products"], options["least_level"], _Common.of(options))
    return _critical(program, options)


@lru_cache
def _orthogonal_program(rows: bool, coherent: bool, products: str, least_level: int, common: _Common) -> Program:
    state = common.fields(EXP_AVG, others=(EXP_AVG_SQ_ROW, LIMITED_NORM) if rows else (LIMITED_NORM,))
    along = tuple(f.name for f in state if f.extent is Extent.ROW)
    travel = Travel("momentum", "orthogonalize", "write", along, products)
    phases = (Pass("norms", (Sum("m_a", numbers=2),)), travel) if coherent else (travel,)
    name = "normuon" if rows else "orthogonal"
    return Program(name, state, phases, "", common.write, ADAM, least_level, common.rounding)


def _critical(program: Program, options: Options) -> Program:
    """A program whose gradients are joined by those that are kept."""
    return _critical_program(program, options["critical"]) if options["critical"] else program


@lru_cache
def _critical_program(program: Program, number: int) -> Program:
    fields = [Field(f"critical_{i}", Extent.UNIT) for i in range(number)]
    fields += [Field(f"priority_{i}", Extent.TENSOR) for i in range(number)]
    return replace(
        program,
        formula=f"critical_{program.formula}",
        fields=(*program.fields, *fields),
        phases=(Pass("norm", (Sum("squared_a"),), then="ranked"), *program.phases),
        numbers=(*program.numbers, "critical_decay", "critical_mean"),
    )


def adam_numbers(options: Options) -> dict[str, float]:
    """What functions of Adam's read of a rule."""
    (beta1, beta2), gain = options["betas"], options["detail_gain"]
    return {
        "beta1": beta1,
        "beta2": beta2,
        "detail_gain": 1 - beta1 if isinstance(gain, str) else gain,  # what a fresh gradient is to Adam's momentum
        "coherent": float(isinstance(gain, str)),
        **{key: options[key] for key in ("eps", "weight_decay", "scale", "limiter")},
        **{key: float(options[key]) for key in ("nesterov", "correct_bias", "rounding_seed")},
        "critical_decay": options["critical_decay"],
        "critical_mean": float(options["critical_form"] == "mean"),
    }


def orthogonal_numbers(options: Options) -> dict[str, float]:
    """And those of orthogonalized momenta."""
    gain = options["detail_gain"]
    # Details that are orthogonalized need no least part.
    return adam_numbers(options) | {"nor": options["nor"], "detail_gain": 0.0 if isinstance(gain, str) else gain}


def factored(options: Options) -> Program:
    """A second moment of rows and columns."""
    return _factored(options, confidence=False)


def came(options: Options) -> Program:
    """The same, and how far the updates are from their mean, likewise by rows and columns."""
    return _factored(options, confidence=True)


def _factored(options: Options, confidence: bool) -> Program:
    if options["second_moment"] == "none":
        raise ValueError('second_moment="none" leaves nothing to factor; write recipe="orthogonal"')
    if options["second_moment"] == "approximation" and options["detail_gain"] != 0:
        raise ValueError(
            f"second_moment='approximation' with detail_gain={options['detail_gain']!r}: details of a unit whose "
            f"approximation is near 0 would grow without bound. Leave second_moment out, or write detail_gain=0"
        )
    return _factored_program(options["second_moment"], confidence, options["least_level"], _Common.of(options))


@lru_cache
def _factored_program(second_moment: str, confidence: bool, least_level: int, common: _Common) -> Program:
    others = EXP_AVG_SQ_ROW, EXP_AVG_SQ_COL, *(RESIDUAL if confidence else ())
    update: tuple[Sum, ...] = (Sum("squared_u"),)
    if confidence:  # u*u, u*m, m*m
        update = Sum("residual_row", Extent.ROW, 3), Sum("residual_col", Extent.COLUMN, 3)
    phases = Pass("squares", _SQUARES), Pass("normalized", update), Pass("write", writes=True)
    name = f"{'came' if confidence else 'factored'}_{second_moment}"
    fields = common.fields(EXP_AVG, others=others)
    return Program(name, fields, phases, "", common.write, FACTORED, least_level, common.rounding)


def adalomo(options: Options) -> Program:
    """Rows and columns alone, and a rate that is relative to the weights."""
    return _adalomo_program(_Common.of(options))


@lru_cache
def _adalomo_program(common: _Common) -> Program:
    fields = EXP_AVG_SQ_ROW, EXP_AVG_SQ_COL
    squares = *_SQUARES, Sum("squared_w")
    phases = Pass("squares", squares), Pass("normalized", (Sum("squared_u"),)), Pass("write", writes=True)
    return Program("adalomo", fields, phases, "", common.write, FACTORED, 0, common.rounding)


def low_rank(options: Options) -> Program:
    """Adam in a subspace of each matrix, on the rank that owns it; of rank 0 nothing is projected."""
    if not options["rank"]:
        return adamw(options)
    form, scaled = STATE_DTYPES[options["state_dtype"]][0], FORMATS[STATE_DTYPES[options["state_dtype"]][0]].scaled
    if scaled:
        raise ValueError(
            f"state_dtype={options['state_dtype']!r} has a scale for cells of coefficients, and a subspace has none: "
            f"write state_dtype='bf16', or rank=0 for AdamW in that format"
        )
    return _low_rank_program(options["rank"], options["proj_type"], options["residual"], form, _Common.of(options))


@lru_cache
def _low_rank_program(rank: int, proj_type: str, residual: bool, form: str, common: _Common) -> Program:
    # Sides of the subspace's vectors and of what is left of the gradient in it.
    vectors, left = {
        "std": ("short", "long"),
        "reverse_std": ("long", "short"),
        "right": ("columns", "rows"),
        "left": ("rows", "columns"),
        "full": ("columns", "rank"),
    }[proj_type]

    def owned(name: str, *sides: str) -> Field:
        return Field(name, Extent.OWNED, form if sides != ("one",) else FP32, sides, rank)

    fields = [owned("projector", "rank", vectors)]
    fields += [owned("projector_left", "rank", "rows")] if proj_type == "full" else []
    fields += [owned("exp_avg_low", "rank", left), owned("exp_avg_sq_low", "rank", left)]
    fields += [owned("residual_norm", "one")] if residual else []
    # In bf16 the gradient would be another one than that of one process.
    travel = Travel("gradient", "update", "write", products="fp32")
    return Program("low_rank", tuple(fields), (travel,), "", common.write, LOW_RANK, 0, common.rounding)


def low_rank_numbers(options: Options) -> dict[str, float]:
    """Adam's, and those of the subspace."""
    numbers = {key: float(options[key]) for key in LOW_RANK[len(ADAM) :] if key != "proj_type"}
    return adam_numbers(options) | numbers | {"proj_type": float(PROJ_TYPES.index(options["proj_type"]))}


def factored_numbers(options: Options) -> dict[str, float]:
    """Adam's, for the tensors that are not factored too, and three more."""
    return adam_numbers(options) | {key: options[key] for key in ("clip_threshold", "confidence_beta", "decay_rate")}

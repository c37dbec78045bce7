"""The Triton kernels of matrices that travel; imports triton, so import it inside functions alone. See `triton_travel`.

As in `triton_kernels`: fp32 mathematics on fp32 or bf16 buffers in single operations, in the order of `formulas`.
"""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

from gwt_dist.kernels.items import Item
from gwt_dist.kernels.triton_formats import ALIKE, CELL, bf16, key, noise, of_step, places_of_units, run_of
from gwt_dist.kernels.triton_formats import keep as keep_moments
from gwt_dist.kernels.triton_formats import read as read_moments
from gwt_dist.kernels.triton_kernels import (
    BETA1,
    COHERENT,
    COLUMN,
    COLUMNS,
    CORRECT_BIAS,
    DETAIL_GAIN,
    ELEMENT,
    FIRST_SCALE,
    HELD,
    ITEM,
    LAST,
    LEAD,
    LR,
    MOMENT,
    MOMENT_STRIDE,
    NESTEROV,
    NORM,
    PARAMETER,
    PLACE,
    POINTERS,
    ROUNDING_SEED,
    ROW,
    ROWS,
    RULE,
    SALT,
    SCALE,
    SLOT,
    UNITS,
    WEIGHT_DECAY,
)
from gwt_dist.kernels.triton_math import power, unit_sum

ELEMENT_STRIDE = tl.constexpr(Item._fields.index("element_stride"))
LANDING = tl.constexpr(Item._fields.index("landing"))
SIDE = tl.constexpr(Item._fields.index("side"))
WEIGHTS = tl.constexpr(2)  # of a parameter: those of all gradients in the momentum that is read, and in the one before


@triton.jit(do_not_specialize=["count"])
def momentum_weights(parameters, rules, weights, count, BLOCK: tl.constexpr):
    """`moments.first_weight` of each parameter, and ``1 - b1**(t-1)``: ``[count, WEIGHTS]`` fp64."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    parameter = parameters + i * POINTERS
    step = tl.load(parameter + 4, mask=live, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(step, mask=live, other=1.0).to(tl.int32)
    rule = rules + tl.load(parameter + 5, mask=live, other=0) * RULE
    beta1, correct = tl.load(rule + BETA1), tl.load(rule + CORRECT_BIAS) != 0
    nesterov = tl.load(rule + NESTEROV) != 0
    tl.store(weights + i * WEIGHTS, tl.where(correct, 1 - power(beta1, t + nesterov), 1.0), mask=live)
    tl.store(weights + i * WEIGHTS + 1, 1 - power(beta1, t - 1), mask=live)


@triton.jit(do_not_specialize=["partials"])
def units(
    items,  # [programs, ITEM] int64
    parameters,  # [P, POINTERS] int64
    rules,  # [R, RULE] fp64
    weights,  # [P, WEIGHTS] fp64, of `momentum_weights`
    exchange,  # elements of cut units, fp32 or fp64
    sums,  # [T] fp64, two numbers a tensor, where SEND
    squares,  # [2, partials] fp64, else: of the momentum and of its approximation, of each item
    landing,  # [elements], what is sent
    partials,
    GAINED: tl.constexpr,  # functions of the formula: `detail_gain`, `momentum`, `sent`
    MOMENTUM: tl.constexpr,
    U: tl.constexpr,
    SEND: tl.constexpr,
    LEVEL: tl.constexpr,
    GAIN: tl.constexpr,  # 2**(-LEVEL / 2)
    GRADIENT: tl.constexpr,  # dtypes
    EXP_AVG: tl.constexpr,  # as stored, see `triton_formats`
    SENT: tl.constexpr,
    PLAIN: tl.constexpr,  # one run of whole units, aligned to 16 bytes, a multiple of 16 units
    BLOCK: tl.constexpr,  # units taken at once, whole cells
):
    """The sums of one item, or its momentum and what is sent of it."""
    UNIT: tl.constexpr = 1 << LEVEL
    item = items + tl.program_id(0).to(tl.int64) * ITEM
    number, element, moment = tl.load(item + PARAMETER), tl.load(item + ELEMENT), tl.load(item + MOMENT)
    total_rows, per_row = tl.load(item + ROWS).to(tl.int32), tl.load(item + UNITS).to(tl.int32)
    last = tl.load(item + LAST).to(tl.int32)
    element_stride = tl.load(item + ELEMENT_STRIDE).to(tl.int32)
    moment_stride = tl.load(item + MOMENT_STRIDE).to(tl.int32)
    slot, lead, held = tl.load(item + SLOT), tl.load(item + LEAD), tl.load(item + HELD)
    to = tl.load(item + LANDING)

    parameter = parameters + number * POINTERS
    g = tl.load(parameter + 1).to(tl.pointer_type(GRADIENT))
    m = tl.load(parameter + 2).to(tl.pointer_type(EXP_AVG))
    scales = tl.load(parameter + 6).to(tl.pointer_type(tl.float32)) + tl.load(item + FIRST_SCALE)
    if PLAIN:
        g, m, per_row = tl.multiple_of(g, 16), tl.multiple_of(m, 16), tl.multiple_of(per_row, 16)
        element, moment, to = tl.multiple_of(element, 16), tl.multiple_of(moment, 16), tl.multiple_of(to, 16)
    g, m = g + element, m + moment

    if SEND:
        rule = rules + tl.load(parameter + 5) * RULE
        beta1, nesterov = tl.load(rule + BETA1), tl.load(rule + NESTEROV) != 0
        rest1, beta1 = (1 - beta1).to(tl.float32), beta1.to(tl.float32)
        first_weight = tl.load(weights + number * WEIGHTS).to(tl.float32)
        place = tl.load(item + NORM)  # -1: the gain is a number
        norm, summed = sums + place, place >= 0
        before, least = tl.load(weights + number * WEIGHTS + 1), tl.load(rule + DETAIL_GAIN)
        # As in `triton_kernels.phase`.
        step, known = of_step(tl.load(parameter + 4), tl.load(rule + ROUNDING_SEED), tl.load(item + SALT))
        first_row, column = tl.load(item + ROW), tl.load(item + COLUMN)
        first_column, width = run_of(total_rows, column, per_row, last, tl.load(item + COLUMNS), LEVEL)
        gain = 0.0  # at level 0 there are no details
        if LEVEL > 0:
            squared_m, squared_a = tl.load(norm, summed, other=0.0), tl.load(norm + 1, summed, other=0.0)
            its_gain = GAINED(squared_m, squared_a, before, least, tl.load(rule + COHERENT) != 0)
            gain = its_gain.to(tl.float32)

    # Units are counted through all rows of the item. A cut cell comes whole from the exchange; of it, lead..lead+held
    # are sent.
    cut = slot >= 0
    lowest = tl.where(cut, lead, 0)
    highest = tl.where(cut, lead + held, per_row * UNIT)
    j = tl.arange(0, UNIT)[None, :]
    of_m, of_a = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    total = total_rows * per_row
    for first in range(0, total, BLOCK):
        i = first + tl.arange(0, BLOCK)
        live = i < total
        if PLAIN:
            at_m, at = i, (i * UNIT)[:, None] + j
            owned = live[:, None] & (j < UNIT)
            x = tl.load(g + at, mask=owned, other=0.0).to(tl.float32)
        else:
            row = i // per_row
            k = i - row * per_row
            at_m, at = row * moment_stride + k, (row * element_stride + k * UNIT)[:, None] + j
            length = tl.where(k == per_row - 1, last, UNIT)
            real = live[:, None] & (j < length[:, None])
            in_row = (k * UNIT)[:, None] + j
            owned = real & (in_row >= lowest) & (in_row < highest)
            present = tl.where(cut, 0, length)[:, None]  # elements that are in the gradient; of a cut cell, none
            x = tl.load(g + at, mask=real & (j < present), other=0.0).to(tl.float32)
            completed = tl.load(exchange + slot + at, mask=real & (j >= present), other=0.0).to(tl.float32)
            x = tl.where(cut, completed, x)
            at = at - lowest

        a = unit_sum(x, BLOCK, LEVEL) * GAIN
        cell, cells = first // CELL, tl.cdiv(total - first, CELL)
        exp_avg = read_moments(m, at_m, live, scales + cell, cells, CELL)
        if SEND:
            exp_avg = MOMENTUM(a, exp_avg, beta1, rest1)
            its_row, its_unit = places_of_units(
                first, first_row, column >> LEVEL, first_column >> LEVEL, tl.cdiv(width, UNIT), BLOCK, 1,
                ALIKE if PLAIN else 1,
            )  # fmt: skip
            chance = noise(EXP_AVG, key(step, known, 1), its_row, its_unit)
            exp_avg = keep_moments(exp_avg, chance >> 16, live, m, at_m, live, scales + cell, cells, CELL)
            u = U(x, a, exp_avg, beta1, rest1, first_weight, gain, nesterov, GAIN)
            tl.store(landing + to + at, u.to(SENT), mask=owned)
        else:
            wide_m, wide_a = exp_avg.to(tl.float64), a.to(tl.float64)
            of_m += tl.where(live & (lead == 0), wide_m * wide_m, 0.0)
            of_a += tl.where(live & (lead == 0), wide_a * wide_a, 0.0)
    if not SEND:
        place = tl.load(item + PLACE)
        tl.store(squares + place, tl.sum(of_m), mask=place >= 0)
        tl.store(squares + partials + place, tl.sum(of_a), mask=place >= 0)


@triton.jit
def keep(
    items,  # as of `units`
    parameters,
    rules,
    landing,  # [elements], what came back
    LOST: tl.constexpr,  # functions of the formula and of its way to write
    WRITTEN: tl.constexpr,
    LEVEL: tl.constexpr,
    WEIGHT: tl.constexpr,  # dtype
    STOCHASTIC: tl.constexpr,  # whether weights are rounded by noise
    PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,  # elements taken at once
):
    """The weights of one item, whose elements lie side by side: rows that are taken together are whole."""
    item = items + tl.program_id(0).to(tl.int64) * ITEM
    parameter = parameters + tl.load(item + PARAMETER) * POINTERS
    element, back = tl.load(item + ELEMENT), tl.load(item + LANDING)
    w = tl.load(parameter).to(tl.pointer_type(WEIGHT))
    if PLAIN:
        w, element, back = tl.multiple_of(w, 16), tl.multiple_of(element, 16), tl.multiple_of(back, 16)
    rows, units, last = tl.load(item + ROWS), tl.load(item + UNITS), tl.load(item + LAST)
    cut = tl.load(item + SLOT) >= 0
    elements = tl.where(cut, tl.load(item + HELD), rows * ((units - 1 << LEVEL) + last)).to(tl.int32)
    if PLAIN:
        elements = tl.multiple_of(elements, 16)
    w, o = w + element, landing + back

    rule = rules + tl.load(parameter + 5) * RULE
    lr = tl.load(rule + LR)
    size = LOST(lr, tl.load(rule + SCALE), tl.load(item + SIDE)).to(tl.float32)
    decay_factor = (1 - lr * tl.load(rule + WEIGHT_DECAY)).to(tl.float32)
    # As in `triton_kernels.phase`.
    step, known = of_step(tl.load(parameter + 4), tl.load(rule + ROUNDING_SEED), tl.load(item + SALT))
    first_row, column = tl.load(item + ROW), tl.load(item + COLUMN)
    first_column, width = run_of(rows, column, units, last, tl.load(item + COLUMNS), LEVEL)
    column += tl.where(cut, tl.load(item + LEAD), 0)
    for first in range(0, elements, BLOCK):
        i = first + tl.arange(0, BLOCK)
        live = i < elements
        change = tl.load(o + i, mask=live, other=0.0).to(tl.float32) * size
        weight = WRITTEN(tl.load(w + i, mask=live, other=0.0).to(tl.float32), change, decay_factor)
        if STOCHASTIC:
            its_row, its_column = places_of_units(
                first, first_row, column, first_column, width, BLOCK, 1, ALIKE if PLAIN else 1
            )
            weight = bf16(weight, noise(WEIGHT, key(step, known, 0), its_row, its_column) >> 16)
        tl.store(w + i, weight.to(WEIGHT), mask=live)

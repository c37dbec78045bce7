"""The Triton kernels themselves; imports triton, so import it inside functions alone. See `triton.py`.

fp32 mathematics on fp32 or bf16 buffers in single operations, in the order of `formulas`; launched without fusion of
multiplications and additions, so that a unit has the bits of the reference.
"""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

from gwt_dist.kernels.items import Item
from gwt_dist.kernels.triton_formats import (
    ALIKE,
    CELL,
    bf16,
    keep,
    key,
    mix,
    noise,
    of_step,
    places_of,
    places_of_units,
    read,
    run_of,
    spread,
)
from gwt_dist.kernels.triton_lines import PART, before, changes, place_of_change, places, ring, to_parts
from gwt_dist.kernels.triton_math import power, unit_sum
from gwt_dist.programs import ADAM

NUMBERS = "lr", *ADAM  # of a rule, in the order of their table

# Where a number is in a row of a table; the orders are those of `work.Item` and of `NUMBERS`.
_FIELDS = *Item._fields, "place"  # the last: where the partial norm of an item goes
ITEM = tl.constexpr(len(_FIELDS))
PARAMETER = tl.constexpr(_FIELDS.index("parameter"))
ELEMENT = tl.constexpr(_FIELDS.index("element"))
MOMENT = tl.constexpr(_FIELDS.index("moment"))
ROWS = tl.constexpr(_FIELDS.index("rows"))
UNITS = tl.constexpr(_FIELDS.index("units"))
LAST = tl.constexpr(_FIELDS.index("last"))
MOMENT_STRIDE = tl.constexpr(_FIELDS.index("moment_stride"))
ROW = tl.constexpr(_FIELDS.index("row"))
COLUMN = tl.constexpr(_FIELDS.index("column"))
COLUMNS = tl.constexpr(_FIELDS.index("columns"))
SALT = tl.constexpr(_FIELDS.index("salt"))
FIRST_SCALE = tl.constexpr(_FIELDS.index("scale"))
SLOT = tl.constexpr(_FIELDS.index("slot"))
LEAD = tl.constexpr(_FIELDS.index("lead"))
HELD = tl.constexpr(_FIELDS.index("held"))
NORM = tl.constexpr(_FIELDS.index("norm"))
PLACE = tl.constexpr(_FIELDS.index("place"))

RULE = tl.constexpr(len(NUMBERS))
LR = tl.constexpr(NUMBERS.index("lr"))
BETA1 = tl.constexpr(NUMBERS.index("beta1"))
BETA2 = tl.constexpr(NUMBERS.index("beta2"))
EPS = tl.constexpr(NUMBERS.index("eps"))
WEIGHT_DECAY = tl.constexpr(NUMBERS.index("weight_decay"))
SCALE = tl.constexpr(NUMBERS.index("scale"))
DETAIL_GAIN = tl.constexpr(NUMBERS.index("detail_gain"))
COHERENT = tl.constexpr(NUMBERS.index("coherent"))
LIMITER = tl.constexpr(NUMBERS.index("limiter"))
NESTEROV = tl.constexpr(NUMBERS.index("nesterov"))
CORRECT_BIAS = tl.constexpr(NUMBERS.index("correct_bias"))
ROUNDING_SEED = tl.constexpr(NUMBERS.index("rounding_seed"))

# Of a parameter: weight, gradient, both moments, step; number of its rule; scales of both moments.
POINTERS = tl.constexpr(8)
SIZES = tl.constexpr(6)  # of a parameter: `sizes` of its details, three numbers at level 0 and three above


@triton.jit
def phase(
    items,  # [programs, ITEM] int64
    parameters,  # [P, POINTERS] int64
    rules,  # [R, RULE] fp64
    sizes,  # [P, SIZES] fp64, of `count`
    exchange,  # elements of cut units, fp32 or fp64
    rho,  # [T] fp64
    partials,  # [places] fp64, squared norms of items
    SECOND: tl.constexpr,  # functions of the formula, of its details, and of its way to write
    CHANGE: tl.constexpr,
    WRITTEN: tl.constexpr,
    MOMENTS: tl.constexpr,
    WRITE: tl.constexpr,
    LEVEL: tl.constexpr,
    GAIN: tl.constexpr,  # 2**(-LEVEL / 2)
    WEIGHT: tl.constexpr,  # dtypes
    GRADIENT: tl.constexpr,
    EXP_AVG: tl.constexpr,  # as stored, see `triton_formats`
    EXP_AVG_SQ: tl.constexpr,
    STOCHASTIC: tl.constexpr,  # whether weights are rounded by noise
    PLAIN: tl.constexpr,  # one run of whole units, aligned to 16 bytes, a multiple of 16 units; else see `triton_lines`
    BLOCK: tl.constexpr,  # units taken at once, whole cells
):
    """Moments, weights or both of one item."""
    UNIT: tl.constexpr = 1 << LEVEL
    N: tl.constexpr = BLOCK * UNIT
    V: tl.constexpr = UNIT if PLAIN else min(UNIT, PART)  # elements of a part of a unit
    PARTS: tl.constexpr = UNIT // V
    M: tl.constexpr = BLOCK * PARTS  # parts taken at once
    CELL_M: tl.constexpr = CELL * PARTS  # those of a cell
    item = items + tl.program_id(0).to(tl.int64) * ITEM
    number, element, moment = tl.load(item + PARAMETER), tl.load(item + ELEMENT), tl.load(item + MOMENT)
    rows, units = tl.load(item + ROWS).to(tl.int32), tl.load(item + UNITS).to(tl.int32)
    last = tl.load(item + LAST).to(tl.int32)
    moment_stride = tl.load(item + MOMENT_STRIDE).to(tl.int32)
    slot, lead, held = tl.load(item + SLOT), tl.load(item + LEAD), tl.load(item + HELD)
    norm, place = tl.load(item + NORM), tl.load(item + PLACE)

    parameter = parameters + number * POINTERS
    if PLAIN:
        element, moment, units = tl.multiple_of(element, 16), tl.multiple_of(moment, 16), tl.multiple_of(units, 16)
        w = tl.multiple_of(tl.load(parameter).to(tl.pointer_type(WEIGHT)), 16) + element
        g = tl.multiple_of(tl.load(parameter + 1).to(tl.pointer_type(GRADIENT)), 16) + element
        m = tl.multiple_of(tl.load(parameter + 2).to(tl.pointer_type(EXP_AVG)), 16) + moment
        v = tl.multiple_of(tl.load(parameter + 3).to(tl.pointer_type(EXP_AVG_SQ)), 16) + moment
    else:
        w = tl.load(parameter).to(tl.pointer_type(WEIGHT)) + element
        g = tl.load(parameter + 1).to(tl.pointer_type(GRADIENT)) + element
        m = tl.load(parameter + 2).to(tl.pointer_type(EXP_AVG)) + moment
        v = tl.load(parameter + 3).to(tl.pointer_type(EXP_AVG_SQ)) + moment

    first_scale = tl.load(item + FIRST_SCALE)
    m_scales = tl.load(parameter + 6).to(tl.pointer_type(tl.float32)) + first_scale
    v_scales = tl.load(parameter + 7).to(tl.pointer_type(tl.float32)) + first_scale

    rule = rules + tl.load(parameter + 5) * RULE
    beta1, beta2, weight_decay = tl.load(rule + BETA1), tl.load(rule + BETA2), tl.load(rule + WEIGHT_DECAY)
    rest1, rest2 = (1 - beta1).to(tl.float32), (1 - beta2).to(tl.float32)
    decay_factor = (1 - tl.load(rule + LR) * weight_decay).to(tl.float32)
    beta1, beta2, eps = beta1.to(tl.float32), beta2.to(tl.float32), tl.load(rule + EPS).to(tl.float32)
    nesterov = tl.load(rule + NESTEROV) != 0
    # What noise is of.
    step, known = of_step(tl.load(parameter + 4), tl.load(rule + ROUNDING_SEED), tl.load(item + SALT))
    first_row, column = tl.load(item + ROW), tl.load(item + COLUMN)
    first_column, width = run_of(rows, column, units, last, tl.load(item + COLUMNS), LEVEL)
    if WRITE:
        detail_gain, coherent = tl.load(rule + DETAIL_GAIN).to(tl.float32), tl.load(rule + COHERENT) != 0
        its_sizes = sizes + number * SIZES + (3 if LEVEL > 0 else 0)
        size = tl.load(its_sizes)
        one, other = tl.load(its_sizes + 1).to(tl.float32), tl.load(its_sizes + 2).to(tl.float32)
        if LEVEL > 0:
            size = size * tl.load(rule + SCALE)
        if not MOMENTS:
            size = size / tl.load(rho + norm, mask=norm >= 0, other=1.0)
        factor = size.to(tl.float32)

    # Units are counted through all rows of the item, which lie one behind another. A cut unit comes whole from the
    # exchange; its weights lie at lead..lead+held of it.
    q = tl.arange(0, M)
    squares = tl.zeros((M,), tl.float64)
    total = rows * units
    if not PLAIN:
        cut = slot >= 0
        lowest = tl.where(cut, lead, 0).to(tl.int32)
        w, g = w - lowest, g - lowest
        columns = (units - 1) * UNIT + last
        padding = units * UNIT - columns  # of a row: where it would be, there is the next row
    for turn in range(0, total, BLOCK):
        if PLAIN:
            i = turn + q
            live = i < total
            leads = live
            at_m, at = i, (i * UNIT)[:, None] + tl.arange(0, UNIT)[None, :]
            count = tl.full((M,), UNIT, tl.float32)
            real = live[:, None] & (tl.arange(0, UNIT)[None, :] < UNIT)
            x = tl.load(g + at, mask=real, other=0.0).to(tl.float32)
        else:
            i = turn + q // PARTS
            live = i < total
            leads = live & (q % PARTS == 0)  # of the parts of a unit, the one that stands for it
            row = tl.zeros((M,), tl.int32)
            # Elements of this turn, counted from the first of the item; divisions are dear.
            begin, end = turn * UNIT, total * UNIT - padding
            if rows > 1:
                row = i // units
                after = tl.minimum(turn + BLOCK, total)
                begin, end = begin - turn // units * padding, after * UNIT - after // units * padding
            k = i - row * units
            at_m = row * moment_stride + k
            length = tl.where(k == units - 1, last, UNIT)
            count = length.to(tl.float32)
            # Those of them that this rank has, counted from the first of the turn.
            low, high = lowest, tl.where(cut, lead + held, tl.minimum(end - begin, N)).to(tl.int32)

            if WRITE:
                # Before anything waits for the gradient, so that both are on their way together.
                shift = before(w + begin)
                on_ring = ring(tl.arange(0, N), shift, N)
                at_w, at = w + begin - shift + on_ring, on_ring - shift
                owned = (at - low).to(tl.uint32) < (high - low).to(tl.uint32)
                weight = tl.load(at_w, mask=owned)
            shift = before(g + begin)
            on_ring = ring(places(N), shift, N)
            if cut:
                x = tl.load(exchange + slot - shift + on_ring, mask=on_ring < shift + columns).to(tl.float32)
            else:
                x = tl.load(g + begin - shift + on_ring, mask=on_ring < shift + high).to(tl.float32)
            first = turn * UNIT - begin + q * V - row * padding
            x = to_parts(x, first + shift, tl.where(live, length - q % PARTS * V, 0), N, V)

        its_row, its_unit = 0, 0
        if STOCHASTIC or EXP_AVG != tl.float32 or EXP_AVG_SQ != tl.float32:
            its_row, its_unit = places_of_units(
                turn, first_row, column >> LEVEL, first_column >> LEVEL, tl.cdiv(width, UNIT), M, PARTS,
                ALIKE if PLAIN else 1,
            )  # fmt: skip
        cell, cells = turn // CELL, tl.cdiv(total - turn, CELL)
        exp_avg = read(m, at_m, live, m_scales + cell, cells, CELL_M)
        exp_avg_sq = read(v, at_m, live, v_scales + cell, cells, CELL_M)
        # Of a unit in parts all threads have read the moments before one writes them: sums of parts wait for all.
        a = unit_sum(x, M, LEVEL) * GAIN
        if MOMENTS:
            exp_avg = exp_avg * beta1 + a * rest1
            exp_avg_sq = exp_avg_sq * beta2 + SECOND(x, a, count, M, LEVEL) * rest2
            chance = noise(EXP_AVG if EXP_AVG != tl.float32 else EXP_AVG_SQ, key(step, known, 1), its_row, its_unit)
            exp_avg = keep(exp_avg, chance >> 16, live, m, at_m, leads, m_scales + cell, cells, CELL_M)
            exp_avg_sq = keep(exp_avg_sq, chance & 0xFFFF, live, v, at_m, leads, v_scales + cell, cells, CELL_M)
        n = exp_avg  # `moments.read`
        if LEVEL > 0:
            n = tl.where(nesterov, exp_avg * beta1 + a * rest1, n)
        if not WRITE:
            normed = tl.div_rn(n, tl.sqrt_rn(exp_avg_sq) + eps).to(tl.float64)
            squares += tl.where(leads & (lead == 0), normed * normed, 0.0)
        elif PLAIN:
            change = CHANGE(
                x, a, exp_avg, exp_avg_sq, n, factor, one, other, rest1, eps, detail_gain, coherent, GAIN, LEVEL
            )
            weight = WRITTEN(tl.load(w + at, mask=real, other=0.0).to(tl.float32), change, decay_factor)
            if STOCHASTIC:
                its_row = spread(mix(its_row ^ key(step, known, 0)), M)
                its_column = (its_unit << LEVEL)[:, None] + tl.arange(0, UNIT)[None, :].to(tl.uint32)
                weight = bf16(weight, mix(its_column ^ its_row[:, None]) >> 16)
            tl.store(w + at, weight.to(WEIGHT), mask=real)
        else:
            change = changes(
                CHANGE, x, a, exp_avg, exp_avg_sq, n, factor, one, other, rest1, eps, detail_gain, coherent, GAIN,
                LEVEL, M, V,
            )  # fmt: skip
            if STOCHASTIC:
                its_row, its_column = places_of(begin + at, first_row, column, first_column, width)
                of_w = noise(WEIGHT, key(step, known, 0), its_row, its_column)
            if rows > 1:
                at = tl.minimum(at + (begin + at) // columns * padding + begin - turn * UNIT, N - 1)
            change = tl.gather(change, place_of_change(at, M, V), 0)
            weight = WRITTEN(weight.to(tl.float32), change, decay_factor)
            if STOCHASTIC:
                weight = bf16(weight, of_w >> 16)
            tl.store(at_w, weight.to(WEIGHT), mask=owned)
    if not WRITE:
        tl.store(partials + place, tl.sum(squares), mask=place >= 0)


@triton.jit
def add_partials(
    partials, norms, limited, rules, squared_norms, ADD: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds the partial squared norms of one tensor in one order, `norms` ``[programs, 3]`` says which.

    With ADD to what is there, else in its place; with LIMIT its rho is.
    """
    norm = norms + tl.program_id(0) * 3
    number, begin, end = tl.load(norm), tl.load(norm + 1), tl.load(norm + 2)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partials + i, mask=i < end, other=0.0)
    found = tl.sum(total)
    if ADD:
        found += tl.load(squared_norms + number)
    if LIMIT:
        found = _limited(found, number, limited, rules, True)
    tl.store(squared_norms + number, found)


@triton.jit(do_not_specialize=["count"])
def limit(limited, rules, sums, count, BLOCK: tl.constexpr):
    """In the place of `count` complete squared norms their rho."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    tl.store(sums + i, _limited(tl.load(sums + i, mask=live, other=0.0), i, limited, rules, live), mask=live)


@triton.jit
def _limited(squared_norm, i, limited, rules, live):
    """`limiter.limit_growth`: rho, and what is to be remembered of the norm is.

    `limited` ``[norms, 2]`` int64 says where that lies, fp32, and which rule it has.
    """
    place = tl.load(limited + i * 2, mask=live, other=0).to(tl.pointer_type(tl.float32))
    limiter = tl.load(rules + tl.load(limited + i * 2 + 1, mask=live, other=0) * RULE + LIMITER)
    before = tl.load(place, mask=live, other=0.0).to(tl.float64)
    norm = tl.sqrt(squared_norm)
    valid = (norm > 0) & (norm < float("inf"))
    growth = norm / (before + 1e-8)
    rho = tl.where(valid & (before > 0), tl.where(growth > limiter, growth, limiter) / limiter, 1.0)
    tl.store(place, tl.where(valid, norm / rho, before).to(tl.float32), mask=live)
    return rho


@triton.jit(do_not_specialize=["length"])
def count(parameters, first, rules, sizes, length, OF_DETAIL: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the step of the parameters of which `first`, fp32, is 1 and not 0, and what else changes from step to
    step of each, fp64: `sizes` of its details (`OF_DETAIL`).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < length
    parameter = parameters + i * POINTERS
    step = tl.load(parameter + 4, mask=live, other=0).to(tl.pointer_type(tl.float32))
    now = tl.load(step, mask=live, other=1.0) + tl.load(first + i, mask=live, other=0.0)
    tl.store(step, now, mask=live)
    t = now.to(tl.int32)
    rule = rules + tl.load(parameter + 5, mask=live, other=0) * RULE
    lr, beta1, beta2 = tl.load(rule + LR), tl.load(rule + BETA1), tl.load(rule + BETA2)
    nesterov, correct = tl.load(rule + NESTEROV) != 0, tl.load(rule + CORRECT_BIAS) != 0
    whole1, whole2 = 1 - power(beta1, t), 1 - power(beta2, t)
    # `moments.first_weight`: one more decay is in it with Nesterov, above level 0 alone.
    first, later = tl.where(correct, whole1, 1.0), tl.where(correct, 1 - power(beta1, t + nesterov), 1.0)
    second = tl.where(correct, whole2, 1.0)
    size, one, other = OF_DETAIL(t, lr, beta1, first, second, whole1, whole2)
    tl.store(sizes + i * SIZES, size, mask=live)
    tl.store(sizes + i * SIZES + 1, one, mask=live)
    tl.store(sizes + i * SIZES + 2, other, mask=live)
    size, one, other = OF_DETAIL(t, lr, beta1, later, second, whole1, whole2)
    tl.store(sizes + i * SIZES + 3, size, mask=live)
    tl.store(sizes + i * SIZES + 4, one, mask=live)
    tl.store(sizes + i * SIZES + 5, other, mask=live)

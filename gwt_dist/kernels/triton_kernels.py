"""The Triton kernels themselves; imports triton, so import it inside functions alone. See `triton.py`.

fp32 mathematics on fp32 or bf16 buffers in single operations, in the order of `update.py`; launched without fusion of
multiplications and additions, so that a unit has the bits of the reference.
"""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

ITEM: tl.constexpr = tl.constexpr(14)  # fields of an item: those of `work.Item`, and the place of its partial norm
POINTERS: tl.constexpr = tl.constexpr(6)  # of a parameter: weight, gradient, both moments, step; number of its rule
RULE: tl.constexpr = tl.constexpr(9)  # lr, beta1, beta2, eps, weight_decay, scale, detail_gain, energy, coherent
SIZES: tl.constexpr = tl.constexpr(3)  # of a parameter: its step size; factor and limit of the coherence


@triton.jit
def _unit_sum(x, BLOCK: tl.constexpr, LEVEL: tl.constexpr):
    """Sum ``[BLOCK, 2**LEVEL]`` over units into ``[BLOCK]``, a tree of neighbours as `wavelet.unit_sum`."""
    for level in tl.static_range(LEVEL):
        even, odd = tl.split(tl.reshape(x, (BLOCK, 1 << (LEVEL - 1 - level), 2)))
        x = even + odd
    return tl.reshape(x, (BLOCK,))


@triton.jit
def phase(
    items,  # [programs, ITEM] int64
    parameters,  # [P, POINTERS] int64
    rules,  # [R, RULE] fp64
    sizes,  # [P, SIZES] fp64, of `step_sizes`
    exchange,  # elements of cut units, fp32 or fp64
    rho,  # [T] fp64
    partials,  # [places] fp64, squared norms of items
    MOMENTS: tl.constexpr,
    WRITE: tl.constexpr,
    LEVEL: tl.constexpr,
    GAIN: tl.constexpr,  # 2**(-LEVEL / 2)
    WEIGHT: tl.constexpr,  # dtypes
    GRADIENT: tl.constexpr,
    PLAIN: tl.constexpr,  # one run of whole units, aligned to 16 bytes, a multiple of 16 units
    BLOCK: tl.constexpr,  # units taken at once
):
    """Moments, weights or both of one item."""
    UNIT: tl.constexpr = 1 << LEVEL
    item = items + tl.program_id(0).to(tl.int64) * ITEM
    number, element, moment = tl.load(item), tl.load(item + 2), tl.load(item + 3)
    rows, units, last = tl.load(item + 4).to(tl.int32), tl.load(item + 5).to(tl.int32), tl.load(item + 6).to(tl.int32)
    element_stride, moment_stride = tl.load(item + 7).to(tl.int32), tl.load(item + 8).to(tl.int32)
    slot, lead, held = tl.load(item + 9), tl.load(item + 10), tl.load(item + 11)
    norm, place = tl.load(item + 12), tl.load(item + 13)

    parameter = parameters + number * POINTERS
    if PLAIN:
        element, moment, units = tl.multiple_of(element, 16), tl.multiple_of(moment, 16), tl.multiple_of(units, 16)
        w = tl.multiple_of(tl.load(parameter).to(tl.pointer_type(WEIGHT)), 16) + element
        g = tl.multiple_of(tl.load(parameter + 1).to(tl.pointer_type(GRADIENT)), 16) + element
        m = tl.multiple_of(tl.load(parameter + 2).to(tl.pointer_type(tl.float32)), 16) + moment
        v = tl.multiple_of(tl.load(parameter + 3).to(tl.pointer_type(tl.float32)), 16) + moment
    else:
        w = tl.load(parameter).to(tl.pointer_type(WEIGHT)) + element
        g = tl.load(parameter + 1).to(tl.pointer_type(GRADIENT)) + element
        m = tl.load(parameter + 2).to(tl.pointer_type(tl.float32)) + moment
        v = tl.load(parameter + 3).to(tl.pointer_type(tl.float32)) + moment

    rule = rules + tl.load(parameter + 5) * RULE
    beta1, beta2, weight_decay = tl.load(rule + 1), tl.load(rule + 2), tl.load(rule + 4)
    rest1, rest2 = (1 - beta1).to(tl.float32), (1 - beta2).to(tl.float32)
    decay_factor = (1 - tl.load(rule) * weight_decay).to(tl.float32)
    beta1, beta2, eps = beta1.to(tl.float32), beta2.to(tl.float32), tl.load(rule + 3).to(tl.float32)
    detail_gain, energy = tl.load(rule + 6).to(tl.float32), tl.load(rule + 7) != 0
    coherent = tl.load(rule + 8) != 0
    if WRITE:
        size = tl.load(sizes + number * SIZES)
        steady = tl.load(sizes + number * SIZES + 1).to(tl.float32)
        most = tl.load(sizes + number * SIZES + 2).to(tl.float32)
        if LEVEL > 0:
            size = size * tl.load(rule + 5)
        if not MOMENTS:
            size = size / tl.load(rho + norm, mask=norm >= 0, other=1.0)
        factor = size.to(tl.float32)

    # Units are counted through all rows of the item. A cut unit comes whole from the exchange; its weights lie at
    # lead..lead+held of it.
    cut = slot >= 0
    lowest = tl.where(cut, lead, 0)
    highest = tl.where(cut, lead + held, UNIT)
    j = tl.arange(0, UNIT)[None, :]
    squares = tl.zeros((BLOCK,), tl.float64)
    total = rows * units
    for first in range(0, total, BLOCK):
        i = first + tl.arange(0, BLOCK)
        live = i < total
        if PLAIN:
            at_m, at = i, (i * UNIT)[:, None] + j
            count = tl.full((BLOCK,), UNIT, tl.float32)
            real = live[:, None] & (j < UNIT)
            owned = real
            x = tl.load(g + at, mask=real, other=0.0).to(tl.float32)
        else:
            row = i // units
            k = i - row * units
            at_m, at = row * moment_stride + k, (row * element_stride + k * UNIT)[:, None] + j
            length = tl.where(k == units - 1, last, UNIT)
            count = length.to(tl.float32)
            real = live[:, None] & (j < length[:, None])
            owned = real & (j >= lowest) & (j < highest)
            present = tl.where(cut, 0, length)[:, None]  # elements that are in the gradient; of a cut unit, none
            x = tl.load(g + at, mask=real & (j < present), other=0.0).to(tl.float32)
            completed = tl.load(exchange + slot + at, mask=real & (j >= present), other=0.0).to(tl.float32)
            x = tl.where(cut, completed, x)
            at = at - lowest

        a = _unit_sum(x, BLOCK, LEVEL) * GAIN
        exp_avg = tl.load(m + at_m, mask=live, other=0.0)
        exp_avg_sq = tl.load(v + at_m, mask=live, other=0.0)
        if MOMENTS:
            e = tl.where(energy, tl.div_rn(_unit_sum(x * x, BLOCK, LEVEL), count), a * a)
            exp_avg = exp_avg * beta1 + a * rest1
            exp_avg_sq = exp_avg_sq * beta2 + e * rest2
            tl.store(m + at_m, exp_avg, mask=live)
            tl.store(v + at_m, exp_avg_sq, mask=live)
        d = tl.sqrt_rn(exp_avg_sq) + eps
        if WRITE:
            inverse = tl.div_rn(1.0, d)
            size_of_unit = inverse * factor
            # `update.coherence`
            before = (exp_avg - a * rest1) * inverse
            most_steady = tl.minimum(before * before * steady, most, propagate_nan=tl.PropagateNan.ALL)
            gain = tl.maximum(detail_gain, most_steady, propagate_nan=tl.PropagateNan.ALL)
            gain = tl.where(coherent, gain, detail_gain)
            detail_size = size_of_unit * (gain if LEVEL > 0 else 0.0)
            rest = exp_avg * GAIN * size_of_unit - a * GAIN * detail_size
            change = x * detail_size[:, None] + rest[:, None]
            weight = (tl.load(w + at, mask=owned, other=0.0).to(tl.float32) - change) * decay_factor
            tl.store(w + at, weight.to(WEIGHT), mask=owned)
        else:
            normed = tl.div_rn(exp_avg, d).to(tl.float64)
            squares += tl.where(live & (lead == 0), normed * normed, 0.0)
    if not WRITE:
        tl.store(partials + place, tl.sum(squares), mask=place >= 0)


@triton.jit
def add_partials(partials, norms, squared_norms, BLOCK: tl.constexpr):
    """Adds the partial squared norms of one tensor to its own, in one order; `norms` ``[programs, 3]`` says which."""
    norm = norms + tl.program_id(0) * 3
    begin, end = tl.load(norm + 1), tl.load(norm + 2)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partials + i, mask=i < end, other=0.0)
    place = squared_norms + tl.load(norm)
    tl.store(place, tl.load(place) + tl.sum(total))


@triton.jit
def _halves(x):
    """Two fp64 of 26 bits each whose sum is x."""
    wide = x * 134217729.0  # 2**27 + 1
    high = wide - (wide - x)
    return high, x - high


@triton.jit
def _multiply(x, x_low, y, y_low):
    """Product of two numbers, each the sum of two fp64 (T. J. Dekker, A floating-point technique, 1971).

    Without a fused multiply-add, which Triton's interpreter rounds twice in some releases.
    """
    x_high, x_rest = _halves(x)
    y_high, y_rest = _halves(y)
    high = x * y
    low = x_rest * y_rest - (((high - x_high * y_high) - x_rest * y_high) - x_high * y_rest)
    low += x * y_low + x_low * y
    total = high + low
    return total, low - (total - high)


@triton.jit
def _power(base, n):
    """``base**n`` for fp64 base and whole n >= 0, to the last bit or next to it, as `pow` would return it.

    Plain squaring would lose a bit with each doubling of n, and 1 - base**n ten more where base is near 1.
    """
    power, power_low = tl.full(base.shape, 1.0, tl.float64), tl.full(base.shape, 0.0, tl.float64)
    low = tl.full(base.shape, 0.0, tl.float64)
    while tl.max(n) > 0:
        product, product_low = _multiply(power, power_low, base, low)
        odd = (n & 1) == 1
        power, power_low = tl.where(odd, product, power), tl.where(odd, product_low, power_low)
        base, low = _multiply(base, low, base, low)
        n = n >> 1
    return power + power_low


@triton.jit(do_not_specialize=["count"])
def step_sizes(parameters, rules, sizes, count, BLOCK: tl.constexpr):
    """Numbers of each parameter that change from step to step, fp64, as `update.step_size` and `update.coherence`."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    parameter = parameters + i * POINTERS
    step = tl.load(parameter + 4, mask=live, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(step, mask=live, other=1.0).to(tl.int32)
    rule = rules + tl.load(parameter + 5, mask=live, other=0) * RULE
    lr, beta1, beta2 = tl.load(rule), tl.load(rule + 1), tl.load(rule + 2)
    whole1, whole2 = 1 - _power(beta1, t), 1 - _power(beta2, t)
    before = whole1 - (1 - beta1)
    later = (t > 1) & (before > 0)
    steady = tl.where(later, whole1 * whole2 / tl.where(later, before * before, 1.0), 0.0)
    tl.store(sizes + i * SIZES, tl.sqrt(whole2) / whole1 * lr, mask=live)
    tl.store(sizes + i * SIZES + 1, steady, mask=live)
    tl.store(sizes + i * SIZES + 2, whole1, mask=live)

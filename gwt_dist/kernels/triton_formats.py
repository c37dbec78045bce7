"""Moments as they are stored, and noise for rounding, in Triton: gwt_dist/formulas/codecs.py and gwt_dist/noise.py.

Imports triton. A kernel knows a format by the dtype of what is stored: fp32, bf16, int8, or uint8 for e4m4.
The numbers of a cell lie side by side among those that a program takes at once: `cell` of them, copies included.
"""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

from gwt_dist.formats import CELL as _CELL

CELL = tl.constexpr(_CELL)
ALIKE = tl.constexpr(16)  # units whose places are plain: as many neighbours of them are of one row
_FAR = tl.constexpr(1 << 30)  # more than a program takes at once


@triton.jit
def mix(x):
    """`noise.mix` of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def of_step(address, seed, salt):
    """A step by the address of its fp32, and what is known of a tensor by seed (fp64) and salt (int64): uint32 each."""
    step = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.int32).to(tl.uint32)
    return step, mix(seed.to(tl.int64).to(tl.uint32) ^ salt.to(tl.uint32))


@triton.jit
def key(step, known, WHAT: tl.constexpr):
    """`noise.key` of what `of_step` found, uint32."""
    return mix(step ^ mix(known ^ WHAT))


@triton.jit
def run_of(rows, column, units, last, row_columns, LEVEL: tl.constexpr):
    """Of an item: the first column that a row of its run has, and how many it has; `places_of` takes both.

    Several runs are of a row each, from one column on; a single one goes on to the end of its row, and in the next.
    """
    several = rows > 1
    return tl.where(several, column, 0), tl.where(several, (units - 1 << LEVEL) + last, row_columns)


@triton.jit
def places_of(
    q,  # int32, counted from the first place of the item
    row,  # 0-d int64, as all that follow: where that is in the tensor
    column,
    first,  # the run has columns first..first+width of this row, and of the rows after it
    width,
):
    """Row and column of places of a run, uint32 of the shape of q."""
    column -= first
    rest, width = tl.minimum(width - column, _FAR).to(tl.int32), tl.minimum(width, _FAR).to(tl.int32)
    over = q - rest  # from the next row on; below 2**21, so that fp32 divides it as integers are divided
    rows = ((over.to(tl.float32) + 0.5) * tl.div_rn(1.0, width.to(tl.float32))).to(tl.int32)
    further = over >= 0
    row = row.to(tl.uint32) + tl.where(further, 1 + rows, 0).to(tl.uint32)
    within = tl.where(further, (over - rows * width).to(tl.uint32), column.to(tl.uint32) + q.to(tl.uint32))
    return row, first.to(tl.uint32) + within


@triton.jit
def places_of_units(turn, row, column, first, width, N: tl.constexpr, COPIES: tl.constexpr, ALIKE: tl.constexpr):
    """The same of N places from `turn` on in COPIES each: columns ``[N]``, and rows of which `spread` makes N.

    ALIKE neighbours are of one row.
    """
    TOGETHER: tl.constexpr = min(ALIKE * COPIES, N)
    row, column = places_of(turn + tl.arange(0, N // TOGETHER) * (TOGETHER // COPIES), row, column, first, width)
    return row, spread(column, N) + (tl.arange(0, N) % TOGETHER // COPIES).to(tl.uint32)


@triton.jit
def spread(x, N: tl.constexpr):
    """N numbers, neighbours of which have the same number of x."""
    n: tl.constexpr = x.shape[0]
    return tl.reshape(tl.broadcast_to(x[:, None], (n, N // n)), (N,))


@triton.jit
def noise(STORED: tl.constexpr, key, row, column):
    """`noise.noise` of what `places_of_units` found, uint32; 0 for what is stored without."""
    if STORED == tl.float32:
        return 0
    else:
        return mix(column ^ spread(mix(row ^ key), column.shape[0]))


@triton.jit
def bf16(x, chance):
    """`codecs.round_bf16` of fp32 x, bf16."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    upper = tl.where(finite, bits + chance, bits) >> 16
    upper |= tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x40, 0).to(tl.uint32)
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _tops(x, live, cell: tl.constexpr):
    """`codecs.tops` of the live ones of x: int32, one a cell."""
    bits = tl.where(live, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    return tl.max(tl.reshape(bits, (x.shape[0] // cell, cell)), 1)


@triton.jit
def _decode(code, scale):
    """`codecs.decode_int8` or `decode_e4m4`, by the dtype of the codes; a scale each."""
    if code.dtype == tl.int8:
        code = code.to(tl.float32)
        return scale * (code * (tl.abs(code) + 127.0))
    else:
        return scale * ((code.to(tl.int32) + (112 << 4)) << 19).to(tl.float32, bitcast=True)


@triton.jit
def _encode_int8(x, chance, top):
    """`codecs.encode_int8`; `top` is of cells."""
    scale = top.to(tl.float32, bitcast=True) * 3.100006142631173e-05
    usable = (scale >= 1.1754943508222875e-38) & (scale < float("inf"))  # 2**-126
    inverse = tl.div_rn(1.0, tl.where(usable, scale, 1.0))
    # Of a cell without a use for its scale x may be NaN, which no integer is.
    y = tl.where(spread(usable, x.shape[0]), x, 0.0) * spread(inverse, x.shape[0])
    z = tl.sqrt_rn(tl.abs(y) + 4032.25) - 63.5
    z = (z.to(tl.uint32, bitcast=True) | (y.to(tl.uint32, bitcast=True) & 0x80000000)).to(tl.float32, bitcast=True)
    y = z + chance.to(tl.float32) * 1.52587890625e-05  # 2**-16
    # Not by `tl.floor`, which takes the smallest numbers for zero.
    code = y.to(tl.int32)
    code -= tl.where(code.to(tl.float32) > y, 1, 0)
    return tl.minimum(tl.maximum(code, -127), 127).to(tl.int8), scale


@triton.jit
def _encode_e4m4(x, chance, top):
    """`codecs.encode_e4m4`; `top` is of cells."""
    e = (top >> 23) + tl.where(((top & 0x7FFFFF) > (15 << 19)) & (top < (254 << 23)), 1, 0)
    e = tl.where(e < 32, 0, e)
    upper = (x.to(tl.int32, bitcast=True) + (chance << 3).to(tl.int32)) >> 19
    code = upper - spread((e - 15) << 4, x.shape[0])
    code = tl.where(spread((e > 0) & (e < 255), x.shape[0]), tl.minimum(tl.maximum(code, 0), 255), 0)
    return code.to(tl.uint8), (e << 23).to(tl.float32, bitcast=True)


@triton.jit
def read(
    pointer,  # to what is stored of them; with cells
    at,
    live,
    scales,  # to the scale of the first cell
    cells,  # that there are, from there on
    cell: tl.constexpr,
):
    """Moments at `pointer + at`, fp32."""
    stored = tl.load(pointer + at, mask=live, other=0)
    if stored.dtype == tl.float32:
        return stored
    elif stored.dtype == tl.bfloat16:
        return (stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        i = tl.arange(0, stored.shape[0] // cell)
        return _decode(stored, spread(tl.load(scales + i, mask=i < cells, other=0.0), stored.shape[0]))


@triton.jit
def keep(
    x,  # fp32
    chance,  # uint32, the 16 bits by which each is rounded, of formats other than fp32
    live,
    pointer,  # as of `read`
    at,
    leads,  # those that are stored: others are copies
    scales,
    cells,
    cell: tl.constexpr,
):
    """Stores moments; returns them as they are stored, fp32."""
    STORED: tl.constexpr = pointer.dtype.element_ty
    if STORED == tl.float32:
        tl.store(pointer + at, x, mask=leads)
        return x
    elif STORED == tl.bfloat16:
        code = bf16(x, chance)
        tl.store(pointer + at, code, mask=leads)
        return (code.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        top = _tops(x, live, cell)
        if STORED == tl.int8:
            code, scale = _encode_int8(x, chance, top)
        else:
            code, scale = _encode_e4m4(x, chance, top)
        tl.store(pointer + at, code, mask=leads)
        i = tl.arange(0, x.shape[0] // cell)
        tl.store(scales + i, scale, mask=i < cells)
        return _decode(code, spread(scale, x.shape[0]))

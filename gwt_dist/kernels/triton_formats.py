"""Moments as they are stored, and noise for rounding, in Triton: gwt_dist/formulas/codecs.py and noise.py.

Imports triton. A kernel knows a format by the dtype of what is stored (`STORED`): fp32, bf16, int8, or uint8 for e4m4.
The numbers of a cell lie side by side among those that a program takes at once: `cell` of them, copies included.
"""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

from gwt_dist.formats import CELL as _CELL

CELL = tl.constexpr(_CELL)
STORED = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "e4m4": "uint8"}
_FAR = tl.constexpr(1 << 30)  # more than a program takes at once


@triton.jit
def mix(x):
    """`noise.mix` of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def key(step, seed, salt, FIELD: tl.constexpr):
    """`noise.key`, uint32: of a step (fp32), a seed (fp64) and a salt (int64)."""
    its_own = mix(seed.to(tl.int64).to(tl.uint32) ^ salt.to(tl.uint32))
    return mix(step.to(tl.int32).to(tl.uint32) ^ mix(its_own ^ FIELD))


@triton.jit
def places(
    key,  # uint32
    row,  # 0-d int64, as all that follow but q: of the tensor
    column,  # its place in the `width` of a row from `first` on, of which a run takes all and goes on in the next row
    first,
    width,
    q,  # int32, counted from there
    LESS: tl.constexpr,  # than this
):
    """What `noise` takes of the places of a run: row and key together, and column; uint32 of the shape of q."""
    row, column = row + column // width, column % width
    rest, width = tl.minimum(width - column, _FAR).to(tl.int32), tl.minimum(width, _FAR).to(tl.int32)
    over = q - rest  # from the next row on
    further = over >= 0
    if width >= LESS:
        mixed = tl.where(further, mix((row + 1).to(tl.uint32) ^ key), mix(row.to(tl.uint32) ^ key))
    else:
        rows = tl.where(further, 1 + over // width, 0)
        over -= tl.where(further, over // width * width, 0)
        mixed = mix((row.to(tl.uint32) + rows.to(tl.uint32)) ^ key)
    return mixed, first.to(tl.uint32) + tl.where(further, over.to(tl.uint32), column.to(tl.uint32) + q.to(tl.uint32))


@triton.jit
def noise(mixed, column):
    """`noise.noise` of what `places` found, uint32."""
    return mix(column ^ mixed)


@triton.jit
def bf16(x, noise):
    """`codecs.round_bf16` of fp32 x, bf16."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    upper = tl.where(finite, bits + (noise >> 16), bits) >> 16
    upper |= tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x40, 0).to(tl.uint32)
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _spread(scale, N: tl.constexpr):
    """The scale of each of N numbers."""
    cells: tl.constexpr = scale.shape[0]
    return tl.reshape(tl.broadcast_to(scale[:, None], (cells, N // cells)), (N,))


@triton.jit
def _tops(x, live, cell: tl.constexpr):
    """`codecs.tops` of the live ones of x: int32, one a cell."""
    bits = tl.where(live, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    return tl.max(tl.reshape(bits, (x.shape[0] // cell, cell)), 1)


@triton.jit
def _decode(code, scale):
    """`codecs.decode_int8` or `decode_e4m4`, by the dtype of the codes; a scale each."""
    if code.dtype == tl.int8:
        return code.to(tl.float32) * scale
    else:
        return scale * ((code.to(tl.int32) + (112 << 4)) << 19).to(tl.float32, bitcast=True)


@triton.jit
def _encode_int8(x, noise, top):
    """`codecs.encode_int8`; `top` is of cells."""
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), 127.0)
    usable = (scale >= 1.1754943508222875e-38) & (scale < float("inf"))  # 2**-126
    inverse = tl.where(usable, tl.div_rn(1.0, scale), 0.0)
    y = x * _spread(inverse, x.shape[0])
    # Of a cell without a use for its scale y may be NaN, which no integer is.
    code = tl.floor(y + (noise >> 16).to(tl.float32) * 1.52587890625e-05)  # 2**-16
    code = tl.where(_spread(usable, x.shape[0]), tl.minimum(tl.maximum(code, -127.0), 127.0), 0.0)
    return code.to(tl.int32).to(tl.int8), scale


@triton.jit
def _encode_e4m4(x, noise, top):
    """`codecs.encode_e4m4`; `top` is of cells."""
    e = top >> 23
    e = tl.where(e < 32, 0, e)
    upper = (x.to(tl.int32, bitcast=True) + (noise >> 13).to(tl.int32)) >> 19
    code = upper - _spread((e - 15) << 4, x.shape[0])
    code = tl.where(_spread((e > 0) & (e < 255), x.shape[0]), tl.minimum(tl.maximum(code, 0), 255), 0)
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
        return _decode(stored, _spread(tl.load(scales + i, mask=i < cells, other=0.0), stored.shape[0]))


@triton.jit
def keep(
    x,  # fp32
    noise,  # uint32, of formats other than fp32
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
        code = bf16(x, noise)
        tl.store(pointer + at, code, mask=leads)
        return (code.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        top = _tops(x, live, cell)
        if STORED == tl.int8:
            code, scale = _encode_int8(x, noise, top)
        else:
            code, scale = _encode_e4m4(x, noise, top)
        tl.store(pointer + at, code, mask=leads)
        i = tl.arange(0, x.shape[0] // cell)
        tl.store(scales + i, scale, mask=i < cells)
        return _decode(code, _spread(scale, x.shape[0]))

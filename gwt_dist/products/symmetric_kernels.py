"""The Triton kernel of symmetric products; imports triton, so import it inside functions alone. See `symmetric.py`."""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def tile(t, tiles):
    """Row i and column j <= i of the t-th of ``tiles*(tiles+1)/2`` tiles on and below the diagonal.

    The triangle is folded into a rectangle (as LAPACK's rectangular full packed format): its right half is turned by
    180 degrees and set on top of the left one. So all is integers, and a row of the rectangle is half as long as the
    longest of the triangle: of 40 rows of tiles, any 132 tiles in turn, as many as an H100 works on at once, share 28.
    """
    even = 1 - tiles % 2
    width = (tiles + 1) // 2
    row, column = t // width, t % width
    left = column <= row - even
    return tl.where(left, row - even, tiles - 1 - row), tl.where(left, column, tiles - even - column)


@triton.jit
def product(
    x,  # [n, R, C] bf16
    out,  # [n, R, R] bf16, dense
    R,
    C,
    x_stride_n,
    x_stride_R,
    x_stride_C,
    b,  # fp32
    c,  # fp32
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``c*x x^T``, or ``b*x + c*x x^T`` of a symmetric x where ADD: one tile on or below the diagonal, and its mirror.

    The sum over C is in fp32, in steps of DEPTH from the first to the last, whatever n and the other tiles are.
    """
    tiles = tl.cdiv(R, BLOCK)
    each = tiles * (tiles + 1) // 2
    n = tl.program_id(0) // each
    i, j = tile(tl.program_id(0) % each, tiles)
    x += n.to(tl.int64) * x_stride_n
    out += n.to(tl.int64) * R * R

    lane = tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    rows_i, rows_j = i * BLOCK + lane, j * BLOCK + lane
    x_i = x + rows_i.to(tl.int64)[:, None] * x_stride_R + depth[None, :] * x_stride_C
    x_j = x + rows_j.to(tl.int64)[:, None] * x_stride_R + depth[None, :] * x_stride_C
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, C, DEPTH):
        in_depth = depth[None, :] < C - k
        a = tl.load(x_i, mask=(rows_i[:, None] < R) & in_depth, other=0.0)
        its = tl.load(x_j, mask=(rows_j[:, None] < R) & in_depth, other=0.0)
        total = tl.dot(a, tl.trans(its), total)
        x_i += DEPTH * x_stride_C
        x_j += DEPTH * x_stride_C

    here = rows_i.to(tl.int64)[:, None] * R + rows_j[None, :]
    inside = (rows_i[:, None] < R) & (rows_j[None, :] < R)
    total = c * total  # by 1 as well: ptxas lets no two products overlap where their sum is rounded right away
    if ADD:
        g = x + rows_i.to(tl.int64)[:, None] * x_stride_R + rows_j[None, :] * x_stride_C
        total += b * tl.load(g, mask=inside, other=0.0).to(tl.float32)
    found = total.to(out.dtype.element_ty)
    mirrored = tl.trans(found)
    # A tile on the diagonal is its own mirror: its lower half goes to both sides.
    found = tl.where(rows_i[:, None] >= rows_j[None, :], found, mirrored)
    tl.store(out + here, found, mask=inside)
    there = rows_j.to(tl.int64)[:, None] * R + rows_i[None, :]
    tl.store(out + there, mirrored, mask=(rows_j[:, None] < R) & (rows_i[None, :] < R) & (i != j))

"""Adam in a subspace of the gradient of a whole matrix, on the rank that owns it.

    P    = the first r singular vectors of G on one side, of the last step that renewed them          [r, S]
    low  = P G^T, or P G                                                   the other side has O numbers   [r, O]
    m, v = Adam's of low                                              not turned when P is renewed
    n    = m / (sqrt(v) + eps)
    U    = scale * P^T n
    W   -= lr * sqrt(1-b2**t)/(1-b1**t) * U
    W   *= 1 - lr * weight_decay

`proj_type` says along which side vectors lie: the shorter one ("std"), the longer one ("reverse_std"), columns
("right"), rows ("left"), or both ("full": ``low = L G P^T`` and ``U = scale * L^T n P``). P is renewed at the first
step of a matrix and then at every `update_proj_gap`-th, `refresh_offset` steps earlier.

With `residual` what the subspace leaves out goes along, with the size that Adam gives to what is in it, and a limit on
the growth of its norm:

    D    = (G - scale * P^T low) * ||n|| / (||low|| + 1e-8)       norms over r of each of O numbers; "full": of all
    rho  = max(||D|| / (prev + 1e-8), 1.01) / 1.01,  prev = ||D|| / rho
    U   += D / rho

Sources: GaLore (arXiv 2403.03507) as galore-torch 1.0 has it; the residual is Fira's (arXiv 2410.01623), whose code has
the scale in what it subtracts too; randomized decomposition: Halko et al., arXiv 0909.4061, algorithm 4.4.

Shapes: R rows and C columns of a matrix, r its rank. Mathematics is in the dtype of the state: fp64 for fp64 weights,
where galore-torch decomposes in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gwt_dist.declare import Rule
from gwt_dist.formulas.limiter import limit_growth
from gwt_dist.formulas.share import Seat, Share
from gwt_dist.keys import PROJ_TYPES
from gwt_dist.noise import mix, salt

GROWTH = 1.01  # of the residual's norm in one step, at most
OVERSAMPLED, POWERS = 8, 2  # of the randomized decomposition: vectors beyond the rank, iterations


def gradient(share: Share) -> Tensor:
    """What travels, (N, U): the gradient as it is."""
    return share.x_NU


def update(
    g_nRC: Tensor,  # (n, R, C)
    rows: Mapping[str, Tensor],  # none
    rules: Sequence[Rule],  # of each matrix but for places without one
    seats: Sequence[Seat | None],  # of the same
) -> None:
    """Put U, corrected for bias, in the place of G; a matrix that does not move is left as it is."""
    for matrix, rule, seat in zip(g_nRC, rules, seats, strict=False):
        if seat is None:
            continue
        g_RC = matrix.to(seat.state["projector"].dtype)
        ahead = seat.count - 1 + int(rule["refresh_offset"])
        if seat.is_new or ahead % int(rule["update_proj_gap"]) == 0:
            _renew(g_RC, seat, rule)
        matrix.copy_(_updated(g_RC, seat, rule))


def write(
    u: Tensor,  # elements of U, of any shape
    shape: Sequence[int],  # of the tensor
    rule: Rule,
) -> Tensor:
    """What its weights lose, as `u`: ``lr * U``."""
    return u * (rule.lr.to(u) if isinstance(rule.lr, Tensor) else rule.lr)


def _updated(g_RC: Tensor, seat: Seat, rule: Rule) -> Tensor:
    """U of a matrix, (R, C)."""
    step = seat.count
    state, beta1, beta2 = seat.state, rule["beta1"], rule["beta2"]
    exp_avg, exp_avg_sq = state["exp_avg_low"], state["exp_avg_sq_low"]
    low = _project(g_RC, state, rule)
    exp_avg.mul_(beta1).add_(low, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(low, low, value=1 - beta2)
    n = exp_avg / exp_avg_sq.sqrt().add_(rule["eps"])
    u_RC = _back(n, g_RC.shape, state, rule)
    if rule["residual"]:
        u_RC += _residual(g_RC, low, n, state, rule)
    if rule["correct_bias"]:
        u_RC *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return u_RC


def _residual(g_RC: Tensor, low: Tensor, n: Tensor, state: Mapping[str, Tensor], rule: Rule) -> Tensor:
    """``D / rho``, (R, C)."""
    side = _side(g_RC.shape, rule)
    norms = [torch.linalg.vector_norm(x, dim=(0, 1) if side == "full" else 0) for x in (n, low)]
    factor = norms[0] / (norms[1] + 1e-8)
    d_RC = g_RC - _back(low, g_RC.shape, state, rule)
    d_RC *= factor[:, None] if side == "right" else factor
    kept = state["residual_norm"]
    squared_norm = torch.linalg.vector_norm(d_RC, dtype=torch.float64).square().view(1)
    rho, norm = limit_growth(squared_norm, kept.double(), GROWTH)
    kept.copy_(norm)
    return d_RC.div_(rho.to(d_RC))


def _side(shape: Sequence[int], rule: Rule) -> str:
    """Of which vectors of a matrix the subspace is: "right" for rows, which are of C numbers, "left", or "full"."""
    proj_type = PROJ_TYPES[int(rule["proj_type"])]
    is_tall = shape[0] >= shape[1]
    return {"std": "right" if is_tall else "left", "reverse_std": "left" if is_tall else "right"}.get(
        proj_type, proj_type
    )


def _project(g_RC: Tensor, state: Mapping[str, Tensor], rule: Rule) -> Tensor:
    """The gradient in the subspace, ``low``."""
    side, p = _side(g_RC.shape, rule), state["projector"]
    if side == "full":
        return state["projector_left"] @ g_RC @ p.mT
    return p @ (g_RC.mT if side == "right" else g_RC)


def _back(low: Tensor, shape: Sequence[int], state: Mapping[str, Tensor], rule: Rule) -> Tensor:
    """What it is in the space of the matrix, times `scale`, (R, C)."""
    side, p = _side(shape, rule), state["projector"]
    if side == "full":
        found = state["projector_left"].mT @ low @ p
    else:
        found = low.mT @ p if side == "right" else p.mT @ low
    return found.mul_(rule["scale"])


def _renew(g_RC: Tensor, seat: Seat, rule: Rule) -> None:
    """Make the subspace of this gradient; elements that are no numbers count as zeros, and stay what they are in G."""
    side, rank = _side(g_RC.shape, rule), len(seat.state["projector"])
    finite_RC = g_RC.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if rule["randomized"]:
        u_Rr, v_rC = _randomized(finite_RC, rank, seat.count, int(rule["rounding_seed"]))
    else:
        u_Rr, v_rC = _full(finite_RC, rank)
    if side != "left":
        seat.state["projector"].copy_(v_rC)
    if side != "right":
        seat.state["projector_left" if side == "full" else "projector"].copy_(u_Rr.mT)


def _full(g_RC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first left and right singular vectors, (R, r) and (r, C)."""
    u, _, vh = torch.linalg.svd(g_RC, full_matrices=False)
    return u[:, :rank], vh[:rank]


def _randomized(g_RC: Tensor, rank: int, step: int, rounding_seed: int) -> tuple[Tensor, Tensor]:
    """About the same, from products with a few more random vectors than there are to be found.

    Their seed is of the shape, the step and `rounding_seed`: the same under every engine, and on every device.
    """
    rows, columns = g_RC.shape
    seed = mix(step ^ mix(rounding_seed ^ salt(rows, columns)))
    generator = torch.Generator("cpu").manual_seed(seed)
    largest = g_RC.abs().amax()  # so that no product is infinite
    g_RC = g_RC / torch.where(largest > 0, largest, 1.0)
    width = min(rank + OVERSAMPLED, rows, columns)
    random_Cw = torch.randn(columns, width, generator=generator, dtype=torch.float64, device="cpu").to(g_RC)
    q_Rw = torch.linalg.qr(g_RC @ random_Cw).Q
    for _ in range(POWERS):
        q_Rw = torch.linalg.qr(g_RC @ torch.linalg.qr(g_RC.mT @ q_Rw).Q).Q
    u_ww, _, vh_wC = torch.linalg.svd(q_Rw.mT @ g_RC, full_matrices=False)
    return (q_Rw @ u_ww)[:, :rank], vh_wC[:rank]

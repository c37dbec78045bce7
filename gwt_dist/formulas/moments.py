"""What formulas and details ask of Adam's moments."""

from __future__ import annotations

import torch
from torch import Tensor

from gwt_dist.declare import Rule
from gwt_dist.formulas.share import Share


def denominator(exp_avg_sq: Tensor, eps: float) -> Tensor:
    """``sqrt(v) + eps``, of any shape.

    The root is taken in fp64, which rounds correctly to fp32: torch's own on a CPU is MKL's, one bit off in a fifth of
    all cases, and no kernel could equal it.
    """
    return exp_avg_sq.double().sqrt().to(exp_avg_sq.dtype).add_(eps)


def read(
    exp_avg_N: Tensor,  # (N,) after this step's approximation was added
    fresh_N: Tensor,  # (N,) that approximation times 1 - b1
    rule: Rule,
) -> Tensor:
    """The momentum that the update takes, (N,): with Nesterov a step further, ``b1*m + (1-b1)*a`` (Dozat, Nadam)."""
    return exp_avg_N * rule["beta1"] + fresh_N if rule["nesterov"] else exp_avg_N


def first_weight(t: Tensor, rule: Rule, level: int = 1) -> Tensor:
    """The sum of the weights that gradients have in the momentum that is read, 0-d fp64; `t` is the step in fp64.

    ``1 - b1**t``; one more decay is in it with Nesterov, which Adam of level 0 does not have. 1 without correction
    of bias, and what divides by it does not correct.
    """
    if not rule["correct_bias"]:
        return torch.ones_like(t)
    return 1 - rule["beta1"] ** (t + 1 if rule["nesterov"] and level else t)


def step_size(step: Tensor, rule: Rule, level: int) -> Tensor:
    """``lr * sqrt(1-b2**t)/(1-b1**t)`` as a 0-d fp64 tensor; `step` is t, 0-d."""
    t = step.double()
    if not rule["correct_bias"]:
        return uncorrected(t, rule)
    size: Tensor = (1 - rule["beta2"] ** t).sqrt_() / first_weight(t, rule, level) * rule.lr
    return size


def uncorrected(t: Tensor, rule: Rule) -> Tensor:
    """``lr`` as a 0-d fp64 tensor on the device of `t`, fp64."""
    size: Tensor = torch.ones_like(t) * rule.lr
    return size


def scaled(size: Tensor, share: Share) -> Tensor:
    """``size * scale / rho`` where there are details, as a 0-d tensor in the dtype of the units; `size` is 0-d fp64."""
    if share.piece.level:
        size = size * share.rule["scale"]
    if "update" in share.sums:
        size = size.to(share.sums["update"].device) / share.sums["update"]
    return size.to(share.x_NU)

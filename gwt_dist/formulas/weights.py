"""How a weight takes its change, with decoupled weight decay: in place, elements of any shape."""

from __future__ import annotations

from torch import Tensor

from gwt_dist.declare import Rule


def decay_factor(rule: Rule, like: Tensor) -> Tensor:
    """What weight decay leaves of a weight, ``1 - lr * weight_decay``, taken in fp64, as a 0-d tensor.

    In dtype and on the device of `like`.
    """
    if isinstance(rule.lr, Tensor) and rule.lr.device == like.device:
        return (1 - rule.lr.double() * rule["weight_decay"]).to(like.dtype)
    return like.new_full((), 1 - float(rule.lr) * rule["weight_decay"])  # a fill: a copy to a GPU would wait for it


def decay(weight: Tensor, change: Tensor, factor: Tensor) -> None:
    """``W = (W - change) * factor``."""
    weight.sub_(change).mul_(factor)


def cautious(weight: Tensor, change: Tensor, factor: Tensor) -> None:
    """The same, but a weight decays only where its change does not take it away from zero (arXiv 2510.12402)."""
    agrees = weight * change >= 0
    weight.sub_(change)
    weight.copy_((weight * factor).where(agrees, weight))

"""FOAM as it was published; the package's own form of it is the recipe "foam"."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gwt_dist.study.peers.each import Each

SECOND_MOMENTS = ("energy", "approximation")


def check(options: dict[str, Any]) -> None:
    """Refuse values that the formula has no meaning for.

    Raises:
        ValueError: `second_moment` is none of `SECOND_MOMENTS`, or `level` is no whole number of at least 1.
    """
    if options["second_moment"] not in SECOND_MOMENTS:
        raise ValueError(f"second_moment={options['second_moment']!r} must be one of {', '.join(SECOND_MOMENTS)}")
    if not isinstance(options["level"], int) or options["level"] < 1:
        raise ValueError(f"level={options['level']!r} must be a whole number, at least 1; level 0 is AdamW")


class FOAM(Each):
    """FOAM (arXiv 2512.07112): Adam's moments of the means of units of ``2**level`` neighbours in a row.

        a = mean of a unit of g,   r = g - a
        m = b1*m + (1-b1)*a,       v = b2*v + (1-b2) * mean of the squares of the unit
        W = (1 - lr*wd) * (W - lr * c * scale * (m + r) / (sqrt(v + r^2) + eps)),  c = sqrt(1-b2^t) / (1-b1^t)

    This is the authors' code. c multiplies the part of the residual as well, where the recipe "foam" corrects m and v
    alone; with b2 = .999 it is 0.32 at the first step and 0.80 at the thousandth. The paper has the square of the mean
    in v ("approximation"), and no c. Rows are padded with zeros to whole units.

    Args:
        params: Tensors [..., C] of one dimension or more.
        lr: Rate.
        level: A unit has ``2**level`` elements; the state of one is m and v in fp32 or bf16, as the gradient.
        scale: Of the update.
        betas: b1, b2.
        eps: Added to the root.
        weight_decay: Decoupled, after the update.
        second_moment: What v is of, see above.
        correct_bias: Without it c is 1.

    Raises:
        ValueError: As `check`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        level: int = 2,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        second_moment: str = "energy",
        correct_bias: bool = True,
    ) -> None:
        options = {"level": level, "scale": scale, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= {"second_moment": second_moment, "correct_bias": correct_bias}
        check(options)
        super().__init__(params, {"lr": lr, **options})

    def update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """One step of its units."""
        state = self.state[parameter]
        columns, width = gradient.shape[-1], 2 ** group["level"]
        units = functional.pad(gradient, (0, -columns % width)).unflatten(-1, (-1, width))
        mean = units.mean(-1)
        second = units.square().mean(-1) if group["second_moment"] == "energy" else mean.square()
        if not state:
            state.update(step=0, m=torch.zeros_like(mean), v=torch.zeros_like(mean))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        m = state["m"].lerp_(mean, 1 - beta1)
        v = state["v"].lerp_(second, 1 - beta2)
        r = units - mean[..., None]
        change = (m[..., None] + r) / ((v[..., None] + r.square()).sqrt_() + group["eps"])
        size = group["lr"] * group["scale"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.add_(change.flatten(-2)[..., :columns], alpha=-size)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])

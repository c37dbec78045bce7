"""Momentum of a matrix, brought to one size in all directions or along rows: Muon, NorMuon, RMNP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gwt_dist.study.peers.each import Each
from gwt_dist.study.peers.momentum import MOMENTUM_DTYPES, refresh

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Muon's quintic, as torch.optim.Muon has them
LEAST_NORM = 1e-7
ROW_EPS = 1e-8  # added to the root of NorMuon's row moment

# What the rate is multiplied with, by the shape of a weight [rows, columns].
ADJUSTED: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),  # Jordan's Muon
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),  # Moonlight, arXiv 2502.16982
}


def check(options: dict[str, Any]) -> None:
    """Refuse values that no optimizer of this module takes.

    Raises:
        ValueError: `momentum_dtype` or `adjust_lr_fn` is none of those there are, or `ns_steps` is below 1.
    """
    for key, known in (("momentum_dtype", MOMENTUM_DTYPES), ("adjust_lr_fn", tuple(ADJUSTED))):
        if options.get(key, known[0]) not in known:
            raise ValueError(f"{key}={options[key]!r} must be one of {', '.join(known)}")
    if options.get("ns_steps", 1) < 1:
        raise ValueError(f"ns_steps={options['ns_steps']} must be at least 1: without a step nothing is orthogonalized")


def orthogonalized(u: Tensor, steps: int) -> Tensor:
    """`u` [R, C] with its singular values brought to about 1, in bf16 products.

        x = u / ||u||,  then `steps` times  x = a*x + b*(x x^T) x + c*(x x^T)^2 x

    The products and their order are those of torch.optim.Muon, and so are the bits. Of zeros it is zeros.

    Returns:
        bf16, [R, C].
    """
    a, b, c = COEFFICIENTS
    tall = u.size(0) > u.size(1)
    x = u.mT.bfloat16() if tall else u.bfloat16()  # the gram matrix of the shorter side
    x = x / x.norm().clamp(min=LEAST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class _OfMomentum(Each):
    """Weight decay, and a step along what `direction` makes of the momentum of each matrix."""

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        check(options)
        super().__init__(params, options)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(
                        f"{type(self).__name__} got a parameter of shape {tuple(parameter.shape)}: its formula is for "
                        "matrices [R, C]. Give others to AdamW"
                    )

    def update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """Momentum, decay and the step along `direction`; all are [R, C]."""
        lr, beta, state = group["lr"], group["momentum"], self.state[parameter]
        gradient = gradient.float()
        momentum = refresh(state, gradient, beta, group["momentum_dtype"])
        u = gradient.lerp(momentum, beta) if group["nesterov"] else momentum
        direction, size = self.direction(u, state, group)
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(direction, alpha=-lr * size)

    def direction(self, u: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
        """What a step at rate 1 takes from the weights: a tensor [R, C] and a factor; `u` is [R, C] in fp32."""
        raise NotImplementedError


class Muon(_OfMomentum):
    """torch.optim.Muon with a momentum in any of three formats; with "fp32" its bits, for fp32 weights.

        m = mu*m + (1-mu)*g;   u = (1-mu)*g + mu*m, or m without `nesterov`
        W = (1 - lr*wd)*W - lr * s(R, C) * O,   O = u with its singular values at about 1

    "int8" is 8-bit Muon (arXiv 2509.23106): linear codes, a scale for 2048 elements, to nearest. That paper writes no
    Nesterov step; it is here as in Muon, so that the rows of a study differ in the format alone.

    Args:
        params: Matrices [R, C], or groups of them.
        lr: Rate; s is 0.2*sqrt(max(R, C)) for "match_rms_adamw", and sqrt(max(1, R/C)) for "original".
        weight_decay: Decoupled.
        momentum: mu.
        nesterov: The momentum is taken a step further.
        ns_steps: Steps of the iteration, in bf16 products.
        adjust_lr_fn: A key of `ADJUSTED`.
        momentum_dtype: One of `MOMENTUM_DTYPES`.

    Raises:
        ValueError: A parameter is no matrix, or a value is unknown.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        momentum_dtype: str = "fp32",
        **more: Any,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            momentum_dtype=momentum_dtype,
            **more,
        )

    def direction(self, u: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
        """O in bf16, and s."""
        return orthogonalized(u, group["ns_steps"]), ADJUSTED[group["adjust_lr_fn"]](*u.shape)


class NorMuon(Muon):
    """NorMuon (arXiv 2510.05491): rows of the orthogonalized matrix over the root of a moving mean of their squares.

        w = beta2*w + (1-beta2) * mean of the squares of each row of O,   fp32, R numbers a matrix
        P = O / (sqrt(w) + 1e-8),  and W = (1 - lr*wd)*W - lr * c * P

    With "match_rms_adamw" c is 0.2*sqrt(R*C)/||P||, the paper's: the root of the mean square of what elements move by
    is 0.2*lr. With "original" it is sqrt(max(1, R/C)) * ||O||/||P||, which is what the authors' code does. The paper
    writes no Nesterov step, that code has one.

    Args:
        params: Matrices [R, C], or groups of them.
        lr: Rate.
        beta2: Weight of the old w.
        options: As `Muon`.

    Raises:
        ValueError: As `Muon`.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, *, beta2: float = 0.95, **options: Any) -> None:
        super().__init__(params, lr, beta2=beta2, **options)

    def direction(self, u: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
        """c*P in fp32, all of it in the tensor but for the part of c that follows from the shape."""
        rows, columns = u.shape
        o = orthogonalized(u, group["ns_steps"]).float()
        if "rows" not in state:
            state["rows"] = o.new_zeros(rows, 1)
        w: Tensor = state["rows"].lerp_(o.square().mean(1, keepdim=True), 1 - group["beta2"])
        p = o / (w.sqrt() + ROW_EPS)
        p /= p.norm().clamp(min=LEAST_NORM)
        if group["adjust_lr_fn"] == "match_rms_adamw":
            return p, 0.2 * math.sqrt(rows * columns)
        return p * o.norm(), ADJUSTED["original"](rows, columns)


class RMNP(_OfMomentum):
    """RMNP (arXiv 2603.20527): each row of the momentum, what one output neuron weighs, at length 1. No products.

        m and u as in `Muon`;   W = (1 - lr*wd)*W - lr * s(R, C) * rows of u over their lengths

    The paper writes no Nesterov step and no s; the authors' code has both, "original" among the latter.

    Args:
        params: Matrices [R, C], or groups of them.
        lr: Rate.
        weight_decay: Decoupled.
        momentum: mu.
        nesterov: The momentum is taken a step further.
        adjust_lr_fn: A key of `ADJUSTED`.

    Raises:
        ValueError: As `Muon`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str = "original",
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr_fn,
            momentum_dtype="fp32",
        )

    def direction(self, u: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
        """Rows of length 1, fp32, and s."""
        return functional.normalize(u, dim=1), ADJUSTED[group["adjust_lr_fn"]](*u.shape)

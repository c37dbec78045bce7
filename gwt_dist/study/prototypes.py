"""A prototype that no release promises, for studies alone: momentum in wavelet space, orthogonalized as Muon's.

    m   = beta*m + (1-beta)*a          a = approximation of the gradient X, along rows
    M   = m / (1-beta**t)
    c   = min(1, ||M before this step||**2 / ||a||**2)        how steady the gradient of the matrix has been
    U   = synthesis of M and c * details of X
    W  -= lr * 0.2 * sqrt(max(R, C)) * newton_schulz(U)

State is ``4 / 2**level`` bytes a weight: half of what Adam's moments in the same space take. For one process alone: the
iteration needs the whole matrix, which no part of gwt_dist gathers yet. Other parameters have AdamW.

Sources: K. Jordan, Muon (2024), for the iteration and its coefficients; Liu et al., arXiv 2502.16982, for the factor
``0.2 * sqrt(max(R, C))``, which gives the update the root mean square of AdamW's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gwt_dist.wavelet import HaarTransform

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
Parameters = Mapping[str, nn.Parameter]


def newton_schulz(
    u_RC: Tensor,  # (R, C), fp32 or fp64
    steps: int = 5,
) -> Tensor:
    """A matrix (R, C) with the singular vectors of `u_RC` and singular values of about 1 (0.7 to 1.2), same dtype.

    Each step is ``x = a*x + b*(x x^T) x + c*(x x^T)**2 x`` (Jordan, Muon). torch keeps its own private, and in bf16.
    """
    a, b, c = COEFFICIENTS
    tall = u_RC.shape[0] > u_RC.shape[1]
    x: Tensor = u_RC.T if tall else u_RC
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Orthogonal(torch.optim.Optimizer):
    """The update above for matrices (R, C) whose C is divided by ``2**level``.

    State of a matrix: ``step`` (a number) and ``exp_avg`` ([R * C / 2**level], dtype of the matrix).
    """

    def __init__(self, params: Iterable[Any], lr: float, *, level: int, beta: float) -> None:
        super().__init__(params, {"lr": lr, "level": level, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all matrices; they all have gradients, and nothing is evaluated again."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                self._update(weight, group["lr"], group["level"], group["beta"])

    def _update(self, weight: Tensor, lr: float, level: int, beta: float) -> None:
        haar = HaarTransform(level)
        rows, columns = weight.shape
        assert weight.grad is not None
        x_NU = weight.grad.reshape(-1, 1 << level)
        a_N = haar.approximation(x_NU)
        state = self.state[weight]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(a_N))
        state["step"] += 1
        exp_avg, t = state["exp_avg"], state["step"]
        coherence = torch.zeros(())
        if t > 1:
            steady = exp_avg.square().mean() / (1 - beta ** (t - 1)) ** 2
            coherence = (steady / a_N.square().mean()).nan_to_num(0.0).clamp(max=1.0)
        exp_avg.lerp_(a_N, 1 - beta)
        one_N = torch.ones_like(a_N)
        u_NU = haar.synthesis(x_NU, exp_avg / (1 - beta**t), one_N, coherence * one_N)
        update_RC = newton_schulz(u_NU.view(rows, columns))
        weight.sub_(update_RC, alpha=lr * 0.2 * math.sqrt(max(rows, columns)))


def orthogonal(matrices: Parameters, rest: Parameters, lr: float, rest_lr: float, options: dict[str, Any]) -> list[Any]:
    """As a study wants it; `options`: level (2), beta (0.95)."""
    options = {"level": 2, "beta": 0.95} | options
    return [
        Orthogonal(list(matrices.values()), lr, **options),
        torch.optim.AdamW(rest.values(), rest_lr, weight_decay=0),
    ]

"""`GaLoreAdamW`: what galore-torch calls so, under every engine that `GWTAdamW` has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gwt_dist.optimizer import GWTAdamW


class GaLoreAdamW(GWTAdamW):
    """`GWTAdamW` with the recipe ``"low-rank"`` and the arguments of ``galore_torch.GaLoreAdamW``.

    Groups with a ``rank`` have ``update_proj_gap``, ``scale`` and ``proj_type`` beside it, as there; those without are
    AdamW. Every other key of `GWTAdamW` is one of a group here too, such as ``residual`` (Fira), ``randomized`` and
    ``refresh_offset``. Everything else is as `GWTAdamW` has it: `attach`, `save`, `load`.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; a float or a 0-d tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the uncorrected ``sqrt(exp_avg_sq)``.
        weight_decay: Decoupled, multiplied by ``lr``.
        correct_bias: False leaves ``sqrt(1-b2**t)/(1-b1**t)`` out.
        no_deprecation_warning: Of galore-torch; there is no warning here.

    Raises:
        ValueError: As `GWTAdamW` does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, recipe="low-rank", correct_bias=correct_bias)

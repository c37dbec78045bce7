"""The norm-growth limiter between two phases, in torch operations on the device of the norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gwt_dist.declare import Rule


def limit(
    squared_norms: Tensor,  # (T,) fp64, ||m/d||**2 of each whole tensor, those of one parameter after those of another
    counts: Sequence[int],  # of each parameter, how many of them
    state: Mapping[str, Sequence[Tensor]],  # of each parameter its TENSOR fields: "limited_norm" is read and written
    rules: Sequence[Rule],  # of each parameter
) -> Tensor:
    """The limiters rho, (T,) fp64."""
    stored = [limited.view(-1) for limited in state["limited_norm"]]
    limiter: float | Tensor = rules[0]["limiter"]
    if len({rule["limiter"] for rule in rules}) > 1:  # fills: a copy to a GPU would wait for it
        filled = [squared_norms.new_full((n,), rule["limiter"]) for n, rule in zip(counts, rules, strict=True)]
        limiter = torch.cat(filled)
    rho, new = limit_growth(squared_norms, torch.cat(stored).double(), limiter)
    torch._foreach_copy_(stored, list(new.split(list(counts))))
    return rho


def limit_growth(
    squared_norm_T: Tensor,  # (T,) fp64, ||m/d||**2 of each whole tensor
    limited_norm_T: Tensor,  # (T,) fp64, prev; <= 0 means not yet set
    limiter: float | Tensor,  # one for all, or (T,)
) -> tuple[Tensor, Tensor]:
    """The divisor rho of T tensors and the norms to remember, (T,) fp64 each.

    A zero or non-finite norm is never remembered: it would hold later updates near zero for thousands of steps.
    """
    norm_T = squared_norm_T.sqrt()
    valid_T = norm_T.isfinite() & (norm_T > 0)
    rho_T = (norm_T / (limited_norm_T + 1e-8)).clamp(min=limiter).div_(limiter)
    rho_T = torch.where(valid_T & (limited_norm_T > 0), rho_T, 1.0)
    return rho_T, torch.where(valid_T, norm_T / rho_T, limited_norm_T)

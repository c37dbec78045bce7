"""The norm-growth limiter between the two phases, in torch operations on the device of the norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gwt_dist import update
from gwt_dist.update import Rule


def limit_growth(
    squared_norms: Tensor,  # (T,) fp64, those of one parameter after those of another
    counts: Sequence[int],  # of each parameter, how many of them
    limited_norms: Sequence[Tensor],  # of each parameter, what it remembers; written
    rules: Sequence[Rule],  # of each parameter
) -> Tensor:
    """The limiters rho, (T,) fp64."""
    stored = [limited.view(-1) for limited in limited_norms]
    limiter: float | Tensor = rules[0].limiter
    if len({rule.limiter for rule in rules}) > 1:  # fills: a copy to a GPU would wait for it
        filled = [squared_norms.new_full((n,), rule.limiter) for n, rule in zip(counts, rules, strict=True)]
        limiter = torch.cat(filled)
    rho, new = update.limit_growth(squared_norms, torch.cat(stored).double(), limiter)
    torch._foreach_copy_(stored, list(new.split(list(counts))))
    return rho

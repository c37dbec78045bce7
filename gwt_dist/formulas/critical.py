"""A few gradients of large norm that stay and join the fresh one, before any other formula.

    p    = ||a||                                          of the whole tensor, a its coefficients
    G    = (g + the sum of the n gradients kept) / (n + 1)      "mean"
    G    = g + their mean                                       "sum"
    where fewer than C are kept, or p is above the least priority: a takes that place, and p its priority
    all priorities *= critical_decay

What follows takes G for the gradient. What is kept of a gradient are its coefficients, C fields as large as a moment
in fp32, which are spread evenly over the elements of their units: details are those of the fresh one alone. The G of a
step has the gradients that were kept before it. A gradient of zeros, or with elements that are no numbers, is not kept.

Source: Memory-Augmented Optimizers (McRae et al., ICLR 2022), with the norm of each tensor alone for its priority.

Shapes: N coefficients, U elements of a unit, T tensors. Mathematics is in the dtype of the arguments, of norms fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gwt_dist.declare import Pass, Rule
from gwt_dist.formulas.share import Share

KEPT, PRIORITY = "critical", "priority"  # names of fields, with a number behind


class Critical:
    """A formula that is given G.

    Args:
        formula: Any of `formulas.FORMULAS`.
    """

    def __init__(self, formula: Any) -> None:
        self._formula = formula

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._formula, name)

        def given(first: Any, *more: Any) -> Any:
            return self._call(function, name, first) if isinstance(first, Share) else function(first, *more)

        return given

    @staticmethod
    def norm(share: Share) -> dict[str, Tensor]:
        """Squares of a, (N,) fp64, whose sum is that of the tensor."""
        return {"squared_a": share.piece.transform.approximation(share.x_NU).double().square()}

    @staticmethod
    def ranked(
        squared_norms: Tensor,  # (T,) fp64, ||a||**2, those of one parameter after those of another
        counts: Sequence[int],  # of each parameter, how many of them
        state: Mapping[str, Sequence[Tensor]],  # of each parameter its TENSOR fields; priorities are read and written
        rules: Sequence[Rule],  # of each parameter
    ) -> Tensor:
        """Of each gradient its place plus 1, or 0, and C + 1 for each of those kept before it: (T,) fp64."""
        places = len(_numbered(PRIORITY, state))
        stored = [[its.view(-1) for its in state[f"{PRIORITY}_{i}"]] for i in range(places)]
        priorities_CT = torch.stack([torch.cat(of_all) for of_all in stored]).double()
        kept_T = (priorities_CT > 0).sum(0)
        norm_T = squared_norms.sqrt()
        least_T, place_T = priorities_CT.min(0)
        is_kept_T = norm_T.isfinite() & (norm_T > least_T)
        place_T = torch.where(is_kept_T, place_T, -1)
        here_CT = place_T == torch.arange(places, device=place_T.device)[:, None]
        decay_T = torch.cat([norm_T.new_full((n,), r["critical_decay"]) for n, r in zip(counts, rules, strict=True)])
        new_CT = torch.where(here_CT, norm_T, priorities_CT) * decay_T
        for of_all, new_T in zip(stored, new_CT, strict=True):
            torch._foreach_copy_(of_all, list(new_T.split(list(counts))))
        return (place_T + 1 + (places + 1) * kept_T).to(squared_norms)

    def _call(self, function: Callable[[Share], Any], name: str, share: Share) -> Any:
        names = _numbered(KEPT, share.state)
        kept = [share.state[its] for its in names]
        code = share.sums["squared_a"].long()
        number, place = code // (len(kept) + 1), code % (len(kept) + 1) - 1
        kept_NU = _spread(share, sum(kept[1:], kept[0]))
        if share.rule["critical_mean"]:
            x_NU = (share.x_NU + kept_NU) / (number + 1)
        else:
            x_NU = share.x_NU + kept_NU / number.clamp(min=1)
        result = function(replace(share, x_NU=x_NU))
        a_N = share.piece.transform.approximation(share.x_NU)
        last = share.program.phases[-1]
        if name == (last.function if isinstance(last, Pass) else last.send):
            for i, its_N in enumerate(kept):
                its_N.copy_(torch.where(place == i, a_N, its_N))
        return result


def _spread(share: Share, a_N: Tensor) -> Tensor:
    """Units with these coefficients, (N,), and no details; zeros where a unit is padded; (N, U)."""
    piece = share.piece
    zeros_NU, ones_N = torch.zeros_like(share.x_NU), torch.ones_like(a_N)
    if piece.units.coefficients > 1:  # a unit is a row, which has no padding
        return piece.transform.synthesis(zeros_NU, a_N, ones_N, ones_N)
    counts_N = piece.counts(a_N)
    spread_NU = piece.transform.synthesis(zeros_NU, a_N * ((1 << piece.level) / counts_N), ones_N, ones_N)
    is_real_NU = torch.arange(zeros_NU.shape[1], device=a_N.device) < counts_N[:, None]
    return spread_NU.mul_(is_real_NU)


def _numbered(name: str, of: Mapping[str, Any]) -> list[str]:
    """The names of the C fields ``name_0``, ``name_1`` and so on, in this order."""
    return [f"{name}_{i}" for i in range(sum(its.startswith(f"{name}_") for its in of))]

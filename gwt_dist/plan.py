"""One optimizer parameter between steps (`Plan`) and within one (`Active`), and the collectives over many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gwt_dist import layout, update
from gwt_dist.comm import Shard, sum_over_ranks
from gwt_dist.kernels import Job, Piece, moments_shape, units_of


@dataclass(frozen=True, slots=True)
class Plan:
    """What is fixed about one optimizer parameter: its pieces, its part in the collectives, the shapes of its state."""

    shard: Shard
    level: int
    wavelet: str
    pieces: tuple[Piece, ...]
    exchange: layout.Exchange
    places: dict[str, int]  # fqn -> place in `limited_norm`
    moments_shape: tuple[int, ...]
    norms_shape: tuple[int, ...]

    @classmethod
    def of(cls, shard: Shard, level: int, wavelet: str) -> Plan:
        """The plan of a shard in a group of `level` and `wavelet`."""

        def units(shape: Sequence[int]) -> layout.Units:
            return units_of(shape, level, wavelet)

        packed = layout.pack(shard.fragments, units)
        moments: tuple[int, ...] = (sum(m.numel for m in packed),)
        norms: tuple[int, ...] = (len(shard.tensors),)
        if shard.is_whole:
            moments, norms = moments_shape(shard.tensors[0].shape, level, wavelet), ()
        return cls(
            shard=shard,
            level=level,
            wavelet=wavelet,
            pieces=tuple(
                Piece.of(fragment, moment, level, wavelet)
                for fragment, moment in zip(shard.fragments, packed, strict=True)
            ),
            exchange=layout.plan_exchange(shard.tensors, shard.fragments, units),
            places={tensor.fqn: i for i, tensor in enumerate(shard.tensors)},
            moments_shape=moments,
            norms_shape=norms,
        )

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """State before the first step, on the device of `parameter`."""

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=state_dtype(parameter), device=parameter.device)

        return {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": zeros(self.moments_shape),
            "exp_avg_sq": zeros(self.moments_shape),
            "limited_norm": zeros(self.norms_shape),
        }


def state_dtype(parameter: Tensor) -> torch.dtype:
    """fp64 for fp64 parameters, fp32 for all others.

    bf16 second moments could not decay: round-to-nearest loses every small step.
    """
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


class Active:
    """One parameter that takes part in one step."""

    def __init__(self, parameter: Tensor, plan: Plan, rule: update.Rule, state: Mapping[str, Any]) -> None:
        self.plan, self.rule, self.state = plan, rule, state
        self.gradient: Tensor | None = parameter.grad
        self._data = parameter.detach()
        self._weight = self._data.reshape(-1)
        if self.gradient is not None:
            self.gradient = self.gradient.reshape(-1)
        # Tensors that have a place in the vector of norms; static, so that all ranks agree on its length.
        limited = rule.limiter > 0 and plan.level > 0
        self.norms = len(plan.places) if limited else 0

    @property
    def device(self) -> torch.device:
        """Where the local buffer lies."""
        return self._data.device

    def jobs(self, completed: Mapping[int, list[tuple[int, Tensor]]], first_norm: int) -> list[Job]:
        """The work on this rank's fragments; `completed` holds the cut units by number of the fragment."""
        if self.gradient is None:
            return []
        step_size = update.step_size(self.state["step"], self.rule)
        return [
            Job(
                piece=piece,
                weight=self._weight,
                gradient=self.gradient,
                exp_avg=self.state["exp_avg"].view(-1),
                exp_avg_sq=self.state["exp_avg_sq"].view(-1),
                completed=completed.get(i, ()),
                rule=self.rule,
                step_size=step_size,
                norm=first_norm + self.plan.places[piece.fragment.fqn] if self.norms and piece.level else -1,
            )
            for i, piece in enumerate(self.plan.pieces)
            if piece.touched
        ]

    def finish(self) -> None:
        """Put the weights back where the parameter is not contiguous and a copy was worked on."""
        if self._weight.data_ptr() != self._data.data_ptr():
            self._data.copy_(self._weight.view(self._data.shape))


def make_jobs(active: Sequence[Active], group: ProcessGroup | None) -> list[Job]:
    """The jobs of a step, their cut units completed by one sum over the ranks of `group`; none if nothing is cut."""
    lengths = [one.plan.exchange.length for one in active]
    dtype = torch.float32
    if any(one.state["exp_avg"].dtype == torch.float64 for one in active):
        dtype = torch.float64
    buffer = torch.zeros(sum(lengths), dtype=dtype, device=active[0].device)
    parts = buffer.split(lengths)
    for one, part in zip(active, parts, strict=True):
        if one.gradient is not None:
            for send in one.plan.exchange.sends:
                elements = one.gradient.narrow(0, send.source, send.length)
                part.narrow(0, send.slot, send.length).copy_(elements)
    sum_over_ranks(buffer, group)
    jobs: list[Job] = []
    first_norm = 0
    for one, part in zip(active, parts, strict=True):
        completed: dict[int, list[tuple[int, Tensor]]] = {}
        for receive in one.plan.exchange.receives:
            unit = (receive.unit, part.narrow(0, receive.slot, receive.length))
            completed.setdefault(receive.fragment, []).append(unit)
        jobs += one.jobs(completed, first_norm)
        first_norm += one.norms
    return jobs


def limit_growth(active: Sequence[Active], squared_norms: Tensor) -> Tensor:
    """The limiters rho of all tensors with a norm, fp64, shaped as `squared_norms`; stores the new limited norms."""
    rho = torch.ones_like(squared_norms)
    first = 0
    limited = [one for one in active if one.norms]
    for limiter, run in groupby(limited, key=lambda one: one.rule.limiter):
        stored = [one.state["limited_norm"].view(-1) for one in run]
        previous = torch.cat(stored)
        part = slice(first, first + previous.numel())
        rho[part], new = update.limit_growth(squared_norms[part], previous.double(), limiter)
        torch._foreach_copy_(stored, list(new.split([s.numel() for s in stored])))
        first = part.stop
    return rho

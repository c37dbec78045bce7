"""One optimizer parameter between steps (`Plan`) and within one (`Active`), and the collectives over many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from gwt_dist import dtensor, layout, update
from gwt_dist.comm import Shard, sum_over_ranks
from gwt_dist.kernels import Job, Piece, level_of, moments_shape, units_of


@dataclass(frozen=True, slots=True)
class Plan:
    """What is fixed about one optimizer parameter: its pieces, its part in the collectives, the shapes of its state."""

    shard: Shard
    level: int
    wavelet: str
    pieces: tuple[Piece, ...]
    exchange: layout.Exchange
    places: dict[str, int]  # fqn -> place in `limited_norm`
    has_levels: bool  # any tensor of level > 0, on whichever rank
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
        if shard.local_shape is not None:
            moments, norms = _local_moments(shard.local_shape, shard.tensors[0].shape, packed[0], level, wavelet), ()
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
            has_levels=any(level_of(tensor.shape, level) for tensor in shard.tensors),
            moments_shape=moments,
            norms_shape=norms,
        )

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """State before the first step, on the device of `parameter` and sharded as it is."""

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=state_dtype(parameter), device=parameter.device)

        def moments() -> Tensor:
            shape = self.shard.tensors[0].shape
            whole = moments_shape(shape, self.level, self.wavelet)
            return dtensor.wrap(zeros(self.moments_shape), parameter, whole, units_of(shape, self.level, self.wavelet))

        return {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": moments(),
            "exp_avg_sq": moments(),
            "limited_norm": zeros(self.norms_shape),
        }


def _local_moments(
    local: Sequence[int], shape: Sequence[int], packed: layout.Fragment, level: int, wavelet: str
) -> tuple[int, ...]:
    """Shape of the moments of one tensor of `shape` of which this rank holds a part of shape `local`."""
    whole = moments_shape(shape, level, wavelet)
    if whole == tuple(shape):  # level 0, or rows of one element
        return tuple(local)
    return local[0], packed.numel // local[0] if packed.numel else whole[1]


def state_dtype(parameter: Tensor) -> torch.dtype:
    """fp64 for fp64 parameters, fp32 for all others.

    bf16 second moments could not decay: round-to-nearest loses every small step.
    """
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


class Active:
    """One parameter that takes part in one step; without a gradient in its collectives alone."""

    def __init__(self, parameter: Tensor, plan: Plan, rule: update.Rule, state: Mapping[str, Any]) -> None:
        self.plan, self.rule, self.state = plan, rule, state
        self.gradient: Tensor | None = None
        self.dtype = state_dtype(parameter)
        self._data = dtensor.local(parameter.detach())
        self._weight = self._data.reshape(-1)
        if parameter.grad is not None:
            self.gradient = dtensor.local(parameter.grad, like=parameter).reshape(-1)
            if self.gradient.numel() != self._weight.numel():
                raise ValueError(
                    f"a gradient of {self.gradient.numel()} elements for the {self._weight.numel()} that this rank "
                    f"holds of the parameter of {plan.shard.tensors[0].fqn!r}: the step would use those of other "
                    f"elements. It was not reduced; run the last backward pass before step() outside of no_sync()"
                )
            self.exp_avg, self.exp_avg_sq = (dtensor.local(state[k]).view(-1) for k in ("exp_avg", "exp_avg_sq"))
        # Tensors that have a place in the vector of norms; static, so that all ranks agree on its length.
        limited = rule.limiter > 0 and plan.has_levels
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
                exp_avg=self.exp_avg,
                exp_avg_sq=self.exp_avg_sq,
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


def make_jobs(active: Sequence[Active]) -> list[Job]:
    """The jobs of a step, their cut units completed by one sum for each process group; none if nothing is cut."""
    lengths = [one.plan.exchange.length for one in active]
    dtype = torch.float32
    if any(one.dtype == torch.float64 for one in active):
        dtype = torch.float64
    buffer = torch.zeros(sum(lengths), dtype=dtype, device=active[0].device)
    parts = buffer.split(lengths)
    for one, part in zip(active, parts, strict=True):
        if one.gradient is not None:
            for send in one.plan.exchange.sends:
                elements = one.gradient.narrow(0, send.source, send.length)
                part.narrow(0, send.slot, send.length).copy_(elements)
    sum_over_ranks(buffer, lengths, [one.plan.shard.row_groups for one in active])
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
    # A parameter without a gradient has a place among the norms, but nothing to limit or to remember.
    for (limiter, moves), run in groupby(active, key=lambda one: (one.rule.limiter, one.gradient is not None)):
        members = [one for one in run if one.norms]
        part = slice(first, first + sum(one.norms for one in members))
        first = part.stop
        if moves and members:
            stored = [one.state["limited_norm"].view(-1) for one in members]
            rho[part], new = update.limit_growth(squared_norms[part], torch.cat(stored).double(), limiter)
            torch._foreach_copy_(stored, list(new.split([s.numel() for s in stored])))
    return rho

"""What belongs to a matrix on the rank that owns it: where it is in the state, and how it is read and written there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gwt_dist import noise
from gwt_dist.declare import Rule
from gwt_dist.formulas import Seat
from gwt_dist.formulas.codecs import round_bf16
from gwt_dist.kernels import Part, Tensors
from gwt_dist.layout import Fragment
from gwt_dist.plan import Plan


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix that this rank owns is among what a step is given."""

    run: int
    parameter: int  # of the run
    fields: Mapping[str, Fragment]  # its OWNED fields
    salt: int  # what the tensor is known by in noise

    @classmethod
    def of(cls, plan: Plan, fqn: str, run: int, parts: Sequence[Part]) -> Place | None:
        """That of a tensor of which this rank moves `parts`; None without: who keeps for a matrix holds some of it."""
        if not parts:
            return None
        return cls(run, parts[0].parameter, plan.owned.get(fqn, {}), parts[0].piece.salt)

    def known(self, given: Tensors) -> tuple[Tensor, Tensor]:
        """Its count of steps, and whether the first row of the first field is set: 0-d, not waited for."""
        first = next(iter(self._stored(given).values()))
        return given.steps[self.parameter], first[0].any()

    def seat(self, given: Tensors, count: int, is_new: bool) -> Seat:
        """What is kept, itself in fp32 and fp64; a copy where it is bf16."""
        state = {name: x.float() if x.dtype == torch.bfloat16 else x for name, x in self._stored(given).items()}
        return Seat(state, given.steps[self.parameter], count, is_new)

    def store(self, seat: Seat, rule: Rule, given: Tensors) -> None:
        """Round by noise what is kept in bf16; what did not change stays as it is, as it has the bits of a bf16."""
        for number, (name, kept) in enumerate(self._stored(given).items()):
            if kept.dtype == torch.bfloat16:
                what, shift = noise.of_moment(number)
                key = noise.key(seat.step, what, int(rule["rounding_seed"]), self.salt)
                row, column = (torch.arange(n, device=kept.device) for n in kept.shape)
                kept.copy_(round_bf16(seat.state[name], noise.chance(noise.noise(row[:, None], column, key), shift)))

    def _stored(self, given: Tensors) -> dict[str, Tensor]:
        """The OWNED fields as they are kept, in their shapes."""
        return {
            name: given.state[name][self.parameter].view(-1).narrow(0, kept.offset, kept.numel).view(kept.shape)
            for name, kept in self.fields.items()
        }

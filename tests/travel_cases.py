"""What a rank holds of matrices that travel, given to any kernel: `norms`, `send` and `keep` against eager's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from gwt_dist import Fragment, recipes
from gwt_dist.comm import Shard, alone
from gwt_dist.declare import Rule
from gwt_dist.exchange import join
from gwt_dist.kernels import Kernel, Tensors, Work, eager
from gwt_dist.plan import Form, Plan
from gwt_dist.schedule import Member
from gwt_dist.stages import Maker
from gwt_dist.sums import lay_out

WIDE = torch.float32, torch.bfloat16
OPTIONS = st.fixed_dictionaries(
    {
        "nesterov": st.booleans(),
        "correct_bias": st.booleans(),
        "cautious": st.booleans(),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.99, 0.0)]),
        "detail_gain": st.sampled_from([None, 0.0, 0.3, "coherence"]),
        "scale": st.sampled_from([0.25, 1.0]),
        "weight_decay": st.sampled_from([0.1, 0.0]),
        "lr": st.sampled_from([0.01, torch.tensor(0.02)]),
    }
)
GAP = 3  # elements of the landing buffer between parts, which nobody may touch


def rule(**options: Any) -> Rule:
    """By coherence, so that there are sums, unless another gain is said; programs of one case must be the same."""
    base = {"lr": 0.01, "weight_decay": 0.1, "wavelet": "haar", "recipe": "orthogonal", "detail_gain": "coherence"}
    return recipes.rule_of(base | options)


def whole(*shapes: tuple[int, ...]) -> list[Fragment]:
    """All of some matrices, in one flat buffer."""
    fragments, offset = [], 2
    for i, shape in enumerate(shapes):
        fragments.append(Fragment(f"t{i}", shape, 0, prod(shape), offset))
        offset += prod(shape) + i % 2
    return fragments


@dataclass(frozen=True)
class Result:
    """What one kernel made of a case."""

    sums: Tensor
    state: list[Tensor]
    landing: Tensor
    weights: list[Tensor]


class Case:
    """Flat parameters that one rank holds as `ranks[rank]`, in all pairs of dtypes, at step `t`."""

    def __init__(
        self,
        ranks: Sequence[Sequence[Fragment]],
        rank: int,
        level: int,
        rules: Sequence[Rule],
        landing: torch.dtype = torch.float32,
        t: int = 3,
        size: float = 1.0,
        pairs: Sequence[tuple[torch.dtype, torch.dtype]] = tuple(product(WIDE, WIDE)),
        device: str = "cpu",
    ) -> None:
        random = torch.Generator().manual_seed(level + t)
        fragments = tuple(ranks[rank])
        shard = Shard(join(ranks), fragments, (), (), alone(fragments))
        self.rules = [rules[i % len(rules)] for i in range(len(pairs))]
        members = [
            Member(Plan.of(shard, Form.of(level, "haar", its)), i, weight, True, its.program, its.plain)
            for i, ((weight, _), its) in enumerate(zip(pairs, self.rules, strict=True))
        ]
        lengths = [member.plan.exchange.length for member in members]
        entries = [e for i, m in enumerate(members) for e in m.entries(i) if e.program.travels and e.pieces()]
        slots = [sum(lengths[:i]) for i in range(len(lengths))]
        groups = list(range(len(members)))
        make = Maker([m.dtype for m in members], groups, [True] * len(members), slots, torch.device(device))
        self.program = self.rules[0].program
        numel = max((f.offset + f.numel for f in fragments), default=0) + GAP

        def normal(count: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(count, generator=random, dtype=torch.float64).to(dtype)

        self.start = [normal(numel, weight) for weight, _ in pairs]
        self.gradients = [(size * normal(numel, torch.float64)).to(gradient).to(device) for _, gradient in pairs]
        self.exchange = (size * normal(sum(lengths), torch.float32)).to(device)
        self.states = []
        for weight, member in zip(self.start, members, strict=True):
            state = member.plan.fresh_state(weight)
            for name in [name for name in state if name.startswith("exp_avg") and t > 1]:
                # So small beside the gradients that a coherence is neither 0 nor 1.
                its = normal(state[name].numel(), torch.float32)
                its = (40 * its).clamp(-127, 127) if state[name].dtype == torch.int8 else size / 20 * its
                state[name] = its.to(state[name].dtype)
            state["step"] += t
            self.states.append(state)
        self.device, self.landing, self.length = device, landing, GAP
        self.members = tuple(entry.member for entry in entries)
        if not entries:
            self.work = Work((), self.program, ((), ()), (0, 0), dict.fromkeys(self.program.names(), ()))
            return
        parts, its = [], make.run(eager, entries, [lay_out(entries, phase) for phase in (0, 1)]).work
        for part in reversed(its.parts):  # in another order than that of the work
            parts.insert(0, replace(part, landing=self.length))
            self.length += part.piece.fragment.numel + GAP
        self.work = Work(tuple(parts), its.program, its.lengths, its.sizes, its.numels)

    def given(self) -> Tensors:
        """Copies of everything that a kernel writes."""
        names = self.work.program.names()
        states = [self.states[i] for i in self.members]
        return Tensors(
            [self.start[i].to(self.device, copy=True) for i in self.members],
            [self.gradients[i] for i in self.members],
            {name: [state[name].to(self.device, copy=True) for state in states] for name in names},
            [state["step"].to(self.device, copy=True) for state in states],
            [self.rules[i] for i in self.members],
            self.exchange,
        )

    def run(self, kernel: Kernel, norms: Tensor | None = None) -> Result:
        """All phases; what is sent depends on the sums of `norms`, if they are given, and not on its own."""
        tensors, landing = self.given(), torch.full((self.length,), torch.nan, dtype=self.landing, device=self.device)
        sums = [torch.ones(size, dtype=torch.float64, device=self.device) for size in self.work.sizes]
        kernel.check(self.work, tensors)
        number = len(self.program.phases) - 1
        if number:
            kernel.phase(0, self.work, tensors, sums)
        found = sums[0].clone()
        kernel.send(number, self.work, tensors, sums if norms is None else [norms], landing)
        sent, back = landing.clone(), torch.Generator().manual_seed(1)
        landing.copy_(torch.randn(landing.shape, generator=back))
        kernel.keep(number, self.work, tensors, landing)
        state = [tensor for its in tensors.state.values() for tensor in its]
        return Result(found, state, sent, tensors.weights)


def same(mine: Sequence[Tensor], theirs: Sequence[Tensor], what: str) -> None:
    """Bit for bit, NaN equal to NaN."""
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{what} {i}: {m}")


def equal(kernel: Kernel, case: Case) -> None:
    """As eager: sums but for the order of additions, everything else bit for bit where the sums are the same."""
    expected = case.run(eager)
    found = case.run(kernel, expected.sums)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-12, atol=0, equal_nan=True)
    same([found.landing], [expected.landing], "what is sent")
    same(found.state, expected.state, "state")
    same(found.weights, expected.weights, "weight")

"""Bytes of every rank of a run that is not there yet: weights, gradients, masters, state, cut units, collectives.

State, cut units, exchange, masters and the model's own weights are exact. Gradients are those that an engine holds at
the end of a backward pass. Activations and an engine's buffers for communication are not counted.

Ranks that hold the same are one shard, so a plan has one number a shard; replicas repeat them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gwt_dist.declare import Extent, Field
from gwt_dist.memory.model import ModelSpec
from gwt_dist.memory.setup import Setup
from gwt_dist.memory.state import GroupSpec


@dataclass(slots=True)
class MemoryPlan:
    """Bytes by shard, one number each; `of_rank` says which shard a rank has."""

    setup: Setup
    model: ModelSpec
    groups: Sequence[GroupSpec]
    fields: dict[Field, list[int]] = field(init=False)  # state by field, wherever a number of it is kept
    steps: list[int] = field(init=False)
    cut: list[int] = field(init=False)  # of `fields`, what another rank owns
    weights: list[int] = field(init=False)
    masters: list[int] = field(init=False)
    gradients: list[int] = field(init=False)
    step_gradients: list[int] = field(init=False)  # fp32, of one buffer at a time, beside masters
    elements: list[int] = field(init=False)  # trained elements, not bytes
    checkpoint: list[int] = field(init=False)  # what a shard's ranks write between them
    travelling: list[int] = field(init=False)  # what a shard sends of matrices to their owners and back, each step
    checkpoint_common: int = 0  # what all ranks hold alike, of which each writes a part
    exchange: int = 0  # elements of all cut units in the sum that completes them, each step
    norms: int = 0  # numbers of all other sums over ranks, each step

    def __post_init__(self) -> None:
        programs = [program for group in self.groups for program in (group.plain, group.program)]
        self.fields = {field: self._nothing() for program in programs for field in program.fields}
        self.steps, self.cut, self.weights, self.masters = (self._nothing() for _ in range(4))
        self.gradients, self.step_gradients, self.elements, self.checkpoint = (self._nothing() for _ in range(4))
        self.travelling = self._nothing()

    def _nothing(self) -> list[int]:
        return [0] * self.setup.shards

    @property
    def scalars(self) -> list[int]:
        """Steps, and fields of one number a tensor."""
        its = [values for field, values in self.fields.items() if field.extent is Extent.TENSOR]
        return [sum(x) for x in zip(self.steps, *its, strict=True)]

    @property
    def state(self) -> list[int]:
        """All optimizer state."""
        return [sum(x) for x in zip(self.steps, *self.fields.values(), strict=True)]

    @property
    def total(self) -> list[int]:
        """Everything that is counted, on device and host together."""
        return [sum(x) for x in zip(self.device, self.host, strict=True)]

    @property
    def device(self) -> list[int]:
        """What is not offloaded."""
        return self._sum(host=False)

    @property
    def host(self) -> list[int]:
        """What is offloaded."""
        return self._sum(host=True)

    @property
    def whole_checkpoint(self) -> int:
        """Bytes of all tensors of a checkpoint, each element once."""
        return sum(self.checkpoint) + self.checkpoint_common

    def of_rank(self, rank: int) -> int:
        """The shard of a rank: neighbours shard, ranks further apart are replicas (a mesh of replicas x shards)."""
        return rank % self.setup.shards

    def _sum(self, host: bool) -> list[int]:
        offload = self.setup.offload
        optimizer = [*zip(self.masters, self.state, self.step_gradients, strict=True)]
        weights = self.weights
        gradients = self.gradients
        no = [0] * len(weights)
        moved = offload in ("optimizer", "both")
        # FSDP2's CPUOffloadPolicy keeps gradient shards on the host as well, ZeRO-Offload the fp32 ones it steps with.
        on_host = (
            weights if offload in ("weights", "both") else no,
            gradients if moved and self.setup.engine == "fsdp2" else no,
            [sum(o) for o in optimizer] if moved else no,
        )
        everything = [sum(x) for x in zip(weights, gradients, map(sum, optimizer), strict=True)]
        hosted = [sum(x) for x in zip(*on_host, strict=True)]
        return hosted if host else [a - b for a, b in zip(everything, hosted, strict=True)]

"""Bytes of every rank of a run that is not there yet: weights, gradients, masters, moments, cut units, collectives.

State, cut units, exchange, masters and the model's own weights are exact. Gradients are those that an engine holds at
the end of a backward pass. Activations and an engine's buffers for communication are not counted.

Ranks that hold the same are one shard, so a plan has one number a shard; replicas repeat them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gwt_dist.memory.model import ModelSpec
from gwt_dist.memory.setup import Setup
from gwt_dist.memory.state import GroupSpec


@dataclass(slots=True)
class Plan:
    """Bytes by shard, one number each; `of_rank` says which shard a rank has."""

    setup: Setup
    model: ModelSpec
    groups: Sequence[GroupSpec]
    weights: list[int] = field(default_factory=list)
    masters: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    step_gradients: list[int] = field(default_factory=list)  # fp32, of one buffer at a time, beside masters
    wavelet: list[int] = field(default_factory=list)  # moments of tensors with level > 0
    second: list[int] = field(default_factory=list)  # the second of both, of whatever level
    cut: list[int] = field(default_factory=list)  # the part of `wavelet` that another rank owns
    rest: list[int] = field(default_factory=list)  # both moments of level-0 tensors
    scalars: list[int] = field(default_factory=list)  # steps and limiter norms
    elements: list[int] = field(default_factory=list)  # trained elements, not bytes
    checkpoint: list[int] = field(default_factory=list)  # what a shard's ranks write between them
    checkpoint_common: int = 0  # what all ranks hold alike, of which each writes a part
    exchange: int = 0  # elements of all cut units in the sum that completes them, each step
    norms: int = 0  # squared norms in their sum, each step
    travelling: int = 0  # elements of all matrices that are sent to a rank each and back, each step

    @property
    def state(self) -> list[int]:
        """All optimizer state."""
        return [sum(x) for x in zip(self.wavelet, self.rest, self.scalars, strict=True)]

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

"""Parameters that `fuse_backward` updates at once, and what has become of their gradients since the last step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Group:
    """The parameters whose gradients are reduced at once."""

    def __init__(self, optimizer: Any, members: Sequence[Tensor]) -> None:
        self._optimizer, self.members = optimizer, members
        self._taken = False
        optimizer.register_step_pre_hook(self._end)

    @property
    def accumulates(self) -> bool:
        """Whether the gradient that has just been reduced is one of an earlier micro-batch; asked once for each."""
        holding = self._optimizer.holding
        (holding.add if self._optimizer.is_accumulating else holding.discard)(self)
        return self in holding

    def update(self) -> None:
        """Take the gradients of all members in and free them; raises `ValueError` if that has been done."""
        if self._taken:
            raise ValueError(
                f"a second gradient since the last step() for {len(self.members)} parameters, and the first has been "
                f"taken in already. Call optimizer.step() after each backward pass, run all micro-batches of a step "
                f"but the last under optimizer.accumulating(), and pass use_reentrant=False to activation checkpointing"
            )
        self._taken = True
        self._optimizer.update(self.members)
        self.clear()

    def clear(self) -> None:
        """Free the gradients."""
        for parameter in self.members:
            parameter.grad = None

    def _end(self, *_: Any) -> None:
        if self in self._optimizer.holding:
            raise ValueError(
                f"{len(self.members)} parameters have gradients that were only accumulated: this step would leave them "
                f"out. Run the last backward pass of a step outside of optimizer.accumulating()"
            )
        self._taken = False

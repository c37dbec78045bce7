"""What all ranks of a save or a load do together: one answer of each to all, and errors that all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from gwt_dist.checkpoint.format import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Together:
    """The ranks of a process group, by their numbers in it; without a group all, or this process alone."""

    group: ProcessGroup | None = None

    @classmethod
    def of(cls, group: ProcessGroup | None, what: str) -> Together:
        """Those who take part in `what`; raises `CheckpointError` on any other rank, which would wait for ever."""
        if group is not None and not dist.is_initialized():
            raise CheckpointError(f"{what} got a process_group, and torch.distributed is not initialized")
        if group is not None and dist.get_rank(group) < 0:
            raise CheckpointError(
                f"rank {dist.get_rank()} of {dist.get_world_size()} called {what} with a process_group that it is not "
                f"in: the others do not wait for it. Call it on the ranks of that group alone"
            )
        return cls(group)

    def rank(self) -> int:
        """Number of this rank; 0 without a process group."""
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    def world_size(self) -> int:
        """Number of ranks; 1 without a process group."""
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def gather(self, mine: T) -> list[T]:
        """The values of all ranks, on every rank."""
        everyone: list[Any] = [mine]
        if self.world_size() > 1:
            everyone = [None] * self.world_size()
            dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def agree(self, mine: Any, what: str) -> None:
        """Raise `CheckpointError` on all ranks unless all have the same value."""
        for number, other in enumerate(everyone := self.gather(mine)):
            if other != everyone[0]:
                raise CheckpointError(
                    f"ranks disagree about {what}: {everyone[0]!r} on rank 0 and {other!r} on rank {number}"
                )

    def each(self, what: Callable[[], T], path: Path | None = None) -> T:
        """``what()`` of this rank; if it raises on any rank, all raise `CheckpointError`.

        So that nobody waits for a rank that failed, and nobody goes on without it. `path` is what it writes, for errors
        of the system that name no file, as that of a full disk.
        """
        failure: Exception | None = None
        message, value = "", None
        try:
            value = what()
        except Exception as error:
            failure, message = error, _told(error, path)
            # What is read may be as long as it likes.
            message = message if len(message) <= 2000 else f"{message[:2000]}..."
        failed = [(number, text) for number, text in enumerate(self.gather(message)) if text]
        if failed:
            where = f"rank {failed[0][0]}: " if self.world_size() > 1 else ""
            also = f" (and on {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
            raise CheckpointError(f"{where}{failed[0][1]}{also}") from failure
        return value  # type: ignore[return-value]

    def from_rank_0(self, what: Callable[[], T], path: Path | None = None) -> T:
        """``what()``, run on rank 0 alone, for all; if it raises, all raise `CheckpointError`. `path` as in `each`."""
        value = self.gather(self.each(lambda: what() if self.rank() == 0 else None, path))[0]
        assert value is not None
        return value


def _told(error: Exception, path: Path | None) -> str:
    """Errors of ours say what was found; of others the type is the half of what they say."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or path or type(error).__name__}: {error.strerror}"
    return str(error) if isinstance(error, ValueError) else repr(error)

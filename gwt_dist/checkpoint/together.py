"""What all ranks do together: one answer of each to all, and errors that all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from gwt_dist.checkpoint.format import CheckpointError

T = TypeVar("T")


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(mine: T) -> list[T]:
    """The values of all ranks, on every rank."""
    everyone: list[Any] = [mine]
    if world_size() > 1:
        everyone = [None] * world_size()
        dist.all_gather_object(everyone, mine)
    return everyone


def each(what: Callable[[], T], path: Path | None = None) -> T:
    """``what()`` of this rank; if it raises on any rank, all raise `CheckpointError`.

    So that nobody waits for a rank that failed, and nobody goes on without it. `path` is what it writes, for errors of
    the system that name no file, as that of a full disk.
    """
    failure: Exception | None = None
    message, value = "", None
    try:
        value = what()
    except Exception as error:
        failure, message = error, _told(error, path)
        message = message if len(message) <= 2000 else f"{message[:2000]}..."  # what is read may be as long as it likes
    failed = [(number, text) for number, text in enumerate(gather(message)) if text]
    if failed:
        where = f"rank {failed[0][0]}: " if world_size() > 1 else ""
        also = f" (and on {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise CheckpointError(f"{where}{failed[0][1]}{also}") from failure
    return value  # type: ignore[return-value]


def _told(error: Exception, path: Path | None) -> str:
    """Errors of ours say what was found; of others the type is the half of what they say."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or path or type(error).__name__}: {error.strerror}"
    return str(error) if isinstance(error, ValueError) else repr(error)


def from_rank_0(what: Callable[[], T], path: Path | None = None) -> T:
    """``what()``, run on rank 0 alone, for all; if it raises, all raise `CheckpointError`. `path` is as in `each`."""
    value = gather(each(lambda: what() if rank() == 0 else None, path))[0]
    assert value is not None
    return value

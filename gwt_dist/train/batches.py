"""Which tokens a rank trains on at a step: a pure function, so that resuming needs only the step.

The stream of tokens is cut into windows of `sequence_length` predicted tokens. Each epoch visits
every window once in an order drawn from (seed, epoch). The optimizer step `s` takes the windows
`s*B .. (s+1)*B` of that order, B being the train batch size, whatever the number of ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gwt_dist.train.ds_config import BatchSizes
from gwt_dist.train.tokens import ByteCounts, Ids

Batch = npt.NDArray[np.int64]  # [micro, length + 1]: inputs are [:, :-1], targets [:, 1:]


def checksum(batch: Batch) -> int:
    """Of the windows in a batch, each below 2**32. Sums over ranks and micro-batches are the same whoever has which
    window, so one number tells whether two steps took the same text.
    """
    return sum(zlib.crc32(np.ascontiguousarray(window, dtype="<i8").tobytes()) for window in batch)


class Batches(Protocol):
    """Training batches of one rank, in order."""

    def batch(self, step: int, micro_step: int) -> Batch:
        """Tokens [micro, length + 1] of micro-batch `micro_step` of optimizer step `step`."""
        ...

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint must hold, beside the step, to go on with the same next batch: JSON, or None."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        ...


def count_windows(tokens: Ids, length: int, what: str) -> int:
    """Windows of `length` predicted tokens in a stream [n].

    Raises:
        ValueError: not even one; `what` names the stream.
    """
    windows = (len(tokens) - 1) // length
    if windows < 1:
        raise ValueError(
            f"the {what} text has {len(tokens)} tokens, one sequence of {length} needs "
            f"{length + 1}; give more text or lower sequence_length"
        )
    return windows


class ShuffledBatches:
    """Batches of a corpus that is in memory; holds no position."""

    def __init__(self, tokens: Ids, length: int, sizes: BatchSizes, *, rank: int, seed: int) -> None:
        self.windows = count_windows(tokens, length, "training")
        self._tokens, self._length, self._sizes = tokens, length, sizes
        self._rank, self._seed = rank, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def batch(self, step: int, micro_step: int) -> Batch:
        """Tokens [micro, length + 1]; depends on the arguments and the constructor's alone."""
        micro, accumulation = self._sizes.micro, self._sizes.accumulation
        first = step * self._sizes.train + (self._rank * accumulation + micro_step) * micro
        return np.stack([self._window(first + i) for i in range(micro)])

    def state_dict(self) -> None:
        """Nothing: the step says everything, for any number of ranks."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def _window(self, sample: int) -> npt.NDArray[np.int64]:
        epoch, place = divmod(sample, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(self.windows)
        start = self._order[place] * self._length
        return self._tokens[start : start + self._length + 1].astype(np.int64)


@dataclass(frozen=True, slots=True)
class ValidationBatch:
    """`tokens` [micro, length + 1]; `counted` [micro] is 0 for a window that only fills up;
    `text_bytes` [micro] is the length in bytes of the predicted text.
    """

    tokens: Batch
    counted: npt.NDArray[np.float64]
    text_bytes: npt.NDArray[np.int64]


class Validation:
    """A fixed set of windows, evenly spread over the validation text."""

    def __init__(self, tokens: Ids, covered: ByteCounts, length: int, eval_tokens: int) -> None:
        available = count_windows(tokens, length, "validation")
        chosen = min(max(eval_tokens // length, 1), available)
        self._starts = (np.arange(chosen) * available // chosen) * length
        self._tokens, self._covered, self._length = tokens, covered, length
        self.windows = chosen

    def batches(self, rank: int, world_size: int, micro: int) -> Iterator[ValidationBatch]:
        """The share of one rank, in batches of `micro` windows.

        Every rank gets equally many batches, as ZeRO-3 gathers weights in each forward pass: what
        is missing is filled with windows that do not count.
        """
        per_rank = -(-self.windows // world_size)
        for first in range(0, per_rank, micro):
            numbers = [rank + world_size * (first + i) for i in range(micro)]
            counted = [n < self.windows and first + i < per_rank for i, n in enumerate(numbers)]
            starts = [self._starts[n] if c else 0 for n, c in zip(numbers, counted, strict=True)]
            ends = [start + self._length + 1 for start in starts]
            spans = list(zip(starts, ends, strict=True))
            yield ValidationBatch(
                tokens=np.stack([self._tokens[s:e].astype(np.int64) for s, e in spans]),
                counted=np.array(counted, dtype=np.float64),
                text_bytes=np.array([self._covered[s + 1 : e].sum(dtype="int64") for s, e in spans]),
            )

"""What an adapter reads of a flat parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from gwt_dist.layout import Fragment


@dataclass(frozen=True, slots=True)
class FlatBuffer:
    """What an adapter reads of one flat parameter that an engine hands to the optimizer."""

    parameter: Tensor  # 1-D, the buffer itself; or one whole tensor in its own shape
    fragments: tuple[Fragment, ...]  # this rank's; padding belongs to none
    weights: tuple[Tensor, ...]  # per fragment, 1-D: the same elements as the model holds them
    group: ProcessGroup | None  # the ranks that hold the rest

"""State of other optimizers by formula, for the same weights, on the matrices that have a level here.

Elements m x n with m <= n, rank r, moments in fp32 (4 bytes), as here; ``galore-torch`` and ``apollo-torch`` keep
theirs in the dtype of the gradient. Compared with what they
allocate for fp32 matrices, both ways round: torch 2.13 (AdamW, beside a step of 4 bytes a tensor), galore-torch 1.0 and
apollo-torch 1.0.3 (beside its seed of 4 bytes). bitsandbytes: the block and the
smallest tensor are those in the sources of 0.50, which was not run here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import ceil, prod

from gwt_dist.layout import columns_of
from gwt_dist.memory.state import GroupSpec

FP32 = 4
BLOCK = 256  # elements with one scale in bitsandbytes 0.50
SMALLEST = 4096  # tensors with fewer elements stay in fp32 there


@dataclass(frozen=True, slots=True)
class Other:
    """Bytes of state of the whole model, and of a rank if it were divided evenly by elements."""

    name: str
    formula: str
    whole: int

    def of(self, elements: int, all_elements: int) -> int:
        """The part of a rank that has `elements` of all."""
        return round(self.whole * elements / all_elements) if all_elements else 0


def adamw(shape: Sequence[int]) -> int:
    """Two moments (torch.optim.AdamW): ``8 m n``."""
    return 2 * FP32 * prod(shape)


def adam_8bit(shape: Sequence[int]) -> int:
    """Two moments of a byte, and a scale in fp32 for each block (arXiv 2110.02861): ``2 m n + 8 ceil(m n / 256)``."""
    numel = prod(shape)
    return adamw(shape) if numel < SMALLEST else 2 * numel + 2 * FP32 * ceil(numel / BLOCK)


def galore(shape: Sequence[int], rank: int) -> int:
    """Two moments of the projected gradient and the projection (arXiv 2403.03507): ``4 (2 r n + r m)``.

    The longer side is kept, so moments are ``[r, n]``, whichever way round the matrix is.
    """
    short, long, rank = _sides(shape, rank)
    return FP32 * (2 * rank * long + rank * short)


def apollo(shape: Sequence[int], rank: int) -> int:
    """Two moments of the projected gradient (arXiv 2412.05270): ``8 r n``; the projection comes from a seed.

    apollo-torch 1.0.3 keeps the projection between its refreshes all the same, which makes it GaLore's number.
    """
    return 2 * FP32 * rank * _sides(shape, rank)[1]  # a projection that is random may be wider than the matrix


def _sides(shape: Sequence[int], rank: int) -> tuple[int, int, int]:
    columns = columns_of(tuple(shape))
    rows = prod(shape) // columns if columns else 0
    short, long = sorted((rows, columns))
    return short, long, min(rank, short)


def quarter(groups: Sequence[GroupSpec], targeted: Collection[str]) -> int:
    """The rank that these methods are usually run with: a quarter of the model's width."""
    sides = [_sides(shape, 1)[0] for is_targeted, shape in _matrices(groups, targeted) if is_targeted]
    return max(1, max(sides, default=0) // 4)


def _matrices(groups: Sequence[GroupSpec], targeted: Collection[str]) -> list[tuple[bool, tuple[int, ...]]]:
    """Of each tensor, or each matrix of a stack, whether it is targeted, and its shape."""
    tensors = [(name in targeted, group, shape) for group in groups for name, shape in group.tensors]
    return [(chosen, its) for chosen, group, shape in tensors for its in group.matrices(shape)]


def others(groups: Sequence[GroupSpec], targeted: Collection[str], rank: int) -> list[Other]:
    """AdamW, 8-bit Adam, GaLore and APOLLO on these tensors; the last two on what is `targeted`, AdamW on the rest."""
    tensors = [(chosen and len(shape) >= 2, shape) for chosen, shape in _matrices(groups, targeted)]

    def low_rank(of: Callable[[Sequence[int], int], int]) -> int:
        return sum(of(shape, rank) if chosen else adamw(shape) for chosen, shape in tensors)

    return [
        Other("AdamW", "8 bytes an element", sum(adamw(shape) for _, shape in tensors)),
        Other("8-bit Adam", "2 bytes an element, 8 a block of 256", sum(adam_8bit(shape) for _, shape in tensors)),
        Other(f"GaLore, rank {rank}", "4 (2 r n + r m) a matrix, m <= n; AdamW else", low_rank(galore)),
        Other(f"APOLLO, rank {rank}", "8 r n a matrix, the projection from a seed; AdamW else", low_rank(apollo)),
    ]

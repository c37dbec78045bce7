"""What a kernel is given: fragments and their places (`Work`, fixed), and the tensors of one step (`Tensors`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from gwt_dist.declare import Extent, Program, Rule
from gwt_dist.kernels.items import Item, Part, items_of

T = TypeVar("T")


@dataclass(slots=True)
class Tensors:
    """The tensors of one step, one of each for a parameter; all are read and written where they lie."""

    weights: list[Tensor]  # local buffers, dense, any floating dtype
    gradients: list[Tensor]  # local buffers, dense, any floating dtype
    state: Mapping[str, list[Tensor]]  # by field of the program: dense, each in its format
    steps: list[Tensor]  # 0-d fp32, this step counted
    rules: list[Rule]  # one a parameter
    exchange: Tensor  # elements of cut cells, fp32 or fp64
    made: dict[str, Any] = field(default_factory=dict)  # what a kernel made of them, for as long as the step lasts

    def once(self, name: str, make: Callable[[], T]) -> T:
        """``make()``, or what it made of these tensors before."""
        if name not in self.made:
            self.made[name] = make()
        found: T = self.made[name]
        return found


@dataclass(eq=False)
class Work:
    """Pieces that one call of a kernel works on."""

    parts: tuple[Part, ...]
    program: Program
    lengths: tuple[tuple[int, ...], ...]  # of each phase, how many numbers a tensor each parameter has in its sums
    sizes: tuple[int, ...] = ()  # of each phase, the length of the vector of its sums
    numels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of each field, the numbers of each parameter
    _tables: dict[tuple[int, bool], Tensor] = field(default_factory=dict, init=False)
    _batches: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)
    _needed: dict[tuple[str, ...], Tensor] = field(default_factory=dict, init=False)

    @property
    def norms(self) -> tuple[int, ...]:
        """Of each parameter, its numbers in the sums of the first phase; none where it has none."""
        return self.lengths[0] if self.lengths and any(self.lengths[0]) else ()

    def needed(self, *names: str) -> Tensor:
        """The numbers that each parameter has of these fields, int64 ``[parameters, fields]``."""
        if names not in self._needed:
            self._needed[names] = torch.tensor([self.numels[name] for name in names], dtype=torch.int64).T.contiguous()
        return self._needed[names]

    def table(self, chunk: int, joined: bool = True) -> Tensor:
        """The items of all parts in order of their norms, int64 ``[items, fields of Item]``.

        They have about `chunk` elements each where a part has as many. Without `joined` all are of one run where cells
        are of several units.
        """
        key = chunk, joined
        if key not in self._tables:
            scale = next(iter(self.program.names(Extent.CELL)), "")
            items = [item for part in self.parts for item in items_of(part, chunk, joined, scale)]
            items.sort(key=lambda item: item.norm)
            self._tables[key] = torch.tensor(items, dtype=torch.int64).view(-1, len(Item._fields))
        return self._tables[key]

    def batches(self, chunk: int, elements: int) -> Tensor:
        """Runs of items of ``table(chunk)`` whose norms are theirs alone, of at least `elements` elements but the last.

        int64 ``[batches, 4]``: first item and the one after the last, first norm and the one after the last.
        """
        key = chunk, elements
        if key not in self._batches:
            batches: list[list[int]] = []
            room = 0
            for i, row in enumerate(self.table(chunk).tolist()):
                item = Item(*row)
                if not batches or (item.norm != batches[-1][3] - 1 and room <= 0):
                    batches.append([i, i, item.norm, item.norm])
                    room = elements
                batches[-1][1], batches[-1][3] = i + 1, item.norm + 1
                room -= item.rows * item.units << item.level
            self._batches[key] = torch.tensor(batches, dtype=torch.int64).view(-1, 4)
        return self._batches[key]

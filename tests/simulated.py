"""Ranks simulated in one process: every rank is a thread that runs the real optimizer on its own fragments."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gwt_dist import GWTAdamW
from gwt_dist.comm import Peers, Shard
from gwt_dist.exchange import join
from gwt_dist.layout import Fragment


@dataclass(eq=False)
class Group:
    """Stands where a process group stands; sums buffers over threads, in the order of ranks."""

    world: int
    calls: list[int] = field(default_factory=list)  # elements of each sum, as rank 0 saw them
    swaps: list[list[int]] = field(default_factory=list)  # of each swap, the elements of each kind that rank 0 sent

    def __post_init__(self) -> None:
        self._barrier = threading.Barrier(self.world)
        self._buffers: list[Tensor | None] = [None] * self.world
        self._letters: list[list[list[Tensor]]] = [[] for _ in range(self.world)]
        self._rank = threading.local()

    def all_reduce(self, buffer: Tensor, group: object) -> None:
        assert group is self
        rank: int = self._rank.value
        if rank == 0:
            self.calls.append(buffer.numel())
        self._buffers[rank] = buffer.clone()
        self._barrier.wait(timeout=30)
        buffers = [b for b in self._buffers if b is not None]
        assert len({b.shape for b in buffers}) == 1, "ranks disagree on the length of a collective"
        total = torch.zeros_like(buffer)
        for other in buffers:
            total += other
        self._barrier.wait(timeout=30)
        buffer.copy_(total)

    def post(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]], peers: Peers
    ) -> Callable[[], None]:
        """Messages of one swap: each rank leaves its own and takes what the others left for it."""
        assert peers.group is self
        self._letters[peers.here] = [[buffer.clone() for buffer in kind] for kind in outgoing]
        self._barrier.wait(timeout=30)
        arrived = []
        for kind, buffers in enumerate(incoming):
            for i, buffer in enumerate(buffers):
                letter = self._letters[i][kind][peers.here]
                assert letter.numel() == buffer.numel(), "ranks disagree on the length of a message"
                assert letter.dtype == buffer.dtype, "ranks disagree on the dtype of a message"
                if i != peers.here:
                    arrived.append((buffer, letter))
        if peers.here == 0:
            self.swaps.append([sum(b.numel() for i, b in enumerate(kind) if i) for kind in outgoing])
        self._barrier.wait(timeout=30)

        def wait() -> None:
            for buffer, letter in arrived:  # not before: who reads too early finds what was there
                buffer.copy_(letter)

        return wait

    def run(self, function: Callable[[int], None]) -> None:
        """Call `function(rank)` on every rank at once; the first exception of a rank is raised here."""
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            self._rank.value = rank
            try:
                function(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        with patch("gwt_dist.comm.all_reduce", self.all_reduce), patch("gwt_dist.comm.post", self.post):
            threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        for error in real or errors:
            raise error


def unlike_one_process(
    world: tuple[dict[str, tuple[int, ...]], Sequence[Sequence[Fragment]]], steps: int, **options: Any
) -> tuple[float, Sharded, GWTAdamW]:
    """The largest distance of a tensor from one process after some steps, as a part of how far that has moved.

    And both optimizers. Gradients of every other step are twice as large.
    """
    shapes, ranks = world
    start = {fqn: normal(*shape, seed=i) for i, (fqn, shape) in enumerate(shapes.items())}
    sharded = Sharded(start, ranks, **options)
    whole = {fqn: torch.nn.Parameter(tensor.clone()) for fqn, tensor in start.items()}
    optimizer = GWTAdamW(whole.values(), **options)
    for step in range(steps):
        grads = {
            fqn: (1 + step % 2) * normal(*shape, seed=100 * step + i) for i, (fqn, shape) in enumerate(shapes.items())
        }
        for fqn, parameter in whole.items():
            parameter.grad = grads[fqn].clone()
        optimizer.step()
        sharded.step(grads)
    apart = [
        float((whole[fqn].detach() - weight).norm()) / max(float((whole[fqn].detach() - start[fqn]).norm()), 1e-3)
        for fqn, weight in sharded.gather(shapes).items()
    ]
    return max(apart), sharded, optimizer


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Sharded:
    """A model of whole `weights` that ranks hold as `ranks[r]`, fragments in a flat buffer each, stepped together.

    What lies between fragments is NaN in weights and gradients: an engine's padding is uninitialised memory.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        ranks: Sequence[Sequence[Fragment]],
        **options: object,
    ) -> None:
        self.group, self.ranks = Group(len(ranks)), ranks
        self.flats = [self.scatter(weights, rank) for rank in range(len(ranks))]
        tensors = join(ranks)
        self.optimizers = []
        for rank, flat in enumerate(self.flats):
            optimizer = GWTAdamW([flat], **options)  # type: ignore[arg-type]
            peers = Peers(tuple(range(len(ranks))), rank, self.group, ranks.__getitem__)  # type: ignore[arg-type]
            groups: Any = (self.group,)
            optimizer.attach({flat: Shard(tensors, tuple(ranks[rank]), groups, groups, peers)})
            self.optimizers.append(optimizer)

    def step(self, gradients: dict[str, Tensor]) -> None:
        for rank, flat in enumerate(self.flats):
            flat.grad = self.scatter(gradients, rank).detach()
        self.group.run(lambda rank: self.optimizers[rank].step())

    def scatter(self, tensors: dict[str, Tensor], rank: int) -> torch.nn.Parameter:
        like = next(iter(tensors.values()))
        end = max((f.offset + f.numel for f in self.ranks[rank]), default=0) + 3
        flat = torch.full((end,), float("nan"), dtype=like.dtype, device=like.device)
        for f in self.ranks[rank]:
            for i, (start, stop) in enumerate(f.intervals):
                place = f.offset + i * (stop - start)
                flat[place : place + stop - start] = tensors[f.fqn].reshape(-1)[start:stop]
        return torch.nn.Parameter(flat)

    def gather(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        whole = {fqn: torch.full(shape, float("nan"), dtype=self.flats[0].dtype) for fqn, shape in shapes.items()}
        for flat, fragments in zip(self.flats, self.ranks, strict=True):
            for f in fragments:
                for i, (start, stop) in enumerate(f.intervals):
                    place = f.offset + i * (stop - start)
                    whole[f.fqn].view(-1)[start:stop] = flat.detach()[place : place + stop - start]
        return whole

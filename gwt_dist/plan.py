"""What is fixed about one optimizer parameter: its pieces, its part in the collectives, its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gwt_dist import dtensor, layout
from gwt_dist.comm import Shard
from gwt_dist.kernels import Piece, moments_shape
from gwt_dist.units import level_of, units_of


@dataclass(frozen=True, slots=True)
class Plan:
    """One optimizer parameter for as long as its layout lasts."""

    shard: Shard
    level: int
    wavelet: str
    pieces: tuple[Piece, ...]
    exchange: layout.Exchange
    places: dict[str, int]  # fqn -> place in `limited_norm`
    has_levels: bool  # any tensor of level > 0, on whichever rank
    second_moment: bool  # tensors with level > 0 have one; the others always do
    moments_shape: tuple[int, ...]
    second_shape: tuple[int, ...] | None  # of exp_avg_sq; None: no tensor on whichever rank has it
    norms_shape: tuple[int, ...]

    @classmethod
    def of(cls, shard: Shard, level: int, wavelet: str, second_moment: bool = True) -> Plan:
        """The plan of a shard in a group of `level` and `wavelet`, whose tensors with a level have a second moment."""

        def units(shape: tuple[int, ...]) -> layout.Units:
            return units_of(shape, level, wavelet)

        has_levels = any(level_of(tensor.shape, level) for tensor in shard.tensors)
        has_second = [second_moment or not level_of(fragment.shape, level) for fragment in shard.fragments]
        packed = _pack(shard.fragments, has_second, units)
        second: tuple[int, ...] | None = (sum(m.numel for m, has in zip(packed, has_second, strict=True) if has),)
        moments: tuple[int, ...] = (sum(m.numel for m in packed),)
        norms: tuple[int, ...] = (len(shard.tensors),)
        if shard.local_shape is not None:
            moments, norms = _local_moments(shard.local_shape, shard.tensors[0].shape, packed[0], level, wavelet), ()
            second = moments
        if not second_moment and all(level_of(tensor.shape, level) for tensor in shard.tensors):
            second = None
        return cls(
            shard=shard,
            level=level,
            wavelet=wavelet,
            pieces=tuple(
                Piece.of(fragment, moment, level, wavelet)
                for fragment, moment in zip(shard.fragments, packed, strict=True)
            ),
            exchange=layout.plan_exchange(shard.tensors, shard.fragments, units),
            places={tensor.fqn: i for i, tensor in enumerate(shard.tensors)},
            has_levels=has_levels,
            second_moment=second_moment,
            moments_shape=moments,
            second_shape=second,
            norms_shape=norms,
        )

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """State before the first step, on the device of `parameter` and sharded as it is."""
        shape = self.shard.tensors[0].shape
        whole = moments_shape(shape, self.level, self.wavelet)
        units = units_of(shape, self.level, self.wavelet)

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=state_dtype(parameter.dtype), device=parameter.device)

        state = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": dtensor.wrap(zeros(self.moments_shape), parameter, whole, units),
        }
        if self.second_shape is not None:
            state["exp_avg_sq"] = dtensor.wrap(zeros(self.second_shape), parameter, whole, units)
        return state | {"limited_norm": zeros(self.norms_shape)}


def _pack(
    fragments: Sequence[layout.Fragment],
    has_second: Sequence[bool],
    units: Callable[[tuple[int, ...]], layout.Units],
) -> tuple[layout.Fragment, ...]:
    """Moments in one buffer, those that have a second one first: theirs lies at the same place of a shorter buffer."""
    order = sorted(range(len(fragments)), key=lambda i: not has_second[i])
    packed = layout.pack([fragments[i] for i in order], units)
    return tuple(moments for _, moments in sorted(zip(order, packed, strict=True), key=lambda pair: pair[0]))


def _local_moments(
    local: Sequence[int], shape: Sequence[int], packed: layout.Fragment, level: int, wavelet: str
) -> tuple[int, ...]:
    """Shape of the moments of one tensor of `shape` of which this rank holds a part of shape `local`."""
    whole = moments_shape(shape, level, wavelet)
    if whole == tuple(shape):  # level 0, or rows of one element
        return tuple(local)
    return local[0], packed.numel // local[0] if packed.numel else whole[1]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the moments of parameters of `dtype`: fp64 for fp64, fp32 for all others.

    bf16 second moments could not decay: round-to-nearest loses every small step.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32

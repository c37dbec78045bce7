"""Wavelet transforms of the last dimension, with filter taps from PyWavelets.

Every transform answers the same four questions about a matrix of units ``x_NU``, so that the update never asks
which wavelet it runs: how a row is cut into units, the approximation coefficients of a unit, the energy that
shares one denominator, and the change of the weights.

``HaarTransform`` is the closed form. Haar is orthonormal and all details of a unit are divided by the same number, so
analysis, division and synthesis collapse to "unit mean and residual" and no detail is ever computed.
``FilterBankTransform`` is the general form, with PyWavelets' mode "periodization" on rows that are padded with zeros to
a multiple of ``2**level``; its unit is the whole row.

Only single additions, multiplications, divisions and square roots are used: no fused multiply-add, no library
convolution (which may run in TF32) and no library sum (whose order depends on the size). The result for a unit is
therefore bit for bit the same wherever a shard boundary falls.

Shapes: N units, U elements of a unit, R rows, C columns, K = ceil(C / 2**level) coefficients of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

import pywt
import torch
from torch import Tensor
from torch.nn.functional import pad

from gwt_dist.units import check_level, check_wavelet, haar_unit, row_unit


class Transform(Protocol):
    """What the update asks of a wavelet at one level."""

    def unit(self, columns: int) -> tuple[int, int]:
        """Length of a unit and its number of approximation coefficients, for rows of `columns` elements."""
        ...

    def approximation(self, x_NU: Tensor) -> Tensor:
        """Approximation coefficients ``[N * coefficients of a unit]`` of `x_NU`, same dtype."""
        ...

    def energy(self, x_NU: Tensor, count_N: Tensor) -> Tensor:
        """Mean square of the real elements that share one denominator, shaped as `approximation`.

        `count_N` (one number a coefficient) counts the elements that are not padding.
        """
        ...

    def synthesis(self, x_NU: Tensor, m_N: Tensor, size_N: Tensor, gain_N: Tensor) -> Tensor:
        """Synthesis of the approximations ``m * size`` and the details ``gain * detail * size``, as `x_NU`."""
        ...


def unit_sum(x_NU: Tensor) -> Tensor:
    """Sum ``[N, U]`` over the last dimension into ``[N]``, as a tree of neighbours.

    The tree is the Haar cascade without its factors. Its order depends on nothing but the position in the unit, and
    zeros at the end do not change it: a unit that is cut short has the bits of the same unit padded to any width.
    """
    while x_NU.shape[-1] > 1:
        if x_NU.shape[-1] % 2:
            x_NU = pad(x_NU, (0, 1))
        x_NU = x_NU[..., 0::2] + x_NU[..., 1::2]
    return x_NU[..., 0]


@dataclass(frozen=True, slots=True)
class HaarTransform:
    """Haar at `level`: a unit is ``2**level`` neighbours in a row and has one coefficient."""

    level: int

    def unit(self, columns: int) -> tuple[int, int]:
        """See `Transform.unit`."""
        return haar_unit(self.level, columns)

    def approximation(self, x_NU: Tensor) -> Tensor:
        """See `Transform.approximation`."""
        return unit_sum(x_NU) * self._gain()

    def energy(self, x_NU: Tensor, count_N: Tensor) -> Tensor:
        """See `Transform.energy`."""
        return unit_sum(x_NU * x_NU) / count_N

    def synthesis(self, x_NU: Tensor, m_N: Tensor, size_N: Tensor, gain_N: Tensor) -> Tensor:
        """See `Transform.synthesis`."""
        # u = (g * (x - s*a) + s*m) / d, design: the closed form of one Haar-GWT Adam step, as x * (g / d) and what is
        # one number a unit. Units of level 0 have no details.
        mean_N = self.approximation(x_NU) * self._gain()
        detail_size_N = size_N * (gain_N if self.level else 0.0)
        rest_N = m_N * self._gain() * size_N - mean_N * detail_size_N
        return (x_NU * detail_size_N[:, None]).add_(rest_N[:, None])

    def _gain(self) -> float:
        return float(2.0 ** (-self.level / 2))


@dataclass(frozen=True, slots=True)
class FilterBankTransform:
    """Any discrete PyWavelets wavelet at `level`, mode "periodization"; a unit is one row with K coefficients."""

    bank: FilterBank
    level: int

    def unit(self, columns: int) -> tuple[int, int]:
        """See `Transform.unit`."""
        return row_unit(self.level, columns)

    def approximation(self, x_NU: Tensor) -> Tensor:
        """See `Transform.approximation`."""
        return wavedec(self._padded(x_NU), self.bank, self.level)[0].reshape(-1)

    def energy(self, x_NU: Tensor, count_N: Tensor) -> Tensor:
        """See `Transform.energy`."""
        # The tree under one approximation coefficient: by Parseval the mean square of the unit where the wavelet is
        # Haar.
        approximation, *details = wavedec(self._padded(x_NU), self.bank, self.level)
        total = approximation * approximation
        for j, detail in enumerate(details):
            total = total + unit_sum((detail * detail).unflatten(-1, (-1, 1 << j)))
        return total.reshape(-1) / count_N

    def synthesis(self, x_NU: Tensor, m_N: Tensor, size_N: Tensor, gain_N: Tensor) -> Tensor:
        """See `Transform.synthesis`."""
        _, *details = wavedec(self._padded(x_NU), self.bank, self.level)
        rows = x_NU.shape[0]
        scaled = [(m_N * size_N).view(rows, -1)]
        for j, detail in enumerate(details):
            scaled.append(detail * (size_N * gain_N).view(rows, -1).repeat_interleave(1 << j, dim=-1))
        return waverec(scaled, self.bank)[:, : x_NU.shape[1]].contiguous()

    def _padded(self, x_NU: Tensor) -> Tensor:
        return pad(x_NU, (0, -x_NU.shape[-1] % (1 << self.level)))


@dataclass(frozen=True, slots=True)
class FilterBank:
    """Taps of one discrete wavelet, named as in PyWavelets: decomposition and reconstruction, low and high pass."""

    dec_lo: tuple[float, ...]
    dec_hi: tuple[float, ...]
    rec_lo: tuple[float, ...]
    rec_hi: tuple[float, ...]


@cache
def filter_bank(wavelet: str) -> FilterBank:
    """The filter bank of a discrete PyWavelets wavelet.

    Raises `ValueError` for a name that PyWavelets does not know as a discrete wavelet.
    """
    check_wavelet(wavelet)
    w = pywt.Wavelet(wavelet)
    return FilterBank(tuple(w.dec_lo), tuple(w.dec_hi), tuple(w.rec_lo), tuple(w.rec_hi))


@lru_cache(maxsize=None, typed=True)  # True is not 1 here
def transform(wavelet: str, level: int) -> Transform:
    """The transform of `wavelet` at `level` (0 to 16); level 0 is the identity, with units of one element.

    Raises `ValueError` for an unknown wavelet or a level out of range.
    """
    check_level(level)
    bank = filter_bank(wavelet)
    if level == 0 or len(bank.dec_lo) == 2:  # haar has other names: db1, bior1.1, rbio1.1
        return HaarTransform(level)
    return FilterBankTransform(bank, level)


def wavedec(x: Tensor, bank: FilterBank, level: int) -> list[Tensor]:
    """``pywt.wavedec(x, mode="periodization")`` along the last dimension, whose length 2**level must divide.

    Returns ``[cA_L, cD_L, ..., cD_1]``, each ``[..., length / 2**j]``.
    """
    details: list[Tensor] = []
    for _ in range(level):
        x, detail = _dwt(x, bank.dec_lo), _dwt(x, bank.dec_hi)
        details.append(detail)
    return [x, *reversed(details)]


def waverec(coefficients: list[Tensor], bank: FilterBank) -> Tensor:
    """Inverse of `wavedec`: ``[cA_L, cD_L, ..., cD_1]`` to ``[..., length]``."""
    x, *details = coefficients
    for detail in details:
        x = _idwt(x, bank.rec_lo) + _idwt(detail, bank.rec_hi)
    return x


def _dwt(x: Tensor, taps: tuple[float, ...]) -> Tensor:
    """``y[k] = sum_j taps[j] * x[(2k + F/2 - j) mod n]`` with F taps on n elements."""
    n = x.shape[-1]
    even = torch.arange(0, n, 2, device=x.device) + len(taps) // 2
    y = torch.zeros_like(x[..., 0::2])
    for j, tap in enumerate(taps):
        y += x.index_select(-1, (even - j) % n) * tap
    return y


def _idwt(y: Tensor, taps: tuple[float, ...]) -> Tensor:
    """``x[(2k + j - F/2 + 1) mod n] += taps[j] * y[k]`` with F taps on n = 2 * len(y) elements."""
    n = 2 * y.shape[-1]
    even = torch.arange(0, n, 2, device=y.device) - len(taps) // 2 + 1
    x = y.new_zeros((*y.shape[:-1], n))
    for j, tap in enumerate(taps):
        # Indices are distinct within one tap, so the addition has one order.
        x.index_add_(-1, (even + j) % n, y * tap)
    return x

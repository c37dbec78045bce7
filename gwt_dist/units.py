"""How rows are cut into units, by shape, level and wavelet: integers that need neither torch nor a transform.

One place for the optimizer (through `wavelet`) and for plans, which are made before torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from math import prod

from gwt_dist import layout
from gwt_dist.layout import Fragment, Units

MAX_LEVEL = 16


def check_level(level: int) -> None:
    """Raise `ValueError` for a level out of range."""
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= MAX_LEVEL:
        raise ValueError(f"level={level!r} must be a whole number from 0 (AdamW) to {MAX_LEVEL}")


def haar_unit(level: int, columns: int) -> tuple[int, int]:
    """Length of a Haar unit and its number of coefficients, for rows of `columns` elements."""
    # A unit longer than the row would hold nothing but padding beyond it.
    return max(1, min(1 << level, columns)), 1


def row_unit(level: int, columns: int) -> tuple[int, int]:
    """The same for any other wavelet, whose unit is the whole row."""
    return max(1, columns), -(-columns // (1 << level))


def level_of(shape: Sequence[int], level: int) -> int:
    """Scalars and 1-D tensors are level 0 whatever their group says."""
    return level if len(shape) >= 2 else 0


def takes(shape: Sequence[int], level: int, least_level: int) -> bool:
    """Whether a program for matrices of `least_level` or more steps a tensor of `shape` in a group of `level`."""
    return len(shape) >= 2 and level >= least_level


@lru_cache(maxsize=4096)
def units_of(shape: tuple[int, ...], level: int, wavelet: str, cell: int = 1) -> Units:
    """The units of a tensor of `shape` in a group of `level`, `cell` coefficients of which are kept together.

    Raises `ValueError` for a level out of range or an unknown wavelet.
    """
    check_level(level)
    level, columns = level_of(shape, level), layout.columns_of(shape)
    unit = haar_unit if level == 0 or _two_taps(wavelet) else row_unit
    return Units(columns, *unit(level, columns), cell)


def coefficients(shape: tuple[int, ...], level: int, wavelet: str) -> int:
    """Approximation coefficients of a whole tensor."""
    return units_of(shape, level, wavelet).moments(Fragment("", shape, 0, prod(shape))).numel


def check_wavelet(wavelet: str) -> None:
    """Raise `ValueError` for a name that PyWavelets does not know as a discrete wavelet."""
    if wavelet == "haar":
        return
    import pywt

    if wavelet not in pywt.wavelist(kind="discrete"):
        raise ValueError(
            f"wavelet={wavelet!r} is not a discrete wavelet of PyWavelets {pywt.__version__}; "
            f"write one of pywt.wavelist(kind='discrete'), for example 'haar', 'db2', 'sym4' or 'bior2.2'"
        )


def check_haar(wavelet: str, why: str) -> None:
    """Raise `ValueError`, saying why, for every other wavelet."""
    check_wavelet(wavelet)
    if not _two_taps(wavelet):
        raise ValueError(f"wavelet={wavelet!r} must be 'haar': {why}")


@cache
def _two_taps(wavelet: str) -> bool:
    """Whether a wavelet is Haar, which has other names: db1, bior1.1, rbio1.1."""
    check_wavelet(wavelet)
    if wavelet == "haar":
        return True
    import pywt

    return int(pywt.Wavelet(wavelet).dec_len) == 2

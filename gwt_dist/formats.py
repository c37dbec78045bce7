"""How one number of a state tensor is stored: its bytes, and how many neighbours share a scale. Knows no torch.

The mathematics of a format is in `formulas.codecs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CELL = 64  # neighbouring coefficients of a row that share a scale


@dataclass(frozen=True, slots=True)
class Format:
    """A format by its name in `FORMATS`."""

    bytes: int  # of a number
    stored: str  # of safetensors' names of dtypes
    cell: int = 1  # numbers that are stored together: they share a scale where there are more than one

    @property
    def scaled(self) -> bool:
        """Whether cells have a scale, which is a field of its own."""
        return self.cell > 1


FP32 = "fp32"  # fp64 for fp64 parameters
FORMATS: Mapping[str, Format] = {
    FP32: Format(4, "F32"),
    "bf16": Format(2, "BF16"),
    "int8": Format(1, "I8", CELL),  # signed, denser near 0 than near the largest of the cell
    "e4m4": Format(1, "U8", CELL),  # not negative: 4 bits of exponent below that of the largest, 4 of mantissa
}

# What `state_dtype` makes of a field over coefficients: its format if it has a sign, and if it has none.
STATE_DTYPES: Mapping[str, tuple[str, str]] = {
    FP32: (FP32, FP32),
    "bf16": ("bf16", "bf16"),
    "int8": ("int8", "e4m4"),
}


def scale_of(name: str) -> str:
    """The name of the field that has the scales of field `name`."""
    return f"{name}_scale"

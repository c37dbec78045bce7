"""Names of dtypes in an index and in safetensors."""

from __future__ import annotations

import torch

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C128": torch.complex128,
    "C64": torch.complex64,
    "C32": torch.complex32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
# Not in every torch that this package runs with.
_DTYPES |= {
    name: getattr(torch, dtype)
    for name, dtype in {"F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2"}.items()
    if hasattr(torch, dtype)
}
# What a safetensors file says of elements that it does not know, or counts in another way: its own name, and how many
# of those make up one of ours.
_IN_FILES = {"C128": ("U8", 16), "C32": ("U8", 4), "F4": ("F4", 2)}


def safetensors_dtype(dtype: torch.dtype, name: str) -> str:
    """What an index calls it; raises `ValueError`, with the `name` of the tensor, if checkpoints do not hold it."""
    if dtype not in _DTYPES.values():
        raise ValueError(
            f"{name!r} is {dtype}, which checkpoints do not hold: they hold "
            f"{', '.join(str(one).removeprefix('torch.') for one in _DTYPES.values())}. Store it as one of these, or "
            f"leave it out of the save with exclude="
        )
    return name_of(dtype)


def name_of(dtype: torch.dtype) -> str:
    """As `safetensors_dtype`, and torch's name for all others."""
    return next((known for known, one in _DTYPES.items() if one == dtype), str(dtype).removeprefix("torch."))


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name in an index; raises `ValueError` for one that this torch does not have."""
    if name not in _DTYPES:
        raise ValueError(
            f"torch {torch.__version__} has no dtype {name}, of which a tensor is; load it with a newer one"
        )
    return _DTYPES[name]


def in_files(name: str) -> tuple[str, int]:
    """The name of a dtype in the header of a safetensors file, and how many of its elements one of ours takes."""
    return _IN_FILES.get(name, (name, 1))

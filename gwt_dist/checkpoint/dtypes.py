"""Names of dtypes in safetensors."""

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
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def safetensors_dtype(dtype: torch.dtype) -> str:
    """Its name in safetensors; raises `ValueError` for a dtype that checkpoints do not hold."""
    names = {torch_dtype(name): name for name in _DTYPES}
    if dtype not in names:
        raise ValueError(f"checkpoints hold {', '.join(_DTYPES)}, and a tensor has {dtype}")
    return names[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name of safetensors."""
    return _DTYPES[name]

"""Small tensors and arrays as JSON: dtype, shape and bytes. All functions raise `ValueError` for what they refuse."""

from __future__ import annotations

import base64
import re
import sys
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor

LARGEST = 1 << 20  # bytes of one value: every rank parses all of the index
_DIMENSIONS, _ELEMENTS = 64, 1 << 56  # of a shape, without the zeros in it: what multiplies strides must not overflow
_TENSOR = re.compile(r"(float(8|16|32|64)|bfloat16|complex|u?int(8|16|32|64)|bool)[a-z0-9_]*")
_NUMPY = re.compile(r"[<>|]([biufc][1-9][0-9]?|[SU][1-9][0-9]{0,6}|[mM]8(\[[0-9]*[A-Za-z]+\])?)")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DTYPES = {_name(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def refuse(what: str) -> NoReturn:
    """Raise `ValueError`."""
    raise ValueError(what)


def of(kind: type, value: Any) -> Any:
    """`value`, which must be of exactly this type."""
    if type(value) is not kind:
        refuse(f"a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def encode_bytes(data: bytes | bytearray) -> str:
    """Base64."""
    _check_size(len(data))
    return base64.b64encode(data).decode()


def decode_bytes(text: Any) -> bytes:
    """The way back."""
    return base64.b64decode(of(str, text), validate=True)


def encode_tensor(value: Tensor) -> dict[str, Any]:
    """A dense tensor of any dtype of whole bytes, on any device."""
    if value.requires_grad:
        refuse("is a tensor that requires a gradient (detach it)")
    if type(value) is not Tensor or value.layout is not torch.strided or value.is_meta:
        refuse(f"is a {type(value).__name__} of layout {value.layout} on {value.device}")
    if not _TENSOR.fullmatch(_name(value.dtype)):
        refuse(f"is a tensor of {value.dtype}")
    length = value.numel() * value.element_size()
    _check_size(length)
    flat = value.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    text = encode_bytes(bytes(flat.view(torch.uint8).tolist()) if length else b"")
    return {"dtype": _name(value.dtype), "shape": list(value.shape), "data": text}


def decode_tensor(value: Any) -> Tensor:
    """The way back, on the CPU."""
    name, shape, data = _parts(value)
    if not _TENSOR.fullmatch(name):
        refuse(f"a dtype {name[:40]!r}")
    dtype = DTYPES[name]
    _check_length(shape, dtype.itemsize, data, dtype is torch.bool)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def is_numpy(value: object) -> str:
    """``"ndarray"`` or ``"generic"`` for an array or a number of NumPy's own, else empty."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray | numpy.generic):
        return ""
    if isinstance(value, numpy.ndarray):
        return "ndarray" if type(value) is numpy.ndarray else ""
    # `longlong` and `int64` are of one dtype, and two types.
    known = _NUMPY.fullmatch(value.dtype.str) and type(value) is numpy.dtype(value.dtype.str).type
    return "generic" if known else ""


def encode_array(value: Any) -> dict[str, Any]:
    """An array or number of NumPy's own."""
    if not _NUMPY.fullmatch(value.dtype.str) or value.dtype.names is not None:
        refuse(f"is a {type(value).__name__} of dtype {value.dtype}")
    _check_size(value.nbytes)
    return {"dtype": value.dtype.str, "shape": list(value.shape), "data": encode_bytes(value.tobytes())}


def decode_array(value: Any) -> Any:
    """The way back, as an array."""
    import numpy

    name, shape, data = _parts(value)
    if not _NUMPY.fullmatch(name):
        refuse(f"a dtype {name[:40]!r}")
    dtype = numpy.dtype(name)
    _check_length(shape, dtype.itemsize, data, dtype.kind == "b")
    return numpy.ndarray(shape, dtype, bytearray(data)) if data else numpy.empty(shape, dtype)


def check_shape(sizes: list[Any]) -> tuple[int, ...]:
    """A shape that a tensor can have."""
    whole = all(type(size) is int and size >= 0 for size in sizes)
    if not whole or len(sizes) > _DIMENSIONS or prod(size or 1 for size in sizes) > _ELEMENTS:
        refuse(f"a shape {str(sizes)[:100]}")
    return tuple(sizes)


def _check_size(length: int) -> None:
    if length > LARGEST:
        refuse(
            f"has {length:,} bytes, more than the {LARGEST:,} that the index takes of one value (a buffer of the "
            f"model, register_buffer, is stored beside the weights, of any size)"
        )


def _parts(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    if of(dict, value).keys() != {"dtype", "shape", "data"}:
        refuse("other keys than dtype, shape and data")
    return of(str, value["dtype"]), check_shape(of(list, value["shape"])), decode_bytes(value["data"])


def _check_length(shape: tuple[int, ...], item: int, data: bytes, is_bool: bool) -> None:
    if prod(shape) * item != len(data):
        refuse(f"{len(data)} bytes for the shape {shape}")
    if is_bool and data.strip(b"\0\1"):
        refuse("a bool that is neither 0 nor 1")

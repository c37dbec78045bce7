"""Python values as JSON that reads back equal, types included; what cannot be is an error that names where it is.

What JSON has stays what it is. Everything else is an object with two keys, `{"$": "tuple", "value": [1, 2]}`, and so
is a mapping that has a key `$` itself. Types are compared exactly: a subclass would come back as its base. Reading
calls no constructor but those named here. Tensors come back on the CPU.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from math import inf, isfinite, nan
from typing import Any

import torch
from torch import Tensor

from gwt_dist.checkpoint.arrays import (
    DTYPES,
    check_shape,
    decode_array,
    decode_bytes,
    decode_tensor,
    encode_array,
    encode_bytes,
    encode_tensor,
    is_numpy,
    of,
    refuse,
)
from gwt_dist.checkpoint.errors import CheckpointError

TAG = "$"
DEEPEST = 100  # values within values
_BITS = 4096  # of an integer; Python reads no decimals that are much longer

_MAPPINGS: dict[str, Any] = {"dict": dict, "Counter": Counter, "OrderedDict": OrderedDict}
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "torch.Size": torch.Size}
_SETS: dict[str, Any] = {"set": set, "frozenset": frozenset}
_BYTES: dict[str, Any] = {"bytes": bytes, "bytearray": bytearray}
_NAMES = {kind: name for kinds in (_MAPPINGS, _SEQUENCES, _SETS, _BYTES) for name, kind in kinds.items()}
_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (int, float, str, bool, list, tuple, dict, set)}
_FLOATS = {"inf": inf, "-inf": -inf, "nan": nan}


def encode(value: Any, path: str) -> Any:
    """What `json` can write of `value`; `path` is what it is called in messages.

    Raises `CheckpointError` for what would not read back as it is, naming its keys: ``extra['data']['seed']``.
    """
    return _Writer().any(value, path, 0)


def decode(value: Any, path: str) -> Any:
    """The value of which `encode` made `value`; raises `CheckpointError` for anything that it does not make."""
    return _Reader().any(value, path, 0)


def _at(path: str, key: object) -> str:
    shown = repr(key)
    return f"{path}[{shown if len(shown) <= 80 else shown[:80] + '...'}]"


def _is_text(value: object) -> bool:
    """Whether it is text that UTF-8 can hold: JSON would join two halves of a surrogate pair."""
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Writer:
    def any(self, value: Any, path: str, depth: int) -> Any:
        """A value, `depth` values deep."""
        try:
            return self.plain(value, path, depth)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(
                f"{path} {error}, and a checkpoint could not give it back as it is. It holds None, bool, int, float, "
                f"complex, str, bytes, lists, tuples, sets, mappings, and small tensors and arrays, of exactly these "
                f"types: make it one of them, or leave it out"
            ) from None

    def plain(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if depth > DEEPEST:
            refuse(f"lies within {DEEPEST} values or within itself")
        if kind is int and value.bit_length() > _BITS:
            refuse(f"is an integer of {value.bit_length()} bits, more than {_BITS}")
        if value is None or kind in (bool, int) or _is_text(value) or (kind is float and isfinite(value)):
            return value
        if kind is list:
            return self.items(value, path, depth)
        if kind is dict and TAG not in value and all(map(_is_text, value)):
            return {key: self.any(one, _at(path, key), depth + 1) for key, one in value.items()}
        name, content = self.tagged(value, kind, path, depth)
        return {TAG: name, "value": content}

    def tagged(self, value: Any, kind: type, path: str, depth: int) -> tuple[str, Any]:
        name = _NAMES.get(kind, "")
        if name in _MAPPINGS:
            return name, self.pairs(value, path, depth)
        if name in _SEQUENCES:
            return name, self.items(value, path, depth)
        if name in _SETS:
            inside = [self.any(one, f"an element of {path}", depth + 1) for one in value]
            return name, sorted(inside, key=json.dumps)
        if name in _BYTES:
            return name, encode_bytes(value)
        if kind is float:
            return "float", str(value)
        if kind is str:
            return "str", [ord(letter) for letter in value]
        if kind is complex:
            return "complex", self.items([value.real, value.imag], path, depth)
        if kind is deque:
            return "deque", [value.maxlen, self.items(value, path, depth)]
        if kind is defaultdict:
            factory = next((key for key, made in _FACTORIES.items() if value.default_factory is made), None)
            if value.default_factory is not None and factory is None:
                refuse(f"is a defaultdict that calls {value.default_factory!r}")
            return "defaultdict", [factory, self.pairs(value, path, depth)]
        if kind is torch.dtype:
            return "torch.dtype", str(value).removeprefix("torch.")
        if kind is torch.device:
            return "torch.device", str(value)
        if isinstance(value, Tensor):
            return "torch.Tensor", encode_tensor(value)
        if name := is_numpy(value):
            return f"numpy.{name}", encode_array(value)
        refuse(f"is a {kind.__module__}.{kind.__qualname__}")

    def items(self, values: Iterable[Any], path: str, depth: int) -> list[Any]:
        return [self.any(one, f"{path}[{i}]", depth + 1) for i, one in enumerate(values)]

    def pairs(self, values: Mapping[Any, Any], path: str, depth: int) -> list[Any]:
        return [
            [self.any(key, f"a key of {path}", depth + 1), self.any(one, _at(path, key), depth + 1)]
            for key, one in values.items()
        ]


class _Reader:
    def any(self, value: Any, path: str, depth: int) -> Any:
        """What JSON has at this place, `depth` values deep."""
        if depth > DEEPEST:
            raise CheckpointError(f"{path[:300]} lies within {DEEPEST} values")
        if type(value) is list:
            return [self.any(one, f"{path}[{i}]", depth + 1) for i, one in enumerate(value)]
        if type(value) is not dict:
            return value
        if TAG not in value:
            return {key: self.any(one, _at(path, key), depth + 1) for key, one in value.items()}
        name = value[TAG]
        try:
            if value.keys() != {TAG, "value"} or of(str, name) not in _READERS:
                refuse("it was written by a newer gwt_dist, or is damaged")
            return _READERS[name](self, name, value["value"], path, depth + 1)
        except CheckpointError:
            raise
        except Exception as error:  # constructors of torch and NumPy raise what they like
            raise CheckpointError(f"{path[:300]} is no {str(name)[:40]!r}: {str(error)[:200]}") from None

    def mapping(self, name: str, value: Any, path: str, depth: int) -> Any:
        return _MAPPINGS[name](self.pairs(value, path, depth))

    def pairs(self, value: Any, path: str, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for i, pair in enumerate(of(list, value)):
            key, one = of(list, pair)
            key = self.any(key, f"{path} (key {i})", depth)
            if key in found:
                refuse("a key twice")
            found[key] = self.any(one, _at(path, key), depth)
        return found

    def items(self, value: Any, path: str, depth: int) -> list[Any]:
        return [self.any(one, f"{path}[{i}]", depth) for i, one in enumerate(of(list, value))]

    def sequence(self, name: str, value: Any, path: str, depth: int) -> Any:
        found = self.items(value, path, depth)
        return tuple(found) if name == "tuple" else torch.Size(check_shape(found))

    def set(self, name: str, value: Any, path: str, depth: int) -> Any:
        found = self.items(value, path, depth)
        made = _SETS[name](found)
        return made if len(made) == len(found) else refuse("an element twice")

    def bytes(self, name: str, value: Any, path: str, depth: int) -> Any:
        return _BYTES[name](decode_bytes(value))

    def float(self, name: str, value: Any, path: str, depth: int) -> Any:
        return _FLOATS[of(str, value)]

    def text(self, name: str, value: Any, path: str, depth: int) -> str:
        return "".join(chr(of(int, one)) for one in of(list, value))

    def complex(self, name: str, value: Any, path: str, depth: int) -> Any:
        real, imaginary = self.items(value, path, depth)
        return complex(of(float, real), of(float, imaginary))

    def deque(self, name: str, value: Any, path: str, depth: int) -> Any:
        longest, inside = of(list, value)
        found = self.items(inside, path, depth)
        if longest is not None and of(int, longest) < len(found):
            refuse(f"{len(found)} elements in one of {longest}")
        return deque(found, longest)

    def defaultdict(self, name: str, value: Any, path: str, depth: int) -> Any:
        factory, pairs = of(list, value)
        return defaultdict(None if factory is None else _FACTORIES[of(str, factory)], self.pairs(pairs, path, depth))

    def dtype(self, name: str, value: Any, path: str, depth: int) -> Any:
        return DTYPES[of(str, value)]

    def device(self, name: str, value: Any, path: str, depth: int) -> Any:
        return torch.device(of(str, value))

    def tensor(self, name: str, value: Any, path: str, depth: int) -> Tensor:
        return decode_tensor(value)

    def array(self, name: str, value: Any, path: str, depth: int) -> Any:
        found = decode_array(value)
        if name == "numpy.generic" and found.shape:
            refuse(f"a number of shape {found.shape}")
        return found if name == "numpy.ndarray" else found[()]


_READERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_MAPPINGS, _Reader.mapping),
    **dict.fromkeys(_SEQUENCES, _Reader.sequence),
    **dict.fromkeys(_SETS, _Reader.set),
    **dict.fromkeys(_BYTES, _Reader.bytes),
    "float": _Reader.float,
    "str": _Reader.text,
    "complex": _Reader.complex,
    "deque": _Reader.deque,
    "defaultdict": _Reader.defaultdict,
    "torch.dtype": _Reader.dtype,
    "torch.device": _Reader.device,
    "torch.Tensor": _Reader.tensor,
    "numpy.ndarray": _Reader.array,
    "numpy.generic": _Reader.array,
}

"""Values of an index: what is written reads back equal, types included, or is refused with its keys."""

from __future__ import annotations

import enum
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gwt_dist
from gwt_dist import CheckpointError
from gwt_dist.checkpoint import values
from gwt_dist.checkpoint.values import decode, encode


def same(a: Any, b: Any) -> bool:
    """Equal, with everything within of the same type, to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
        return False
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, dict):
        return (
            list(map(type, a)) == list(map(type, b))
            and same(list(a), list(b))
            and same(list(a.values()), list(b.values()))
        )
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _bytes(tensor: Tensor) -> list[int]:
    return tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def there_and_back(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value, "extra"), allow_nan=False)), "extra")


VALUES: dict[str, Any] = {
    "plain": {"a": [1, 2.5, None, True, -0.0, 1e308, 5e-324], "": {}, "ä": [[], {}, "text"]},
    "tuple": (1, (2, [3, ()])),
    "keys": {1: (2, 3), None: 1, (1, 2): 2, 2.5: 3, True and "x": 4},
    "boolean key": {True: 1},
    "tag": {"$": 1, "value": {"$": "tuple", "value": []}},
    "milestones": Counter({3: 1, 5: 2}),
    "ordered": OrderedDict([("b", 1), ("a", {1: 2})]),
    "default": defaultdict(list, {"a": [1], 2: ()}),
    "default without": defaultdict(None, {"a": 1}),
    "deque": deque([1, (2,)], maxlen=5),
    "endless deque": deque(),
    "sets": [{1, 2, "a"}, frozenset({(1, 2), None}), set()],
    "floats": [math.inf, -math.inf, math.nan],
    "bytes": [b"", bytes(range(256)), bytearray(b"abc")],
    "complex": [1 + 2j, complex(math.inf, -0.0)],
    "large": [10**400, -(1 << 128)],
    "halves": ["\ud83d\ude00", "\ud800", {"\ud800": 1}],
    "Python's random state": __import__("random").Random(3).getstate(),
    "NumPy's random state": np.random.RandomState(3).get_state(),
    "NumPy's generator": np.random.default_rng(3).bit_generator.state,
    "torch": [torch.Size([2, 3]), torch.float8_e4m3fn, torch.device("cuda:1"), torch.device("cpu")],
    "rates": [torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), torch.tensor(7)],
    "tensors": [torch.empty(0, 3), torch.arange(6).view(2, 3).t(), torch.tensor([True, False]), torch.ones(()).bool()],
    "conjugated": torch.tensor([1 + 2j, 3j]).conj(),
    "slice of a large one": torch.arange(1 << 20)[5:7],
    "numbers of NumPy": [
        np.float64(0.1),
        np.float32("inf"),
        np.int64(3),
        np.bool_(True),
        np.str_("ä"),
        np.bytes_(b"a"),
    ],
    "dates": [np.datetime64("2026-01-02"), np.timedelta64(3, "ms")],
    "arrays": [np.arange(6, dtype=">i2").reshape(2, 3), np.zeros((0, 2)), np.array(1.5), np.array(["a", "bcd"])],
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_written_reads_back(name) -> None:
    assert same(there_and_back(VALUES[name]), VALUES[name])


@pytest.mark.parametrize("dtype", sorted(str(d) for d in vars(torch).values() if isinstance(d, torch.dtype)))
def test_tensors_of_every_dtype(dtype) -> None:
    """Every dtype that torch has: its bits come back, or it is refused."""
    kind = getattr(torch, dtype.removeprefix("torch."))
    try:
        tensor = torch.tensor([0, 1, 1, 0] * 8, dtype=torch.uint8).view(kind)
    except (RuntimeError, TypeError):
        return  # no tensor of it can be made of bytes
    try:
        written = encode({"rate": tensor}, "extra")
    except CheckpointError as error:
        assert str(error).startswith("extra['rate'] is a tensor of torch.")
        assert kind.is_floating_point is False or "float4" in dtype
    else:
        assert same(decode(written, "extra"), {"rate": tensor})


texts = st.text(max_size=5) | st.sampled_from(["$", "value", "tuple", "\ud83d", "\ude00"])
keys = texts | st.integers() | st.booleans() | st.none() | st.tuples(texts, st.integers())
leaves = keys | st.floats() | st.binary(max_size=9) | st.complex_numbers()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(texts, inner, max_size=3)
        | st.sets(keys, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(trees)
def test_any_value(value) -> None:
    assert same(there_and_back(value), value)


class Kind(enum.IntEnum):
    ONE = 1


class Text(str):
    pass


class Mapping(dict):
    pass


Point = namedtuple("Point", "x y")
ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)

REFUSED: dict[str, tuple[Any, str]] = {
    "object": (object(), "is a builtins.object, and a checkpoint could not give it back as it is. It holds None"),
    "enumeration": (Kind.ONE, "is a test_values.Kind"),
    "subclass of text": (Text("a"), "is a test_values.Text"),
    "subclass of dict": (Mapping(a=1), "is a test_values.Mapping"),
    "named tuple": (Point(1, 2), "is a test_values.Point"),
    "function": (same, "is a builtins.function"),
    "class": (int, "is a builtins.type"),
    "factory": (defaultdict(lambda: 1), "is a defaultdict that calls <function"),
    "parameter": (nn.Parameter(torch.ones(2), requires_grad=False), "is a Parameter of layout torch.strided on cpu"),
    "graph": (torch.ones(2, requires_grad=True) * 2, r"requires a gradient \(detach it\)"),
    "sparse": (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
    "meta": (torch.empty(2, device="meta"), "on meta"),
    "large tensor": (torch.ones(1 << 19), r"has 2,097,152 bytes, more than the 1,048,576 .* register_buffer"),
    "large array": (np.ones(1 << 18), "has 2,097,152 bytes"),
    "large bytes": (bytes(2 << 20), "has 2,097,152 bytes"),
    "objects": (np.array([object()]), "is a ndarray of dtype object"),
    "records": (np.zeros(2, dtype=[("a", "i4")]), "of dtype"),
    "matrix": (np.ma.ones(2), "is a numpy.ma.MaskedArray|is a numpy.ma.core.MaskedArray"),
    "itself": (ENDLESS, "lies within 100 values or within itself"),
    "very large number": (1 << 5000, "is an integer of 5001 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_come_back_is_refused(case) -> None:
    value, message = REFUSED[case]
    for holder, path in (
        (lambda v: {"data": {"seed": v}}, r"extra\['data'\]\['seed'\]"),
        (lambda v: (1, v), r"extra\[1\]"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            encode(holder(value), "extra")
        if case != "itself":
            assert caught.match(f"^{path} ")


def test_keys_and_elements_are_named_too() -> None:
    with pytest.raises(CheckpointError, match=r"^a key of extra\['a'\] is a test_values.Kind"):
        encode({"a": {Kind.ONE: 2}}, "extra")
    with pytest.raises(CheckpointError, match=r"^an element of extra is a test_values.Kind"):
        encode({Kind.ONE}, "extra")
    with pytest.raises(CheckpointError, match=r"^extra\[3\] is a builtins.object"):
        encode({3: object()}, "extra")


def test_plain_values_are_plain_json() -> None:
    """As they were before values had types, so that other readers of an index find them."""
    assert encode(VALUES["plain"], "extra") == VALUES["plain"]
    assert encode({1: (2, 3)}, "extra") == {"$": "dict", "value": [[1, {"$": "tuple", "value": [2, 3]}]]}


def test_extra_of_a_checkpoint(tmp_path) -> None:
    """All at once through the files, and what is refused leaves nothing behind."""
    model = nn.Linear(2, 2)
    optimizer = gwt_dist.GWTAdamW(model.parameters(), level=0)
    gwt_dist.save(tmp_path, model, optimizer, step=0, extra=VALUES)
    assert same(gwt_dist.load(tmp_path, model, optimizer).extra, VALUES)
    with pytest.raises(CheckpointError, match=r"extra\['data'\]\['seed'\] is a builtins.object"):
        gwt_dist.save(tmp_path, model, optimizer, step=1, extra={"data": {"seed": object()}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000000"]


def test_deepest(monkeypatch) -> None:
    value: Any = 1
    for _ in range(values.DEEPEST):
        value = (value,)
    assert same(there_and_back(value), value)

"""Damaged and forged checkpoints, made at random: what reads them refuses them with the project's own errors, allocates
no more than files and index have room for, opens nothing outside of the folder and changes nothing.

    GWT_FUZZ_EXAMPLES=20000 GWT_FAULTS_FLIPS=1000 python -m pytest tests/test_fuzz_checkpoints.py
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import resource
from collections import Counter, deque
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gwt_dist
from checkpoint_cases import BEFORE, Trained, steps
from gwt_dist import CheckpointError, GWTAdamW, LayoutError, dtensor, param_groups
from gwt_dist.cli.app import main

EXAMPLES = int(os.environ.get("GWT_FUZZ_EXAMPLES", "150"))
FLIPS = int(os.environ.get("GWT_FAULTS_FLIPS", "40"))
ROOM = 256 << 20  # bytes that a load or an inspect may map; the checkpoint has a few thousand
STEP, DATA = "step-00000001", "rank-00000.safetensors"

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="GWT_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


class Saved:
    """A small run and its checkpoint, which is put back before each example."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run"
        self.folder = self.path / STEP
        (folder / "outside.safetensors").write_bytes(b"outside")
        self.build()
        extra = {
            "seen": [1, 2.5],
            "place": (1, inf, {2: b"a"}),
            "of": [Counter("ab"), deque([1], 2), {1}, torch.ones(2)],
        }
        gwt_dist.save(self.path, self.model, self.optimizer, step=1, scheduler=self.scheduler, extra=extra)
        self.train()  # what is here is not what is there
        self.files = {path: path.read_bytes() for path in (self.path / "latest", *self.folder.iterdir())}
        self.index: dict[str, Any] = json.loads(self.files[self.folder / "index.json"])
        third = version_3(self.index)
        self.indexes = self.index, third, version_2(third), version_1(version_2(third))

    def build(self) -> None:
        self.model = nn.ModuleDict({"attn": nn.Linear(6, 5), "mlp": nn.Linear(5, 9, bias=False)})
        self.optimizer = GWTAdamW(param_groups(self.model, level=1), lr=0.1, recipe="paper")
        self.optimizer.param_groups[0]["mine"] = torch.tensor(0.5)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.train()

    def train(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        self.optimizer.step()
        self.scheduler.step()

    def restore(self) -> None:
        for path in self.folder.iterdir():
            if path not in self.files:
                path.unlink()
        for path, content in self.files.items():
            if path.is_symlink() or not path.exists() or path.read_bytes() != content:
                path.unlink(missing_ok=True)
                path.write_bytes(content)

    def forge(self, text: bytes) -> None:
        """An index with checksums that are right."""
        sha256 = hashlib.sha256(text).hexdigest()
        (self.folder / "index.json").write_bytes(text)
        (self.folder / "index.json.sha256").write_text(f"{sha256}  index.json\n")
        (self.path / "latest").write_text(f"{sha256}  {STEP}/index.json\n")

    def content(self) -> list[Any]:
        """Everything that a load changes."""
        states = [value.clone() for state in self.optimizer.state.values() for value in state.values()]
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        weights = [tensor.clone() for tensor in self.model.state_dict().values()]
        rng = (random.getstate(), torch.get_rng_state())
        return [weights, states, repr(groups), repr(self.scheduler.state_dict()), rng]


def version_3(index: dict[str, Any]) -> dict[str, Any]:
    """What was written of the same checkpoint before fields had formats."""
    index = json.loads(json.dumps(index)) | {"version": 3}
    for entry in index["tensors"].values():
        for field in entry["fields"].values():
            del field["format"]
    return index


def version_2(index: dict[str, Any]) -> dict[str, Any]:
    """What was written of the same checkpoint before values had types."""
    index = json.loads(json.dumps(index)) | {"version": 2, "extra": {"seen": [1, 2.5]}}
    del index["engine_schedule"], index["excluded"], index["tied"]
    return index | {"scheduler": index["scheduler"]["state"]}


def version_1(index: dict[str, Any]) -> dict[str, Any]:
    """What was written of the same checkpoint before state had fields."""
    index = json.loads(json.dumps(index)) | {"version": 1}
    for entry in index["tensors"].values():
        del entry["fields"]
        entry["limited_norm"] = entry.pop("numbers").get("limited_norm")
    return index


_current: list[Saved] = []


def saved() -> Saved:
    """The run that the examples are tried on."""
    return _current[-1]


@pytest.fixture(autouse=True, scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    _current[:] = [Saved(tmp_path_factory.mktemp("fuzz"))]
    yield
    _current.clear()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """No more than `ROOM` is mapped, and nothing is opened by a path of the checkpoint that is not in it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    opened: list[str] = []
    real = os.open

    def record(path: Any, *arguments: Any, **keywords: Any) -> int:
        descriptor = real(path, *arguments, **keywords)
        opened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return descriptor

    os.open = record  # type: ignore[assignment]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        os.open = real
    outside = [path for path in opened if not path.startswith(str(folder.resolve()))]
    assert not outside, f"opened outside of the checkpoint: {outside}"


def load(here: Saved) -> str | None:
    """The error of a load, or None; a refused load has changed nothing and the error is one of ours."""
    before = here.content()
    try:
        with guarded(here.path):
            gwt_dist.load(here.path, here.model, here.optimizer, scheduler=here.scheduler)
    except CheckpointError as error:
        # `each` makes a CheckpointError of whatever a rank raises; what it was is the cause.
        found = error.__cause__ or error
        ours = isinstance(found, CheckpointError | LayoutError) or type(found) is ValueError
        assert ours, f"{found!r} is none of ours"
        assert same(before, here.content()), f"half of it was loaded: {error}"
        assert "something changed meanwhile" not in str(error)
        assert len(str(error)) < 2100
        return str(error)
    return None


def inspected(here: Saved, *options: str) -> tuple[int, str]:
    """Exit code and output of ``gwt-dist inspect``; anything but a code is an error of the test."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), guarded(here.path):
        code = main(["inspect", *options, str(here.folder)])
    assert code in (0, 1, 2)
    assert all(c.isprintable() or c == "\n" for c in text.getvalue())
    text.getvalue().encode()  # no half of a surrogate pair
    return code, text.getvalue()


# --- indexes

DEEP, DEEPER = "@deep", "@deeper"  # stand for what json.dumps could not write
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 53, 1 << 62, 1 << 63, 1 << 64, -(1 << 63), 10**400,
    0.0, -0.0, 0.5, 1e308, -1e308, float("nan"), float("inf"), "@1e999",
    "", ".", "..", "../outside.safetensors", "/etc/passwd", f"../{STEP}/{DATA}", DATA, "index.json", "link", "sub/x",
    "\0", "\ud800", "\x1b[31m", "a" * 5000, "F32", "BF16", "BOOL", "haar", "db2", "energy", "weight", "0" * 64,
    "row", "tensor", "$", "value", "tuple", "Counter", "torch.Tensor", "complex64", "-inf",
    [], {}, [[]], [0], [1 << 40, 1 << 40], [0, 1 << 62, 1 << 62], [-1], [1] * 70, {"": 0}, {"params": []}, DEEP, DEEPER,
    {"$": "tuple"}, {"$": "set", "value": [[], []]}, {"$": "dict", "value": [[{}, 1]]}, {"$": [], "value": 1},
    {"$": "torch.Tensor", "value": {"dtype": "float32", "shape": [1 << 40], "data": "AAAA"}},
    {"$": "numpy.ndarray", "value": {"dtype": "|O", "shape": [], "data": "AAAA"}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON document below its root."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def indexes(draw: st.DrawFn) -> bytes:
    """The index of the checkpoint, in any version, with one to three changes."""
    index = copy.deepcopy(draw(st.sampled_from(saved().indexes)))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(index))
        if not found:
            break
        *parents, key = draw(st.sampled_from(found))
        parent = at(index, tuple(parents))
        how = draw(st.sampled_from(["replace", "replace", "shift", "remove", "rename", "copy", "swap", "add"]))
        other = draw(st.sampled_from(found))
        if how == "shift" and isinstance(parent[key], int | float):
            parent[key] += draw(st.sampled_from([-1, 1, 4, -4, 1 << 20, 1 << 40]))
        elif how == "remove":
            del parent[key]
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from([h for h in HOSTILE if isinstance(h, str)]))] = parent.pop(key)
        elif how == "copy":
            parent[key] = json.loads(json.dumps(at(index, other)))
        elif how == "swap" and isinstance(parent, dict):
            others = draw(st.sampled_from(sorted(parent)))
            parent[key], parent[others] = parent[others], parent[key]
        elif how == "add" and isinstance(parent, list):
            parent.append(json.loads(json.dumps(parent[key])))
        elif how == "add":
            key = draw(st.sampled_from(["more", "params", "", "lr", "9"]))
            parent[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))  # the next change may be one of it
    text = json.dumps(index)
    text = text.replace(f'"{DEEP}"', "[" * 300 + "]" * 300).replace('"@1e999"', "1e999")
    text = text.replace(f'"{DEEPER}"', "[" * 200_000 + "]" * 200_000)
    if draw(st.integers(0, 9)) == 0:  # a key twice
        start = draw(st.sampled_from([i for i, c in enumerate(text) if c == "{"][:200]))
        text = f'{text[: start + 1]}"step": 1, "step": 2{", " if text[start + 1] != "}" else ""}{text[start + 1 :]}'
    return text.encode()


@fuzz
@given(indexes())
def test_forged_indexes(text: bytes) -> None:
    """Checksums are right, so it is the index that must be refused, or mean something."""
    here = saved()
    here.restore()
    (here.folder / "link").symlink_to(here.path.parent / "outside.safetensors")
    here.forge(text)
    refused = load(here)
    code, _ = inspected(here, *(["--json"] if len(text) % 2 else []))
    if refused is None:
        assert code == 0
        here.build()  # it was loaded: another run to try on
    (here.folder / "link").unlink(missing_ok=True)


@fuzz
@given(st.data())
def test_damaged_bytes_of_an_index(data: st.DataObject) -> None:
    """With and without a checksum that is right."""
    here = saved()
    here.restore()
    content = bytearray(here.files[here.folder / "index.json"])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if how == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del content[place : place + data.draw(st.integers(1, 40))]
        else:
            content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
    if bytes(content) == here.files[here.folder / "index.json"]:
        return
    if data.draw(st.booleans()):
        here.forge(bytes(content))
        if load(here) is None:
            assert inspected(here)[0] == 0
            here.build()
        else:
            inspected(here)
    else:
        (here.folder / "index.json").write_bytes(content)
        assert "index.json is damaged" in str(load(here))
        assert inspected(here)[0] == 1


# --- files


@st.composite
def data_files(draw: st.DrawFn) -> bytes:
    """The data file: truncated, with flipped bits, with a header length that lies, with more at its end."""
    content = bytearray(saved().files[saved().folder / DATA])
    header = 8 + int.from_bytes(content[:8], "little")
    how = draw(st.sampled_from(["cut", "header", "body", "length", "more"]))
    if how == "cut":
        del content[draw(st.integers(0, len(content) - 1)) :]
    elif how == "length":
        lie = draw(st.sampled_from([0, 1, header, len(content), 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]))
        content[:8] = lie.to_bytes(8, "little")
    elif how == "more":
        content += draw(st.binary(min_size=1, max_size=64))
    else:
        low, high = (0, header) if how == "header" else (header, len(content))
        for place in draw(st.lists(st.integers(low, high - 1), min_size=1, max_size=3, unique=True)):
            content[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


@fuzz
@given(data_files())
def test_damaged_files(content: bytes) -> None:
    here = saved()
    here.restore()
    (here.folder / DATA).write_bytes(content)
    assert DATA in str(load(here))
    code, shown = inspected(here, "--json")
    assert code == 1
    assert all(one["file"] == DATA for one in json.loads(shown)["damaged"])


@fuzz
@given(data_files(), st.integers(0, 1 << 20))
def test_files_with_an_index_that_was_made_to_fit(content: bytes, header: int) -> None:
    """Length and header have checksums that are right; the chunks have not, or lie elsewhere."""
    here = saved()
    here.restore()
    (here.folder / DATA).write_bytes(content)
    header = min(header, len(content)) if header % 2 else here.index["files"][DATA]["header_bytes"]
    index = json.loads(json.dumps(here.index))
    index["files"][DATA] = {
        "bytes": len(content),
        "header_bytes": header,
        "header_sha256": hashlib.sha256(content[:header]).hexdigest(),
    }
    here.forge(json.dumps(index).encode())
    refused = load(here)
    assert inspected(here)[0] == (0 if refused is None else 1)
    if refused is None:
        here.build()


# --- what the fuzzing has found, or would take long to find


def random_states(index: dict[str, Any]) -> dict[str, Any]:
    return index["random"]["0"]


def set_in(index: dict[str, Any], value: Any, *path: Any) -> None:
    at(index, path[:-1])[path[-1]] = value


def grow(stored: dict[str, Any], shape: list[int], stop: int, rows: int) -> None:
    """A tensor that fits its only chunk, and no file."""
    stored["shape"] = shape
    stored["pieces"][0].update(start=0, stop=stop, rows=rows)


def array(name: str, dtype: str, shape: list[int], data: str = "AAAAAA==") -> dict[str, Any]:
    return {"$": name, "value": {"dtype": dtype, "shape": shape, "data": data}}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


BIAS = ("tensors", "attn.bias")
FOUND: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "betas": (lambda i: set_in(i, 0, "groups", 0, "betas"), "betas=0 in a parameter group"),
    "huge rate": (lambda i: set_in(i, 10**400, "groups", 0, "lr"), "options of a parameter group in .* make no sense"),
    "infinite rate": (lambda i: set_in(i, "@1e999", "groups", 0, "lr"), "holds '1e999', which is too large"),
    "long rate": (lambda i: set_in(i, "1" * 5000, "groups", 0, "lr"), r"lr='1+\.\.\."),
    "tensor option": (lambda i: set_in(i, [], "groups", 0, "mine"), "options of a parameter group in .* make no sense"),
    "huge norm": (lambda i: set_in(i, 10**400, *BIAS, "numbers", "limited_norm"), "limited_norm is a int"),
    "empty shape": (lambda i: set_in(i, [0, 1 << 62, 1 << 62], *BIAS, "shape"), "shape is no shape of a tensor"),
    "no Python state": (lambda i: random_states(i).pop("python"), "random states are not those of this version"),
    "another state": (
        lambda i: set_in(random_states(i), random_states(i)["torch"], "python"),
        "random states are not those of this version|do not lie in its data",
    ),
    "text for a scheduler": (lambda i: set_in(i, "text", "scheduler", "state"), "load does not take the state in"),
    "half a scheduler": (
        # The first is taken before the second is seen.
        lambda i: set_in(i, [["gamma", 0.25], [1, 2, 3]], "scheduler", "state"),
        "load does not take the state in",
    ),
    "state alone": (lambda i: set_in(i, i["scheduler"]["state"], "scheduler"), "scheduler should have the keys"),
    "huge random state": (lambda i: grow(random_states(i)["python"], [1 << 40], 1 << 40, 1), "do not lie in its data"),
    "very many rows": (
        lambda i: grow(at(i, BIAS)["parts"]["weight"], [1 << 40, 2], 1, 1 << 40),
        "do not lie in its data",
    ),
    "list of counters": (lambda i: set_in(i, {"counters": []}, "engine"), "engine should have the keys"),
    "text as a counter": (
        lambda i: set_in(i, {"counters": {"global_steps": "1"}, "loss_scale": {}}, "engine"),
        "engine.global_steps is no number of things",
    ),
    "steps before the first": (
        lambda i: set_in(i, {"counters": {"global_steps": -7}, "loss_scale": {}}, "engine"),
        "engine.global_steps is no number of things",
    ),
    **{
        f"value {i}": (lambda index, value=value: set_in(index, value, "extra", "seen", 0), message)
        for i, (value, message) in enumerate(
            [
                (
                    {"$": "tuple"},
                    r"extra\['seen'\]\[0\] is no 'tuple': it was written by a newer gwt_dist, or is damaged",
                ),
                ({"$": "frobnicate", "value": 1}, "is no 'frobnicate': it was written by a newer gwt_dist"),
                ({"$": "set", "value": [{"$": "set", "value": []}]}, "is no 'set': unhashable"),
                ({"$": "set", "value": [1, 1]}, "an element twice"),
                ({"$": "dict", "value": [[1, 2], [1, 3]]}, "a key twice"),
                ({"$": "Counter", "value": {"a": 1}}, "a dict in the place of a list"),
                ({"$": "defaultdict", "value": ["print", []]}, "is no 'defaultdict'"),
                ({"$": "deque", "value": [1 << 70, [1]]}, "is no 'deque'"),
                ({"$": "float", "value": "1e999"}, "is no 'float'"),
                ({"$": "str", "value": [1 << 40]}, "is no 'str'"),
                ({"$": "complex", "value": [1, 2]}, "a int in the place of a float"),
                ({"$": "bytes", "value": "a"}, "is no 'bytes'"),
                ({"$": "torch.dtype", "value": "onnx"}, "is no 'torch.dtype'"),
                ({"$": "torch.device", "value": "nowhere"}, "is no 'torch.device'"),
                ({"$": "torch.Size", "value": [-1]}, "a shape"),
                (array("torch.Tensor", "float32", [1 << 40]), "4 bytes for the shape"),
                (array("torch.Tensor", "float32", [0, 1 << 60]), "a shape"),
                (array("torch.Tensor", "bool", [4], "AgICAg=="), "neither 0 nor 1"),
                (array("torch.Tensor", "quint8", [4]), "a dtype 'quint8'"),
                (array("numpy.ndarray", "|O", []), r"a dtype '\|O'"),
                (array("numpy.ndarray", "<f4", [1 << 40]), "4 bytes for the shape"),
                (array("numpy.generic", "<f4", [1]), "a number of shape"),
                (nested(101), "lies within 100 values"),
            ]
        )
    },
}


@pytest.mark.parametrize("case", FOUND)
def test_found_before(case) -> None:
    here = saved()
    here.restore()
    change, message = FOUND[case]
    index = json.loads(json.dumps(here.index))
    change(index)
    here.forge(json.dumps(index).replace('"@1e999"', "1e999").encode())
    assert re.search(message, str(load(here)))


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_every_version_without_changes(number) -> None:
    """What the fuzzing starts from is what loads."""
    here = saved()
    here.restore()
    here.forge(json.dumps(here.indexes[number]).encode())
    assert load(here) is None
    assert inspected(here)[0] == 0
    here.build()


def test_a_key_twice() -> None:
    """The last one would count, and whoever looks at the first sees something else."""
    here = saved()
    here.restore()
    here.forge(json.dumps(here.index).replace('"step": 1,', '"step": 1, "step": 1,', 1).encode())
    assert "has the key 'step' twice in one object" in str(load(here))
    code, shown = inspected(here)
    assert code == 1
    assert "twice" in shown.replace("\n", " ")


# --- paths


def renamed(index: dict[str, Any], to: str) -> bytes:
    return json.dumps(index).replace(DATA, to).encode()


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", f"../{STEP}/{DATA}", "..", ".", "sub/file", "link", "pipe", "\\u0000"],
)
def test_paths_cannot_leave_the_folder(name) -> None:
    """Not by name, and not by a link with the very bytes behind it."""
    here = saved()
    here.restore()
    outside = here.path.parent / "outside.safetensors"
    outside.write_bytes(here.files[here.folder / DATA])
    (here.folder / "link").symlink_to(outside)
    os.mkfifo(here.folder / "pipe")
    here.forge(renamed(here.index, name))
    assert load(here) is not None
    assert inspected(here)[0] == 1
    (here.folder / "link").unlink()
    (here.folder / "pipe").unlink()


# --- bits


def flips_case(folder: str, count: int, seed: int) -> list[str]:
    """Single bits flipped in files drawn at random of a checkpoint of real ranks: those that were not found.

    Found means that every rank raises, that the message names the file, that nothing has changed and that ``inspect``
    says so as well.
    """
    run = str(Path(folder, "run"))
    trained = Trained("fsdp2")
    trained.train(steps()[:BEFORE])
    where = trained.save(run, BEFORE)
    trained.train(steps()[BEFORE:])

    def content() -> list[Tensor]:
        states = trained.optimizer.state.values()
        found = [*trained.module.state_dict().values(), *(v for s in states for v in s.values())]
        return [dtensor.local(tensor).clone() for tensor in found]

    before, generator, missed = content(), random.Random(seed), []
    files = [Path(run, "latest"), *sorted(where.iterdir())]
    for i in range(count):
        path = files[generator.randrange(len(files))]
        bit = generator.randrange(8 * path.stat().st_size)
        if dist.get_rank() == 0:
            toggle(path, bit)
        dist.barrier()
        message = "nothing"
        try:
            trained.load(run)
        except CheckpointError as error:
            message = str(error)
        if path.name.removesuffix(".sha256") not in message or not same(before, content()):
            missed.append(f"flip {i}: bit {bit} of {path.name}: {message}")
        dist.barrier()
        if dist.get_rank() == 0:
            with contextlib.redirect_stdout(io.StringIO()):
                if main(["inspect", run]) != 1:
                    missed.append(f"flip {i}: bit {bit} of {path.name}: inspect")
            toggle(path, bit)
    dist.barrier()
    if trained.load(run).step != BEFORE:
        missed.append("it does not load without damage")
    return missed


def toggle(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        value = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([value ^ 1 << bit % 8]))


def test_flipped_bits_of_two_ranks(ranks: Callable[..., Any], tmp_path: Path) -> None:
    for missed in ranks(2, flips_case, str(tmp_path), FLIPS, 11, timeout=60 + FLIPS):
        assert missed == []

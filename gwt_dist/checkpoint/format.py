"""What an index says, as frozen data, and the strict way from JSON to it and back. Knows no torch.

A tensor is stored as flat row-major intervals: the weight in its own shape, the moments in the ``[R, K]`` of all its
units. Every interval is a piece: so many bytes at an offset of one file, with a SHA-256 of its own. The pieces of a
tensor hold each element exactly once, whoever wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any, NoReturn, TypeVar

from gwt_dist.layout import Fragment, LayoutError, join

FORMAT = "gwt_dist checkpoint"
VERSION = 1
INDEX = "index.json"
WEIGHT, EXP_AVG, EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"
# The names of safetensors, and the bytes of an element.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = {"F64", "F32", "F16", "BF16"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST = 1 << 62
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, does not fit, or could not be written; the message names the file or tensor."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One interval of a stored tensor: where its bytes are, and their checksum."""

    file: str
    offset: int  # of its first byte, from the start of the file
    sha256: str
    fragment: Fragment  # dense in the file; its own `offset` is 0


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of `shape` and safetensors `dtype`, cut into pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def bytes_of(self, piece: Piece) -> int:
        """Length of a piece in its file."""
        return piece.fragment.numel * ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """Length of all pieces."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the model, with its state if an optimizer steps it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # of the model's weight; the stored one is wider where an engine keeps masters
    parts: dict[str, Stored]  # "weight", and "exp_avg" and "exp_avg_sq" once a step was taken
    group: int | None = None  # parameter group; None: no optimizer holds it
    level: int = 0  # in effect: 0 for vectors whatever their group says
    wavelet: str = "haar"
    recipe: str = "paper"
    step: int | None = None  # None: never stepped
    limited_norm: float | None = None

    @property
    def has_master(self) -> bool:
        """Whether the stored weight is a master of more precision than the model's."""
        return self.parts[WEIGHT].dtype != self.dtype


@dataclass(frozen=True, slots=True)
class File:
    """A safetensors file: its length, and length and checksum of its header (the 8 bytes before it included)."""

    bytes: int
    header_bytes: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class Index:
    """All that a checkpoint says about itself."""

    step: int
    world_size: int
    tensors: dict[str, Entry]
    groups: tuple[dict[str, Any], ...]  # options of each parameter group
    files: dict[str, File]
    extra: Any = None  # the user's
    scheduler: Any = None
    engine: dict[str, Any] | None = None  # counters of an engine
    random: dict[int, dict[str, Stored]] = field(default_factory=dict)  # by rank
    versions: dict[str, str] = field(default_factory=dict)  # who wrote it

    def stored(self) -> Iterable[tuple[str, Stored]]:
        """Everything that has pieces, with a name to show."""
        for entry in self.tensors.values():
            for kind, part in entry.parts.items():
                yield f"{kind} of {entry.name}", part
        for rank, states in self.random.items():
            for kind, part in states.items():
                yield f"{kind} random state of rank {rank}", part


def dump(index: Index) -> bytes:
    """The JSON of an index; raises `CheckpointError` for what JSON cannot hold."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": index.step,
        "world_size": index.world_size,
        "versions": index.versions,
        "files": {
            name: {"bytes": f.bytes, "header_bytes": f.header_bytes, "header_sha256": f.header_sha256}
            for name, f in index.files.items()
        },
        "groups": list(index.groups),
        "tensors": {
            entry.name: {
                "shape": list(entry.shape),
                "dtype": entry.dtype,
                "group": entry.group,
                "level": entry.level,
                "wavelet": entry.wavelet,
                "recipe": entry.recipe,
                "step": entry.step,
                "limited_norm": entry.limited_norm,
                "parts": {kind: _dump_stored(part) for kind, part in entry.parts.items()},
            }
            for entry in index.tensors.values()
        },
        "random": {str(rank): {k: _dump_stored(s) for k, s in states.items()} for rank, states in index.random.items()},
        "engine": index.engine,
        "scheduler": index.scheduler,
        "extra": index.extra,
    }
    return to_json(content, "the index")


def to_json(content: Any, what: str) -> bytes:
    """UTF-8 JSON that reads back as what it was; raises `CheckpointError` naming `what` otherwise."""
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{what} cannot be written as JSON: {error}. Checkpoints hold finite numbers, text, lists and "
            f"mappings with text keys"
        ) from None
    return text.encode()


def _dump_stored(stored: Stored) -> dict[str, Any]:
    pieces = [
        {
            "file": piece.file,
            "offset": piece.offset,
            "start": piece.fragment.start,
            "stop": piece.fragment.stop,
            "rows": piece.fragment.rows,
            "sha256": piece.sha256,
        }
        for piece in stored.pieces
    ]
    return {"dtype": stored.dtype, "shape": list(stored.shape), "pieces": pieces}


def parse(text: bytes, where: str, sizes: Callable[[str], int]) -> Index:
    """The index that `text` says; `sizes` gives the length of a file of the checkpoint.

    Raises `CheckpointError`, naming `where` and the key, for anything that `dump` would not have written: unknown or
    missing keys, wrong types, names that are no plain file names, lengths that are not those of the files, pieces that
    do not make up their tensor.
    """
    reader = _Reader(where)
    try:
        content = json.loads(text, parse_constant=lambda name: reader.fail("", f"holds {name}"))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{where} is not the index of a checkpoint of gwt_dist")
    version = content.get("version")
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{where} has the format version {version!r} and this gwt_dist reads {VERSION}; load it with the gwt_dist "
            f"that wrote it ({content.get('versions')!r}), or a newer one"
        )
    return reader.index(content, sizes)


class _Reader:
    """Checks as it goes; `path` says where in the JSON something is."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.files: dict[str, File] = {}
        self.left: dict[str, int] = {}  # bytes of each file that no piece has taken yet

    def fail(self, path: str, what: str) -> NoReturn:
        raise CheckpointError(f"{self.where}{': ' if path else ''}{path} {what}")

    def fields(self, value: Any, path: str, **kinds: type | tuple[type, ...]) -> list[Any]:
        """The values of an object that has exactly these keys, in this order."""
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            self.fail(path, f"should have the keys {sorted(kinds)} and has {found!r}")
        for key, kind in kinds.items():
            if not isinstance(value[key], kind) or (isinstance(value[key], bool) and kind is not object):
                self.fail(f"{path}.{key}", f"is a {type(value[key]).__name__}")
        return [value[key] for key in kinds]

    def natural(self, value: Any, path: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
            self.fail(path, "is no number of things")
        return value

    def shape(self, value: list[Any], path: str) -> tuple[int, ...]:
        shape = tuple(self.natural(size, path) for size in value)
        if len(shape) > 64 or prod(shape) > _LARGEST:
            self.fail(path, "is no shape of a tensor")
        return shape

    def known(self, value: T, known: Iterable[T], path: str) -> T:
        if value not in known:
            self.fail(path, f"is {value!r}")
        return value

    def index(self, content: dict[str, Any], sizes: Callable[[str], int]) -> Index:
        _, _, step, world, versions, files, groups, tensors, random, engine, scheduler, extra = self.fields(
            content,
            "the index",
            format=str,
            version=int,
            step=int,
            world_size=int,
            versions=dict,
            files=dict,
            groups=list,
            tensors=dict,
            random=dict,
            engine=(dict, type(None)),
            scheduler=object,
            extra=object,
        )
        for name, value in files.items():
            self.files[name] = self.file(name, value, sizes)
            self.left[name] = self.files[name].bytes - self.files[name].header_bytes
        for i, options in enumerate(groups):
            if not isinstance(options, dict):
                self.fail(f"groups[{i}]", f"is a {type(options).__name__}")
        entries = {name: self.entry(name, value, len(groups)) for name, value in tensors.items()}
        states: dict[int, dict[str, Stored]] = {}
        for rank, value in random.items():
            if not re.fullmatch(r"[0-9]{1,9}", rank) or not isinstance(value, dict):
                self.fail(f"random.{rank}", "is no state of a rank")
            states[int(rank)] = {k: self.stored(v, f"random.{rank}.{k}", k) for k, v in value.items()}
        return Index(
            self.natural(step, "step"),
            self.natural(world, "world_size"),
            entries,
            tuple(groups),
            self.files,
            extra,
            scheduler,
            engine,
            states,
            {str(k): str(v) for k, v in versions.items()},
        )

    def file(self, name: str, value: Any, sizes: Callable[[str], int]) -> File:
        if not _NAME.fullmatch(name):
            self.fail(f"files.{name!r}", "is no plain file name; nothing outside of the checkpoint's folder is read")
        size, header, sha256 = self.fields(value, f"files.{name}", bytes=int, header_bytes=int, header_sha256=str)
        found = sizes(name)
        if found != size or not 8 <= header <= size:
            self.fail(
                f"files.{name}", f"has {size} bytes, {header} of them header, and the file {found}: it is not the same"
            )
        return File(size, header, self.sha256(sha256, f"files.{name}.header_sha256"))

    def sha256(self, value: str, path: str) -> str:
        if not _SHA256.fullmatch(value):
            self.fail(path, "is no SHA-256")
        return value

    def entry(self, name: str, value: Any, groups: int) -> Entry:
        path = f"tensors.{name}"
        number = (int, type(None))
        shape, dtype, group, level, wavelet, recipe, step, norm, parts = self.fields(
            value,
            path,
            shape=list,
            dtype=str,
            group=number,
            level=int,
            wavelet=str,
            recipe=str,
            step=number,
            limited_norm=(float, int, type(None)),
            parts=dict,
        )
        whole = self.shape(shape, f"{path}.shape")
        if group is not None and not 0 <= group < groups:
            self.fail(f"{path}.group", f"is {group}, of {groups}")
        if norm is not None and not isfinite(norm):
            self.fail(f"{path}.limited_norm", "is not finite")
        self.known(dtype, ITEM_BYTES, f"{path}.dtype")
        state = {EXP_AVG, EXP_AVG_SQ} if step is not None else set()
        if parts.keys() != {WEIGHT} | state or (state and group is None):
            self.fail(f"{path}.parts", f"are {sorted(parts)} at step {step} in group {group}")
        stored = {kind: self.stored(part, f"{path}.{kind}", name) for kind, part in parts.items()}
        if stored[WEIGHT].shape != whole:
            self.fail(f"{path}.weight.shape", f"is {stored[WEIGHT].shape}, of a tensor of {whole}")
        for kind in state:
            self.known(stored[kind].dtype, FLOATS, f"{path}.{kind}.dtype")
        step = None if step is None else self.natural(step, f"{path}.step")
        level = self.natural(level, f"{path}.level")
        norm = None if norm is None else float(norm)
        return Entry(name, whole, dtype, stored, group, level, wavelet, recipe, step, norm)

    def stored(self, value: Any, path: str, name: str) -> Stored:
        dtype, shape, pieces = self.fields(value, path, dtype=str, shape=list, pieces=list)
        self.known(dtype, ITEM_BYTES, f"{path}.dtype")
        whole = self.shape(shape, f"{path}.shape")
        elements = prod(whole)
        if elements and not pieces:
            self.fail(f"{path}.pieces", f"are none, and the tensor has {elements} elements")
        stored = Stored(dtype, whole, tuple(self.piece(p, f"{path}.pieces[{i}]", name, dtype, whole)
                                            for i, p in enumerate(pieces)))  # fmt: skip
        try:
            join([[piece.fragment] for piece in stored.pieces])
        except LayoutError as error:
            self.fail(f"{path}.pieces", f"do not make up the tensor: {error}")
        return stored

    def piece(self, value: Any, path: str, name: str, dtype: str, shape: tuple[int, ...]) -> Piece:
        file, offset, start, stop, rows, sha256 = self.fields(
            value, path, file=str, offset=int, start=int, stop=int, rows=int, sha256=str
        )
        if file not in self.files:
            self.fail(f"{path}.file", f"is {file!r}, which is not among the files")
        numbers = [self.natural(n, path) for n in (offset, start, stop, rows)]
        # Before a Fragment is made of it: what a file cannot hold costs no time and no memory.
        length = max(0, stop - start) * rows * ITEM_BYTES[dtype]
        self.left[file] -= length
        inside = self.files[file].header_bytes <= offset and offset + length <= self.files[file].bytes
        if not inside or self.left[file] < 0 or rows > max(1, length):
            self.fail(path, f"takes bytes {offset}..{offset + length} of {file}, which do not lie in its data")
        try:
            fragment = Fragment(name, shape, numbers[1], numbers[2], 0, rows)
        except LayoutError as error:
            self.fail(path, f"does not lie in its tensor: {error}")
        return Piece(file, offset, self.sha256(sha256, f"{path}.sha256"), fragment)

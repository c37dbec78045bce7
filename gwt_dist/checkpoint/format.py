"""What an index says, as frozen data, and the JSON that is written of it; `parse.py` has the way back.

A tensor is stored as flat row-major intervals: the weight in its own shape, a field of its state in that of the whole
field. Every interval is a chunk: so many bytes at an offset of one file, with a SHA-256 of its own. The chunks of a
tensor hold each element exactly once, whoever wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from gwt_dist.checkpoint.errors import CheckpointError as CheckpointError
from gwt_dist.checkpoint.values import encode
from gwt_dist.declare import Extent, Field
from gwt_dist.formats import FORMATS, FP32
from gwt_dist.layout import Fragment

FORMAT = "gwt_dist checkpoint"
VERSION = 4
INDEX = "index.json"
WEIGHT = "weight"
# The names of safetensors, and the bytes of an element. C128 and C32 are ours; an element of F4 is two numbers.
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"U64": 8, "U32": 4, "U16": 2, "C128": 16, "C64": 8, "C32": 4, "F4": 1},
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 1),
}
FLOATS = {"F64", "F32", "F16", "BF16"}  # rounded into each other; all others only load as what they were


def dtypes_of(field: Field) -> set[str]:
    """The dtypes that the part of a field may have: the one of its format, and any of FLOATS for fp32."""
    return FLOATS if field.format == FP32 else {FORMATS[field.format].stored}


def stored_of(fields: Iterable[Field]) -> list[str]:
    """Names of the fields that are parts of their own; the others are numbers in the index."""
    return [field.name for field in fields if field.extent is not Extent.TENSOR]


def _field(field: Field) -> dict[str, Any]:
    of_owner = {"sides": list(field.sides), "rank": field.rank} if field.sides else {}
    return {"extent": field.extent.value, "format": field.format, **of_owner}


@dataclass(frozen=True, slots=True)
class Chunk:
    """One interval of a stored tensor: where its bytes are, and their checksum."""

    file: str
    offset: int  # of its first byte, from the start of the file
    sha256: str
    fragment: Fragment  # dense in the file; its own `offset` is 0


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of `shape` and safetensors `dtype`, cut into chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def bytes_of(self, chunk: Chunk) -> int:
        """Length of a chunk in its file."""
        return chunk.fragment.numel * ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """Length of all chunks."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the model, with its state if an optimizer steps it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # of the model's weight; the stored one is wider where an engine keeps masters
    parts: dict[str, Stored]  # "weight", and once a step was taken each field that is no single number
    group: int | None = None  # parameter group; None: no optimizer holds it, and what follows says nothing
    level: int = 0  # in effect: 0 for vectors whatever their group says
    wavelet: str = ""
    recipe: str = ""
    fields: tuple[Field, ...] = ()  # what its state is made of
    step: int | None = None  # None: never stepped
    # Once a step was taken: the fields of one number a tensor. Of a stack of matrices, a number of each.
    numbers: dict[str, float | list[float]] = field(default_factory=dict)

    @property
    def has_master(self) -> bool:
        """Whether the stored weight is a master of more precision than the model's."""
        return self.parts[WEIGHT].dtype != self.dtype


@dataclass(frozen=True, slots=True)
class Excluded:
    """A tensor of the model that was left out of the save."""

    shape: tuple[int, ...]
    dtype: str  # any that torch has


@dataclass(frozen=True, slots=True)
class File:
    """A safetensors file: its length, and length and checksum of its header (the 8 bytes before it included)."""

    bytes: int
    header_bytes: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """The state of a learning-rate schedule."""

    kind: str  # its class and, in brackets, those of the schedules within it; empty before version 3
    state: Any


@dataclass(frozen=True, slots=True)
class Index:
    """All that a checkpoint says about itself."""

    step: int
    world_size: int
    tensors: dict[str, Entry]
    groups: tuple[dict[str, Any], ...]  # options of each parameter group
    files: dict[str, File]
    extra: Any = None  # the user's
    scheduler: Schedule | None = None  # that was given to `save`
    engine: dict[str, Any] | None = None  # counters of an engine
    engine_schedule: Schedule | None = None  # that the engine steps by itself
    random: dict[int, dict[str, Stored]] = field(default_factory=dict)  # by rank
    versions: dict[str, str] = field(default_factory=dict)  # who wrote it
    excluded: dict[str, Excluded] = field(default_factory=dict)  # by name: what was left out
    tied: dict[str, str] = field(default_factory=dict)  # further name of a tensor -> the name that it has here

    def stored(self) -> Iterable[tuple[str, Stored]]:
        """Everything that has chunks, with a name to show."""
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
                "fields": {f.name: _field(f) for f in entry.fields},
                "step": entry.step,
                "numbers": entry.numbers,
                "parts": {kind: _dump_stored(part) for kind, part in entry.parts.items()},
            }
            for entry in index.tensors.values()
        },
        "excluded": {name: {"shape": list(one.shape), "dtype": one.dtype} for name, one in index.excluded.items()},
        "tied": index.tied,
        "random": {str(rank): {k: _dump_stored(s) for k, s in states.items()} for rank, states in index.random.items()},
        "engine": index.engine,
        "engine_schedule": _dump_schedule(index.engine_schedule, "the state of the engine's lr_scheduler"),
        "scheduler": _dump_schedule(index.scheduler, "the state of scheduler"),
        "extra": encode(index.extra, "extra"),
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


def _dump_schedule(schedule: Schedule | None, what: str) -> dict[str, Any] | None:
    return None if schedule is None else {"class": schedule.kind, "state": encode(schedule.state, what)}


def _dump_stored(stored: Stored) -> dict[str, Any]:
    chunks = [
        {
            "file": chunk.file,
            "offset": chunk.offset,
            "start": chunk.fragment.start,
            "stop": chunk.fragment.stop,
            "rows": chunk.fragment.rows,
            "sha256": chunk.sha256,
        }
        for chunk in stored.chunks
    ]
    return {"dtype": stored.dtype, "shape": list(stored.shape), "pieces": chunks}

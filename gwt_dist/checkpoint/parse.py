"""The strict way from the JSON of an index to frozen data. Believes nothing that it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from math import isfinite, prod
from typing import Any, NoReturn, TypeVar

from gwt_dist.checkpoint.format import (
    FORMAT,
    ITEM_BYTES,
    VERSION,
    WEIGHT,
    CheckpointError,
    Chunk,
    Entry,
    Excluded,
    File,
    Index,
    Schedule,
    Stored,
    dtypes_of,
    stored_of,
)
from gwt_dist.checkpoint.lift import lift_entry, lift_field, lift_index
from gwt_dist.checkpoint.values import decode
from gwt_dist.declare import Extent, Field
from gwt_dist.exchange import join
from gwt_dist.formats import FORMATS, scale_of
from gwt_dist.layout import Fragment, LayoutError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST = 1 << 62
T = TypeVar("T")


def parse(text: bytes, where: str, sizes: Callable[[str], int] | None) -> Index:
    """The index that `text` says; `sizes` gives the length of a file of the checkpoint, None believes the index.

    Raises `CheckpointError`, naming `where` and the key, for anything that `dump` would not have written: unknown or
    missing keys, keys that are there twice, wrong types, numbers that are not finite, names that are no plain file
    names, lengths that are not those of the files, chunks that do not make up their tensor.
    """
    reader = _Reader(where)
    try:
        content = json.loads(
            text,
            parse_constant=lambda name: reader.fail("", f"holds {name}"),
            parse_float=reader.number,
            object_pairs_hook=reader.object,
        )
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{where} is not the index of a checkpoint of gwt_dist")
    version = content.get("version")
    if version not in range(1, VERSION + 1) or isinstance(version, bool):
        raise CheckpointError(
            f"{where} has the format version {_shown(version)} and this gwt_dist reads 1 to {VERSION}; load it with "
            f"the gwt_dist that wrote it ({_shown(content.get('versions'))}), or a newer one"
        )
    try:
        return reader.index(content, sizes)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply") from None


def _shown(value: object) -> str:
    """In a message: what is read may be as long as it likes."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class _Reader:
    """Checks as it goes; `path` says where in the JSON something is."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.files: dict[str, File] = {}
        self.version = VERSION
        self.left: dict[str, int] = {}  # bytes of each file that no chunk has taken yet

    def fail(self, path: str, what: str) -> NoReturn:
        raise CheckpointError(f"{self.where}{': ' if path else ''}{path[:300]} {what}")

    def object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            left = set(found)
            for name, _ in pairs:
                if name not in left:
                    self.fail("", f"has the key {_shown(name)} twice in one object")
                left.remove(name)
        return found

    def number(self, text: str) -> float:
        value = float(text)
        if not isfinite(value):
            self.fail("", f"holds {_shown(text)}, which is too large")
        return value

    def fields(self, value: Any, path: str, **kinds: type | tuple[type, ...]) -> list[Any]:
        """The values of an object that has exactly these keys, in this order."""
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            self.fail(path, f"should have the keys {sorted(kinds)} and has {_shown(found)}")
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
        # Also without the zeros in it: what multiplies strides must not overflow.
        if len(shape) > 64 or prod(size or 1 for size in shape) > _LARGEST:
            self.fail(path, "is no shape of a tensor")
        return shape

    def known(self, value: T, known: Iterable[T], path: str) -> T:
        if value not in known:
            self.fail(path, f"is {_shown(value)}")
        return value

    def index(self, content: dict[str, Any], sizes: Callable[[str], int] | None) -> Index:
        optional, self.version = (dict, type(None)), content["version"]
        kinds: dict[str, Any] = dict(format=str, version=int, step=int, world_size=int, versions=dict, files=dict)
        kinds |= dict(groups=list, tensors=dict, random=dict, engine=optional)
        if self.version < 3:
            self.fields(content, "the index", **kinds, scheduler=object, extra=object)
            content = lift_index(content)
        kinds |= dict(engine_schedule=optional, scheduler=optional, extra=object, excluded=dict, tied=dict)
        found = self.fields(content, "the index", **kinds)
        _, _, step, world, versions, files, groups, tensors, random, engine, theirs, scheduler, extra = found[:-2]
        excluded, tied = found[-2:]
        for name, value in files.items():
            self.files[name] = self.file(name, value, sizes)
            self.left[name] = self.files[name].bytes - self.files[name].header_bytes
        for i, options in enumerate(groups):
            if not isinstance(options, dict):
                self.fail(f"groups[{i}]", f"is a {type(options).__name__}")
        entries = {name: self.entry(name, value, groups) for name, value in tensors.items()}
        states: dict[int, dict[str, Stored]] = {}
        for rank, value in random.items():
            if not re.fullmatch(r"[0-9]{1,9}", rank) or not isinstance(value, dict):
                self.fail(f"random.{rank}", "is no state of a rank")
            states[int(rank)] = {k: self.stored(v, f"random.{rank}.{k}", k) for k, v in value.items()}
        if engine is not None:
            self.engine(engine)
        return Index(
            self.natural(step, "step"),
            self.natural(world, "world_size"),
            entries,
            tuple(groups),
            self.files,
            self.value(extra, "extra"),
            self.schedule(scheduler, "scheduler"),
            engine,
            self.schedule(theirs, "engine_schedule"),
            states,
            {str(k): str(v) for k, v in versions.items()},
            *self.absent(excluded, tied, entries),
        )

    def absent(
        self, excluded: dict[str, Any], tied: dict[str, Any], entries: Mapping[str, Entry]
    ) -> tuple[dict[str, Excluded], dict[str, str]]:
        left_out = {}
        for name, value in excluded.items():
            shape, dtype = self.fields(value, f"excluded.{name}", shape=list, dtype=str)
            left_out[name] = Excluded(self.shape(shape, f"excluded.{name}.shape"), dtype)
        for name in left_out.keys() & entries:
            self.fail(f"excluded.{name}", "is among the tensors too")
        known = {**entries, **left_out}
        for name, first in tied.items():
            if name in known or not isinstance(first, str) or first not in known:
                self.fail(f"tied.{name}", f"is {_shown(first)}, and no other name of a tensor")
        return left_out, tied

    def engine(self, value: dict[str, Any]) -> None:
        counters, scale = self.fields(value, "engine", counters=dict, loss_scale=dict)
        for name, number in counters.items():
            # Ranks that share sequences count fractions of samples, and whole ones as 2.0.
            samples = name == "global_samples" and isinstance(number, float) and 0 <= number <= _LARGEST
            if not samples:
                self.natural(number, f"engine.{name}")
        for name, number in scale.items():
            if isinstance(number, bool) or not isinstance(number, int | float | None):
                self.fail(f"engine.{name}", f"is {_shown(number)}")

    def value(self, value: Any, path: str) -> Any:
        # Before version 3 an object with such a key was the user's.
        return decode(value, f"{self.where}: {path}") if self.version >= 3 else value

    def schedule(self, value: Any, path: str) -> Schedule | None:
        if value is None:
            return None
        kind, state = self.fields(value, path, **{"class": str, "state": object})
        return Schedule(kind, self.value(state, f"{path}.state"))

    def file(self, name: str, value: Any, sizes: Callable[[str], int] | None) -> File:
        if not _NAME.fullmatch(name):
            self.fail(
                f"files.{_shown(name)}", "is no plain file name; nothing outside of the checkpoint's folder is read"
            )
        size, header, sha256 = self.fields(value, f"files.{name}", bytes=int, header_bytes=int, header_sha256=str)
        found = size if sizes is None else sizes(name)
        if found != size or not 8 <= header <= size:
            self.fail(
                f"files.{name}", f"has {size} bytes, {header} of them header, and the file {found}: it is not the same"
            )
        return File(size, header, self.sha256(sha256, f"files.{name}.header_sha256"))

    def sha256(self, value: str, path: str) -> str:
        if not _SHA256.fullmatch(value):
            self.fail(path, "is no SHA-256")
        return value

    def entry(self, name: str, value: Any, groups: list[dict[str, Any]]) -> Entry:
        path = f"tensors.{name}"
        number = (int, type(None))
        kinds: dict[str, Any] = dict(shape=list, dtype=str, group=number, level=int, wavelet=str, recipe=str)
        kinds |= dict(step=number, parts=dict)
        if self.version == 1:
            self.fields(value, path, **kinds, limited_norm=(float, type(None)))
            value = lift_entry(value)
        found = self.fields(value, path, **kinds, fields=dict, numbers=dict)
        shape, dtype, group, level, wavelet, recipe, step, parts, fields, numbers = found
        whole = self.shape(shape, f"{path}.shape")
        if group is not None and not 0 <= group < len(groups):
            self.fail(f"{path}.group", f"is {group}, of {len(groups)}")
        self.known(dtype, ITEM_BYTES, f"{path}.dtype")
        kept = tuple(self.field(key, said, f"{path}.fields.{key}") for key, said in fields.items())
        scales = {scale_of(f.name) for f in kept if FORMATS[f.format].scaled}
        if scales != {f.name for f in kept if f.extent is Extent.CELL}:
            self.fail(f"{path}.fields", f"are {_shown(sorted(fields))}, which should have the scales {sorted(scales)}")
        if group is None and (kept or step is not None):
            self.fail(f"{path}.group", f"is none, of a tensor with the state {_shown(sorted(fields))} at step {step}")
        state = stored_of(kept) if step is not None else []
        if parts.keys() != {WEIGHT, *state}:
            self.fail(f"{path}.parts", f"are {_shown(sorted(parts))} at step {step}, with {_shown(sorted(fields))}")
        stored = {kind: self.stored(part, f"{path}.{kind}", name) for kind, part in parts.items()}
        if stored[WEIGHT].shape != whole:
            self.fail(f"{path}.weight.shape", f"is {stored[WEIGHT].shape}, of a tensor of {whole}")
        for field in kept:
            if field.name in state:
                self.known(stored[field.name].dtype, dtypes_of(field), f"{path}.{field.name}.dtype")
        is_stack = group is not None and groups[group].get("stacked") is True and len(whole) == 3 and whole[0] > 0
        kind = list if is_stack else float
        self.fields(
            numbers, f"{path}.numbers", **{f.name: kind for f in kept if f.extent is Extent.TENSOR and step is not None}
        )
        for field_name, its in numbers.items() if is_stack else ():
            if len(its) != whole[0] or not all(isinstance(one, float) for one in its):
                self.fail(
                    f"{path}.numbers.{field_name}", f"are {_shown(its)}, and no number for each of {whole[0]} matrices"
                )
        step = None if step is None else self.natural(step, f"{path}.step")
        level = self.natural(level, f"{path}.level")
        return Entry(name, whole, dtype, stored, group, level, wavelet, recipe, kept, step, numbers)

    def field(self, name: str, value: Any, path: str) -> Field:
        if self.version < 4:
            self.fields(value, path, extent=str)
            value = lift_field(value)
        said = dict(value) if isinstance(value, dict) else value
        sides, rank = (said.pop("sides", []), said.pop("rank", 0)) if isinstance(said, dict) else ([], 0)
        extent, form = self.fields(said, path, extent=str, format=str)
        if not isinstance(sides, list) or not all(isinstance(side, str) for side in sides):
            self.fail(f"{path}.sides", "are no names of dimensions")
        self.known(extent, [one.value for one in Extent], f"{path}.extent")
        if name == WEIGHT:
            self.fail(path, "is the name of what is no state")
        try:
            return Field(name, Extent(extent), form, tuple(sides), self.natural(rank, f"{path}.rank"))
        except ValueError as error:
            self.fail(path, f"is none: {error}")

    def stored(self, value: Any, path: str, name: str) -> Stored:
        dtype, shape, chunks = self.fields(value, path, dtype=str, shape=list, pieces=list)
        self.known(dtype, ITEM_BYTES, f"{path}.dtype")
        whole = self.shape(shape, f"{path}.shape")
        elements = prod(whole)
        if elements and not chunks:
            self.fail(f"{path}.pieces", f"are none, and the tensor has {elements} elements")
        stored = Stored(dtype, whole, tuple(self.chunk(p, f"{path}.pieces[{i}]", name, dtype, whole)
                                            for i, p in enumerate(chunks)))  # fmt: skip
        try:
            join([[chunk.fragment] for chunk in stored.chunks])
        except LayoutError as error:
            self.fail(f"{path}.pieces", f"do not make up the tensor: {error}")
        return stored

    def chunk(self, value: Any, path: str, name: str, dtype: str, shape: tuple[int, ...]) -> Chunk:
        file, offset, start, stop, rows, sha256 = self.fields(
            value, path, file=str, offset=int, start=int, stop=int, rows=int, sha256=str
        )
        if file not in self.files:
            self.fail(f"{path}.file", f"is {_shown(file)}, which is not among the files")
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
        return Chunk(file, offset, self.sha256(sha256, f"{path}.sha256"), fragment)

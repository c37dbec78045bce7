"""The bytes: one safetensors file of a rank, written as a stream, and chunks of it read back.

Chunks are at most `CHUNK_BYTES` long, and no more than one of them is in memory at a time, on the way in and on the way
out. Reading goes by offset and without a memory map: a file that shrinks while it is read is an error and no SIGBUS.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gwt_dist.checkpoint.dtypes import in_files, torch_dtype
from gwt_dist.checkpoint.elements import copy, flat, is_flat
from gwt_dist.checkpoint.folder import open_file
from gwt_dist.checkpoint.format import ITEM_BYTES, CheckpointError, Chunk, File, Stored
from gwt_dist.layout import Fragment, Overlap

CHUNK_BYTES = 16 << 20
_HASH_BYTES = 1 << 20  # read at a time to be hashed: what was read is still in the processor's cache


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk to be written: `fragment`, dense, of stored tensor `name`, out of a buffer (see `flat`) with `held`."""

    name: str
    kind: str
    dtype: str
    fragment: Fragment
    held: Fragment
    buffer: Tensor

    @property
    def bytes(self) -> int:
        """Its length in the file."""
        return self.fragment.numel * ITEM_BYTES[self.dtype]

    def dense(self) -> Tensor:
        """Its elements, 1-D on the CPU; a view of the buffer where that is dense."""
        overlaps = self.held.intersect(self.fragment)
        dense = len(overlaps) == 1 and (overlaps[0].rows == 1 or overlaps[0].columns == overlaps[0].source_stride)
        if dense and is_flat(self.buffer):
            return self.buffer.narrow(0, overlaps[0].source, self.fragment.numel).cpu()
        scratch = torch.empty(self.fragment.numel, dtype=self.buffer.dtype, device=self.buffer.device)
        for overlap in overlaps:
            copy(scratch, self.buffer, overlap)
        return scratch.cpu()


def split(fragment: Fragment, item_bytes: int) -> Iterator[Fragment]:
    """Fragments of at most `CHUNK_BYTES` that make up one, at offset 0."""
    most = max(1, CHUNK_BYTES // item_bytes)
    name, shape, start, stop = fragment.fqn, fragment.shape, fragment.start, fragment.stop
    if fragment.rows == 1:
        for low in range(start, stop, most):
            yield Fragment(name, shape, low, min(low + most, stop))
        return
    step = max(1, most // (stop - start)) if stop > start else fragment.rows
    for row in range(0, fragment.rows, step):
        shift = row * fragment.columns
        yield Fragment(name, shape, start + shift, stop + shift, 0, min(step, fragment.rows - row))


def write_file(path: Path, parts: Sequence[Part], metadata: Mapping[str, str]) -> tuple[File, list[Chunk]]:
    """Write a safetensors file and flush it to the disk; its checksums, and a chunk for each part in order."""
    # Widest first, so that every tensor is aligned.
    order = sorted(range(len(parts)), key=lambda i: -ITEM_BYTES[parts[i].dtype])
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    offset, offsets = 0, {}
    for i in order:
        part = parts[i]
        rows, width = part.fragment.rows, part.fragment.stop - part.fragment.start
        dtype, factor = in_files(part.dtype)
        content[f"{part.name}:{part.kind}:{part.fragment.start}"] = {
            "dtype": dtype,
            "shape": [rows, width * factor] if rows > 1 else [width * factor],
            "data_offsets": [offset, offset + part.bytes],
        }
        offsets[i] = offset
        offset += part.bytes
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    checksums = {}
    with open(path, "xb") as file:
        file.write(header)
        for i in order:
            raw = parts[i].dense().view(torch.uint8).numpy().data
            checksums[i] = hashlib.sha256(raw).hexdigest()
            file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    chunks = [Chunk(path.name, len(header) + offsets[i], checksums[i], part.fragment) for i, part in enumerate(parts)]
    return File(len(header) + offset, len(header), hashlib.sha256(header).hexdigest()), chunks


class Reader:
    """Reads chunks of the files of one checkpoint; every file's header is checked when it is opened.

    Raises `CheckpointError` naming the file for whatever is not what was written.
    """

    def __init__(self, folder: Path, files: Mapping[str, File]) -> None:
        self.folder, self.files = folder, files
        self._open: tuple[str, int] | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def check(self, name: str) -> None:
        """Length and header of a file."""
        self._descriptor(name)

    def verify(self, stored: Stored, chunk: Chunk, what: str) -> None:
        """Compare a chunk with its checksum."""
        digest, length = hashlib.sha256(), stored.bytes_of(chunk)
        for low in range(0, length, _HASH_BYTES):
            digest.update(self._bytes(chunk.file, chunk.offset + low, min(_HASH_BYTES, length - low)).numpy().data)
        self._compare(digest.hexdigest(), stored, chunk, what)

    def whole(self, stored: Stored, what: str) -> Tensor:
        """A whole tensor in its own shape, every chunk of it compared with its checksum."""
        result = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
        for chunk in stored.chunks:
            raw = self._bytes(chunk.file, chunk.offset, stored.bytes_of(chunk))
            self._compare(hashlib.sha256(raw.numpy().data).hexdigest(), stored, chunk, what)
            held = Fragment(chunk.fragment.fqn, stored.shape, 0, result.numel())
            for overlap in chunk.fragment.intersect(held):
                copy(flat(result), raw.view(result.dtype), overlap)
        return result

    def _compare(self, sha256: str, stored: Stored, chunk: Chunk, what: str) -> None:
        if sha256 != chunk.sha256:
            end = chunk.offset + stored.bytes_of(chunk)
            raise CheckpointError(
                f"{self.folder / chunk.file} is damaged: bytes {chunk.offset}..{end}, {what} "
                f"{chunk.fragment.start}..{chunk.fragment.stop}, are not those that were written"
            )

    def read(self, stored: Stored, chunk: Chunk, overlaps: Sequence[tuple[Tensor, Overlap]]) -> None:
        """Copy parts of a chunk into local buffers; as few bytes as lie around them are read."""
        low = min(o.source for _, o in overlaps)
        high = max(o.source + (o.rows - 1) * o.source_stride + o.columns for _, o in overlaps)
        size, dtype = ITEM_BYTES[stored.dtype], torch_dtype(stored.dtype)
        buffer, whole = overlaps[0]
        dense = whole.rows == 1 or whole.columns == whole.source_stride == whole.destination_stride
        if len(overlaps) == 1 and dense and is_flat(buffer) and buffer.dtype == dtype and buffer.device.type == "cpu":
            place = buffer.narrow(0, whole.destination, high - low).view(torch.uint8)  # nothing in between
            self._fill(chunk.file, chunk.offset + low * size, place)
            return
        content = self._bytes(chunk.file, chunk.offset + low * size, (high - low) * size).view(dtype)
        for buffer, o in overlaps:
            places = (o.rows, o.columns, o.source - low, o.source_stride, o.destination, o.destination_stride)
            copy(buffer, content, Overlap(*places))

    def _bytes(self, name: str, offset: int, length: int) -> Tensor:
        """Bytes of a file; they are good until the next are read."""
        if length > len(self._buffer):
            self._buffer = torch.empty(length, dtype=torch.uint8)
        content = self._buffer[:length]
        self._fill(name, offset, content)
        return content

    def _fill(self, name: str, offset: int, content: Tensor) -> None:
        descriptor, view, done = self._descriptor(name), content.numpy().data, 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.folder / name} cannot be read: {error.strerror}") from None
            if not count:
                raise CheckpointError(f"{self.folder / name} ends at byte {offset + done}; it was cut short")
            done += count

    def _descriptor(self, name: str) -> int:
        if self._open is None or self._open[0] != name:
            self.__exit__()
            try:
                descriptor = open_file(self.folder / name)
            except FileNotFoundError:
                raise CheckpointError(f"{self.folder / name} is missing") from None
            try:
                self._check_header(name, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            self._open = (name, descriptor)
        return self._open[1]

    def _check_header(self, name: str, descriptor: int) -> None:
        file, found = self.files[name], os.fstat(descriptor).st_size
        if found != file.bytes:
            raise CheckpointError(f"{self.folder / name} has {found} bytes and should have {file.bytes}")
        if hashlib.sha256(os.pread(descriptor, file.header_bytes, 0)).hexdigest() != file.header_sha256:
            raise CheckpointError(
                f"{self.folder / name} is damaged, or of another rank or another checkpoint: its header is not the one "
                f"that was written"
            )

"""Compare every byte of a checkpoint with its checksum, and go on where something is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gwt_dist.checkpoint.files import Reader
from gwt_dist.checkpoint.format import CheckpointError, Chunk, Index, Stored


@dataclass(frozen=True, slots=True)
class Damage:
    """One file that is not as it was written, or one chunk of it, and what it holds."""

    file: str
    tensors: tuple[str, ...]  # "weight of NAME" and the like; of a whole file all that have a chunk in it
    message: str


def damages(folder: Path, index: Index, progress: Callable[[int], object] = lambda count: None) -> Iterator[Damage]:
    """All that is damaged in the files of a checkpoint, in the order of the files. Needs no process group.

    Args:
        folder: The checkpoint, as `locate` returned it.
        index: Its index; the lengths of the files need not have been looked at.
        progress: Called with a number of bytes whenever so many are done; all in all the length of all files.
    """
    chunks: dict[str, list[tuple[str, Stored, Chunk]]] = {name: [] for name in index.files}
    for what, stored in index.stored():
        for chunk in stored.chunks:
            chunks[chunk.file].append((what, stored, chunk))
    with Reader(folder, index.files) as reader:
        for name, file in sorted(index.files.items()):
            left = file.bytes
            try:
                reader.check(name)
            except CheckpointError as error:
                yield Damage(name, tuple(dict.fromkeys(what for what, _, _ in chunks[name])), str(error))
            else:
                for what, stored, chunk in sorted(chunks[name], key=lambda one: one[2].offset):
                    try:
                        reader.verify(stored, chunk, f"{what},")
                    except CheckpointError as error:
                        yield Damage(name, (what,), str(error))
                    left -= stored.bytes_of(chunk)
                    progress(stored.bytes_of(chunk))
            progress(left)

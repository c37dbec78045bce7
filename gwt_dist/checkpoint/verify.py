"""Compare every byte of a checkpoint with its checksum, and go on where something is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gwt_dist.checkpoint.files import Reader
from gwt_dist.checkpoint.format import CheckpointError, Index, Piece, Stored


@dataclass(frozen=True, slots=True)
class Damage:
    """One file that is not as it was written, or one piece of it, and what it holds."""

    file: str
    tensors: tuple[str, ...]  # "weight of NAME" and the like; of a whole file all that have a piece in it
    message: str


def damages(folder: Path, index: Index, progress: Callable[[int], object] = lambda count: None) -> Iterator[Damage]:
    """All that is damaged in the files of a checkpoint, in the order of the files. Needs no process group.

    Args:
        folder: The checkpoint, as `locate` returned it.
        index: Its index; the lengths of the files need not have been looked at.
        progress: Called with a number of bytes whenever so many are done; all in all the length of all files.
    """
    pieces: dict[str, list[tuple[str, Stored, Piece]]] = {name: [] for name in index.files}
    for what, stored in index.stored():
        for piece in stored.pieces:
            pieces[piece.file].append((what, stored, piece))
    with Reader(folder, index.files) as reader:
        for name, file in sorted(index.files.items()):
            left = file.bytes
            try:
                reader.check(name)
            except CheckpointError as error:
                yield Damage(name, tuple(dict.fromkeys(what for what, _, _ in pieces[name])), str(error))
            else:
                for what, stored, piece in sorted(pieces[name], key=lambda one: one[2].offset):
                    try:
                        reader.verify(stored, piece, f"{what},")
                    except CheckpointError as error:
                        yield Damage(name, (what,), str(error))
                    left -= stored.bytes_of(piece)
                    progress(stored.bytes_of(piece))
            progress(left)

"""The folders of a run's checkpoints: which is the latest, what may be replaced, what is pruned.

    PATH/
      latest                    SHA-256 of the index that it names, in the form that `sha256sum -c` reads; moved last
      step-00000200/
        index.json              what is where, and every checksum
        index.json.sha256       its own
        rank-00000.safetensors  what rank 0 wrote
        rank-00001.safetensors
      .step-00000300.saving     being written, or left behind by a save that died; never read

Everything is written, flushed to the disk and then renamed, so a name that is there is complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from pathlib import Path

from gwt_dist.checkpoint.format import INDEX, CheckpointError, Index
from gwt_dist.checkpoint.parse import parse

LATEST = "latest"
_FOLDER = re.compile(r"step-([0-9]{8,12})")
_LATEST = re.compile(rf"([0-9a-f]{{64}})  (step-[0-9]{{8,12}})/{re.escape(INDEX)}\n")
_OF_DEEPSPEED = re.compile(r"\s*\w*step\d+\s*")  # the tag of a checkpoint, as it is if none is given
_BESIDE = re.compile(rf"([0-9a-f]{{64}})  {re.escape(INDEX)}\n")
_LARGEST_INDEX = 1 << 31


class NoCheckpoint(CheckpointError):
    """There is none where one was looked for."""


def name_of(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:08d}"


def file_of(rank: int) -> str:
    """Name of the file of a rank."""
    return f"rank-{rank:05d}.safetensors"


def checkpoints(path: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest step first."""
    found = [p for p in path.iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir()] if path.is_dir() else []
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def find(path: Path, which: str | int) -> tuple[Path, str]:
    """The folder of a checkpoint and the SHA-256 that its index must have.

    `which` is ``"latest"``, a step, or the name of a folder in `path`. Raises `CheckpointError` if it is not there.
    """
    if which == LATEST:
        line = _text(path / LATEST, "there is no checkpoint that was saved to the end")
        match = _LATEST.fullmatch(line)
        if match is None and _OF_DEEPSPEED.fullmatch(line):
            raise CheckpointError(
                f"{path} is a checkpoint of DeepSpeed ({LATEST} names {line.strip()}), which knows its number of ranks "
                f"and is not read here. Name one that gwt_dist.save wrote; of a Trainer with `portable` it is the "
                f"folder gwt_dist in checkpoint-N"
            )
        if match is None:
            raise CheckpointError(f"{path / LATEST} is damaged: it holds {line[:99]!r}; name a step to load instead")
        folder, sha256 = path / match[2], match[1]
        if not folder.is_dir():
            raise CheckpointError(f"{path / LATEST} names {folder.name}, which is not there; {_others(path)}")
        return folder, sha256
    name = name_of(which) if isinstance(which, int) else which
    if not _FOLDER.fullmatch(name):
        raise CheckpointError(f"which={which!r} is neither 'latest', a step, nor the name of a checkpoint")
    return path / name, _beside(path / name, _others(path))


def locate(path: Path) -> tuple[Path, str]:
    """As `find`, for what a user points at: a checkpoint's folder whatever its name, a run's folder, or its `latest`.

    Raises:
        NoCheckpoint: If nothing there looks like one.
        CheckpointError: If it is damaged, or was not saved to the end.
    """
    path = path.absolute()
    for run in (path.parent if path.name == LATEST else path, path / "checkpoints"):
        if os.path.lexists(run / LATEST):
            return find(run, LATEST)
    if any(os.path.lexists(path / name) for name in (INDEX, f"{INDEX}.sha256")):
        return path, _beside(path, "it was not saved to the end, or is damaged")
    if path.name.endswith(".saving") or _FOLDER.fullmatch(path.name) or any(path.glob("rank-*.safetensors")):
        raise CheckpointError(f"{path / INDEX} is missing: what is in {path} was not saved to the end")
    if checkpoints(path):
        raise CheckpointError(f"{path / LATEST} is missing; name one of the {_others(path)}")
    raise NoCheckpoint(
        f"{path} {'holds no checkpoint' if path.exists() else 'does not exist'}: name a folder with an {INDEX}, or one "
        f"with `{LATEST}` in it"
    )


def _beside(folder: Path, otherwise: str) -> str:
    line = _text(folder / f"{INDEX}.sha256", otherwise)
    match = _BESIDE.fullmatch(line)
    if match is None:
        raise CheckpointError(f"{folder / INDEX}.sha256 is damaged: it holds {line[:99]!r}")
    return match[1]


def _others(path: Path) -> str:
    names = [p.name for p in checkpoints(path)]
    return f"checkpoints there: {', '.join(names) or 'none'}"


def _text(path: Path, otherwise: str) -> str:
    try:
        return read(path, 4096).decode("ascii", "replace")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {otherwise}") from None


def read(path: Path, largest: int) -> bytes:
    """A whole file of at most `largest` bytes that is a file of its own, no link."""
    with os.fdopen(open_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise CheckpointError(f"{path} has {size} bytes, which is not what was written")
        return file.read(size)


def open_file(path: Path) -> int:
    """A descriptor to read a regular file; raises `CheckpointError` for a link, a folder, a device."""
    try:
        # Non-blocking: a pipe in the place of a file must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read, or is a link: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no regular file")
    return descriptor


def read_index(folder: Path, sha256: str | None = None, *, lengths: bool = True) -> Index:
    """The index of a checkpoint, checked against its checksum and the lengths of all files.

    Args:
        folder: A folder that `find` returned.
        sha256: The checksum that the index must have; None takes the one beside it.
        lengths: False believes what the index says of the files; who reads them must look.

    Raises:
        CheckpointError: If anything is missing, damaged, or of another version.
    """
    expected = sha256 if sha256 is not None else _beside(folder, "it was not saved to the end, or is damaged")

    def size(name: str) -> int:
        try:
            found = os.lstat(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name} is missing: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{folder / name} is no regular file")
        return found.st_size

    try:
        text = read(folder / INDEX, _LARGEST_INDEX)
    except FileNotFoundError:
        raise CheckpointError(f"{folder / INDEX} is missing") from None
    found = hashlib.sha256(text).hexdigest()
    beside = read(folder / f"{INDEX}.sha256", 4096) if (folder / f"{INDEX}.sha256").exists() else b""
    if beside != checksum_line(expected).encode():
        damaged = folder.parent / LATEST if beside == checksum_line(found).encode() else f"{folder / INDEX}.sha256"
        raise CheckpointError(f"{damaged} is missing or damaged: it has not the checksum of {folder / INDEX}")
    if found != expected:
        raise CheckpointError(f"{folder / INDEX} is damaged: its SHA-256 is not the one that was written")
    return parse(text, str(folder / INDEX), size if lengths else None)


def checksum_line(sha256: str, folder: str = "") -> str:
    """As `sha256sum` writes it."""
    return f"{sha256}  {folder}{INDEX}\n"


def start(path: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` in; clears what dead saves left behind.

    Raises `CheckpointError` if the step is there already, and not merely left by a save that died at its end.
    """
    path.mkdir(parents=True, exist_ok=True)
    final = path / name_of(step)
    if final.exists():
        newest = _step(find(path, LATEST)[0]) if (path / LATEST).exists() else -1
        if step <= newest:
            raise CheckpointError(f"{final} exists, and nothing in it is overwritten; save to another folder")
    for left in path.glob(".step-*"):
        shutil.rmtree(left)
    folder = path / f".{final.name}.saving"
    folder.mkdir()
    return folder


def finish(written: Path, text: bytes, keep: int | None) -> Path:
    """Put the index to the files of `written`, give it its name, move `latest`, and prune to the `keep` newest."""
    path = written.parent
    final = path / written.name.removeprefix(".").removesuffix(".saving")
    sha256 = hashlib.sha256(text).hexdigest()
    write(written / INDEX, text)
    write(written / f"{INDEX}.sha256", checksum_line(sha256).encode())
    sync_folder(written)
    if final.exists():  # of a save that died before it moved `latest`; see `start`
        _remove(final)
    os.rename(written, final)
    sync_folder(path)
    write(path / f".{LATEST}.saving", checksum_line(sha256, f"{final.name}/").encode())
    os.replace(path / f".{LATEST}.saving", path / LATEST)
    sync_folder(path)
    if keep:
        # Later ones are of a run that went back to an earlier step; they are not this run's to remove.
        for old in [p for p in checkpoints(path) if _step(p) < _step(final)][: 1 - keep or None]:
            _remove(old)
    return final


def _remove(folder: Path) -> None:
    """Take the name away first, so that a half-removed folder is none."""
    gone = folder.with_name(f".{folder.name}.removing")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def write(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Flush a file to the disk that something else wrote."""
    descriptor = open_file(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

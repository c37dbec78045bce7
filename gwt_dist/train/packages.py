"""Text that every machine with Python and a few packages has: their source, headers and documents.

A document is called as its bytes hash (SHA-256). That orders it, puts it on a side of the split and identifies it, so
that the same file twice, in another folder or in another environment is one document in one place. A cap keeps the
first documents of that order, which is a fair sample of all packages.
"""

from __future__ import annotations

import hashlib
import os
import site
import stat
import string
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MEGABYTE = 10**6
FILE_BYTES = MEGABYTE  # the largest file that is read; what is larger was written by a program
PROSE = (".md", ".rst", ".txt")
SOURCE = (".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh")
# Without .json and .js: most of them are data and minified programs. config-* holds what is left of the build of the
# interpreter, *.dist-info and *.egg-info lists of files and the same licences again and again.
SKIPPED = ("site-packages", "dist-packages", "__pycache__")
SKIPPED_ENDS = (".dist-info", ".egg-info")
LETTERS = 0.25  # least share of ASCII letters in a text; tables of numbers have less
# Of source, in bytes a line on average and in the longest: beyond them a program wrote it. The two numbers are those of
# Chen et al., "Evaluating Large Language Models Trained on Code" (2021), section 3.1.
MEAN_LINE, LONGEST_LINE = 100, 1000
_LETTERS = string.ascii_letters.encode()


def is_packages(spec: str) -> bool:
    """Whether `spec` is 'packages' or 'packages:N'; './packages' is a folder."""
    return spec.partition(":")[0] == "packages"


def megabytes_of(spec: str) -> int | None:
    """N of 'packages:N', None for 'packages'.

    Raises:
        ValueError: N is no whole number above 0.
    """
    _, colon, number = spec.partition(":")
    if not colon:
        return None
    if not (number.isascii() and number.isdigit() and int(number)):
        raise ValueError(
            f"corpus {spec!r}: expected 'packages' for all text of installed packages, or 'packages:N' with a whole "
            "number N of megabytes, at least 1"
        )
    return int(number)


def roots() -> list[Path]:
    """The folders that are there of: standard library, packages of this environment and of the interpreter it was made
    from, and Python's headers. Each once, whatever links lead to it.
    """
    places = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib", "include")]
    places += site.getsitepackages([sys.base_prefix, sys.base_exec_prefix])
    found = {os.path.realpath(place): None for place in places if place and os.path.isdir(place)}
    return [Path(place) for place in found]


def package_documents(megabytes: int | None) -> Iterator[tuple[str, str]]:
    """All documents under `roots`, or the first `megabytes` (10**6 bytes of UTF-8) of them.

    Yields:
        SHA-256 of the file's bytes in hexadecimal digits, ascending, and the text. What cannot be opened, is no UTF-8,
        larger than `FILE_BYTES`, without letters, or looks written by a program, is left out.
    """
    texts: dict[str, str] = {}
    for root in roots():
        for path in _files(str(root)):
            try:
                with open(path, "rb") as file:
                    raw = file.read()
            except OSError:
                continue
            name = hashlib.sha256(raw).hexdigest()
            if name not in texts and _written_by_people(raw, path.endswith(PROSE)):
                try:
                    texts[name] = raw.decode("utf-8")
                except UnicodeDecodeError:
                    continue
    left = None if megabytes is None else megabytes * MEGABYTE
    for name in sorted(texts):
        text = texts.pop(name)
        if left is not None:
            left -= len(text) if text.isascii() else len(text.encode("utf-8"))
            if left < 0:
                return
        yield name, text


def _files(folder: str) -> Iterator[str]:
    """Files of the right kind and size. Links to folders are not followed: they may lead back, or anywhere."""
    waiting = [folder]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:  # a folder that may not be read
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                name = entry.name
                if name not in SKIPPED and not name.endswith(SKIPPED_ENDS) and not name.startswith("config-"):
                    waiting.append(entry.path)
            elif entry.name.endswith(PROSE + SOURCE):
                try:
                    status = entry.stat()  # of a linked file: some installers link every file into the environment
                except OSError:  # a link that leads nowhere, or round
                    continue
                if stat.S_ISREG(status.st_mode) and status.st_size <= FILE_BYTES:
                    yield entry.path


def _written_by_people(raw: bytes, prose: bool) -> bool:
    if len(raw) - len(raw.translate(None, _LETTERS)) < max(1, LETTERS * len(raw)):
        return False
    if prose:  # a line may be a paragraph
        return True
    ends = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == ord("\n"))
    lines = np.diff(ends, prepend=-1, append=len(raw)) - 1
    return len(raw) <= MEAN_LINE * len(lines) and int(lines.max()) <= LONGEST_LINE

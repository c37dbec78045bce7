"""Text as documents, from files: the standard library of the running Python, installed packages, or a folder or glob.

Documents are in a fixed order, split into train and validation by a hash of their names (about one
in twenty is validation), and the SHA-256 of them all identifies the corpus in checkpoints.
Corpora that are streamed instead of read live in `stream.py`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gwt_dist.train.packages import is_packages, megabytes_of, package_documents

VALIDATION_SHARE = 20  # one document in so many
PIECE_CHARACTERS = 1 << 16  # a .txt file is cut into documents of about this length
STDLIB_SUFFIXES = (".py", ".txt", ".rst")
STDLIB_SKIPPED = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of both splits, and `sha256` over the names and texts of all of them."""

    source: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    sha256: str


def is_dataset_name(spec: str) -> bool:
    """Whether `spec` names a dataset ('owner/name', 'owner/name:config') and no local path.

    A path in a folder that exists here is never a dataset name, so that a mistyped folder is
    reported as such and nothing is fetched.
    """
    name = spec.partition(":")[0]
    parts = name.split("/")
    return (
        len(parts) == 2
        and all(parts)
        and not name.startswith((".", "~"))
        and not name.endswith((".txt", ".jsonl"))
        and not any(sign in name for sign in "*?[\\")
        and not Path(parts[0]).exists()
    )


def load_corpus(spec: str) -> Corpus:
    """Read the whole corpus that `spec` names: 'stdlib', 'packages', 'packages:N', a file, a folder, or a glob.

    Raises:
        ValueError: nothing there, no text in it, fewer than two documents, a broken line, or an N that is no number.
    """
    if is_packages(spec):
        return _split(spec, package_documents(megabytes_of(spec)))
    if spec == "stdlib":
        return _split(spec, _stdlib_documents(Path(sysconfig.get_path("stdlib"))))
    return _split(spec, _file_documents(spec))


def in_validation(name: str) -> bool:
    """Whether the document called `name` belongs to validation."""
    return _name_hash(name) % VALIDATION_SHARE == 0


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")


def _split(source: str, documents: Iterator[tuple[str, str]]) -> Corpus:
    named = [(name, text) for name, text in documents if text]
    if len(named) < 2:
        raise ValueError(
            f"the corpus {source!r} holds {len(named)} documents with text; at least 2 are needed, "
            "one to train on and one to validate on"
        )
    digest = hashlib.sha256()
    for name, text in named:
        raw = text.encode("utf-8")
        digest.update(f"{len(name.encode('utf-8'))}:{name}{len(raw)}:".encode())
        digest.update(raw)
    held_out = {name for name, _ in named if in_validation(name)}
    if not held_out or len(held_out) == len(named):
        # Few documents: without this a small corpus could have an empty side.
        held_out = {min((name for name, _ in named), key=_name_hash)}
    return Corpus(
        source=source,
        train=tuple(text for name, text in named if name not in held_out),
        validation=tuple(text for name, text in named if name in held_out),
        sha256=digest.hexdigest(),
    )


def _stdlib_documents(root: Path) -> Iterator[tuple[str, str]]:
    """One document per file; names are posix paths below `root`, in sorted order."""
    names = []
    for folder, folders, files in os.walk(root):
        # config-* holds what is left of the build of the interpreter, different on each platform.
        folders[:] = [f for f in folders if f not in STDLIB_SKIPPED and not f.startswith("config-")]
        names += [Path(folder, f).relative_to(root).as_posix() for f in files]
    for name in sorted(names):
        if name.endswith(STDLIB_SUFFIXES):
            try:
                yield name, (root / name).read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # the test suite of Python holds files in other encodings on purpose


def _file_documents(spec: str) -> Iterator[tuple[str, str]]:
    path = Path(spec).expanduser()
    if path.is_dir():
        root, files = path, [p for p in path.rglob("*") if p.is_file()]
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
        files = [p for p in found if p.is_file()]
        if not files:
            raise ValueError(
                f"corpus {spec!r}: no such folder, file or glob match; give 'stdlib', 'packages', a folder of "
                ".txt or .jsonl files, a glob, or a dataset name such as 'allenai/c4:en'"
            )
        root = Path(os.path.commonpath([p.parent for p in files]))
    texts = sorted(p for p in files if p.suffix in (".txt", ".jsonl"))
    if not texts:
        raise ValueError(
            f"corpus {spec!r} holds {len(files)} files, none of them .txt or .jsonl; "
            "put text there or name another place"
        )
    for file in sorted(texts, key=lambda p: p.relative_to(root).as_posix()):
        name = file.relative_to(root).as_posix()
        yield from _jsonl(file, name) if file.suffix == ".jsonl" else _pieces(file, name)


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from None


def _jsonl(file: Path, name: str) -> Iterator[tuple[str, str]]:
    # Not splitlines(): a JSON string may hold U+2028 and other separators unescaped.
    for number, line in enumerate(_decoded(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not a line of JSON: {error}") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{file}:{number}: expected an object with a "text" string, found {line[:60]!r}')
        yield f"{name}:{number}", text


def _pieces(file: Path, name: str) -> Iterator[tuple[str, str]]:
    """A text cut at line ends, so that one long file can still be split in two."""
    text, start, number = _decoded(file), 0, 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARACTERS) + 1 or len(text)
        yield f"{name}#{number}", text[start:end]
        start, number = end, number + 1

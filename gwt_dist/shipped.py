"""The configurations that come with the package: `gwt_dist/configs`, in a repository a link to its `configs`.

A wheel has them as package data, so that names such as ``7b`` and paths such as ``configs/zero2.json`` mean the same
files wherever a command is called.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
CONFIGS = "configs"


def find(name: str | Path) -> Path | None:
    """The file at `name` from the working directory, or a shipped one if `name` begins with ``configs/``; or None."""
    path = Path(name)
    shipped = [_PACKAGE / path] if path.parts[:1] == (CONFIGS,) else []
    return next((candidate for candidate in (path, *shipped) if candidate.is_file()), None)


def names(folder: str, suffix: str) -> list[str]:
    """Bare names of the shipped files of a folder such as ``configs/models``, in order."""
    return sorted(path.stem for path in (_PACKAGE / folder).glob(f"*{suffix}"))

"""A DeepSpeed JSON from a file or from text, by the rules of DeepSpeed's own reader.

DeepSpeed reads with `hjson`: JSON with comments, commas before a closing bracket and keys without quotes, in which no
key may stand twice. Its own function is not called, as it takes seconds to import and names neither file nor key path.
"""

from __future__ import annotations

import base64
import binascii
import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def read(config: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON of a file, or of its text in base64, in which DeepSpeed's autotuner passes one.

    Raises:
        ValueError: No such file, a file that cannot be read, what is not JSON by DeepSpeed's reader (with the line), a
            key that stands twice, or no object.
    """
    if os.path.exists(config):  # False for text that is too long to be a name
        where = f"DeepSpeed configuration {str(config)!r}"
        if os.path.isdir(config):
            raise ValueError(f"{where} is a folder; name the JSON file itself")
        try:
            text = Path(config).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is no text ({error}), so it is no JSON; name another file") from error
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error.strerror}") from error
        return parse(text, where)
    try:
        text = base64.urlsafe_b64decode(os.fspath(config)).decode("utf-8")
        return parse(text, "the DeepSpeed configuration in base64")
    except (binascii.Error, UnicodeDecodeError):
        raise ValueError(
            f"DeepSpeed configuration {str(config)!r} is not a file, nor the text of one in base64"
        ) from None


def parse(text: str, where: str) -> dict[str, Any]:
    """The object that `text` is; raises `ValueError`, which begins with `where`, as `read` does."""
    try:
        import hjson
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where} cannot be read: DeepSpeed reads it with the package hjson, which is not installed here. "
            f"pip install hjson"
        ) from error
    try:
        found = hjson.loads(text, object_pairs_hook=_Object)
    except hjson.HjsonDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds {type(found).__name__}, not an object")
    for key in _twice(found, ""):
        raise ValueError(
            f"{where} has the key {key} more than once, and which one is meant cannot be told; keep one of them"
        )
    return {key: _plain(inner) for key, inner in found.items()}


def settings_of(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The JSON as a dict of its own: a mapping is copied, anything else is given to `read`."""
    return copy.deepcopy(dict(config)) if isinstance(config, Mapping) else read(config)


class _Object(dict[str, Any]):
    """An object as it was read, with the keys that stand in it more than once."""

    def __init__(self, pairs: Iterable[tuple[str, Any]]) -> None:
        pairs = list(pairs)
        super().__init__(pairs)
        written = [key for key, _ in pairs]
        self.twice = [key for key in self if written.count(key) > 1]


def _twice(found: Any, path: str) -> Iterator[str]:
    if isinstance(found, _Object):
        yield from (joined(path, key) for key in found.twice)
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, inner in items:
        yield from _twice(inner, joined(path, key))


def _plain(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _plain(inner) for key, inner in found.items()}
    return [_plain(inner) for inner in found] if isinstance(found, list) else found


def joined(path: str, key: str | int) -> str:
    """The path of a key of an object, or of an item of a list, as messages write it."""
    return f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}" if path else str(key)

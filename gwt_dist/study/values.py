"""Values of a study file: what they must be, told with the key and the file."""

from __future__ import annotations

import math
from typing import Any


def entries(value: Any, key: str, where: str) -> list[Any]:
    """A list of anything."""
    if not isinstance(value, list):
        raise ValueError(f"{key}={value!r} in {where}: expected a list")
    return value


def number(value: Any, key: str, where: str) -> float:
    """A finite number; YAML reads '1e-3' as text."""
    try:
        if isinstance(value, bool):
            raise ValueError
        found = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}={value!r} in {where}: expected a number") from None
    if not math.isfinite(found):
        raise ValueError(f"{key}={value!r} in {where} is not finite")
    return found


def flag(value: Any, key: str, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} in {where}: expected true or false")
    return value


def whole(value: Any, key: str, where: str, at_least: int) -> int:
    """A whole number."""
    found = number(value, key, where)
    if found != int(found) or found < at_least:
        raise ValueError(f"{key}={value!r} in {where}: expected a whole number, at least {at_least}")
    return int(found)


def text(value: Any, key: str, where: str) -> str:
    """Text, empty for the source of a row alone."""
    if not isinstance(value, str) or (not value and key != "source"):
        raise ValueError(f"{key}={value!r} in {where}: expected text")
    return value


def ascending(value: Any, key: str, least: str, here: str) -> tuple[float, ...]:
    """Numbers that rise, of a list or of one number; `least` is "above 0" or "at least 0"."""
    values = tuple(number(one, key, here) for one in (value if isinstance(value, list) else [value]))
    wrong = [one for one in values if one < 0 or (one == 0 and least == "above 0")]
    if not values or wrong or list(values) != sorted(set(values)):
        raise ValueError(f"{key}={value} in {here} must be numbers {least}, each larger than the one before")
    return values

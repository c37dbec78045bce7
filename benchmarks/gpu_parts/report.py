"""The result of a run: one Markdown and one JSON, written anew with each row, so that a cut-off run has them.

A run has files of its own, and does not write over those of another of the same day.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

from gpu_parts.setting import Row


class Report:
    """Rows by part."""

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc)
        names = (f"{now:%Y-%m-%d}-gpu{f'-{number}' if number > 1 else ''}" for number in count(1))
        self._path = next(path for name in names if not (path := folder / name).with_suffix(".json").exists())
        self._found: dict[str, Any] = {
            "started": f"{now:%Y-%m-%d %H:%M} UTC",
            "arguments": arguments,
            "complete": False,
            "failed": [],
            "parts": {},
        }
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def failed(self) -> list[str]:
        """Names of the parts with a check that failed."""
        return list(self._found["failed"])

    @property
    def paths(self) -> str:
        """Of both files."""
        return f"{self._path}.md, {self._path}.json"

    def begin(self, name: str, title: str, legend: str = "") -> None:
        """Rows of this part come next; `legend` says what their columns are."""
        self._found["parts"][name] = {"title": title, "legend": legend, "seconds": None, "rows": [], "unchecked": 0}
        self._write()

    def add(self, name: str, row: Row, checks: bool) -> None:
        """Take a row, and write."""
        part = self._found["parts"][name]
        part["rows"].append(row)
        part["unchecked"] += int(checks and "ok" not in row and "error" not in row)
        if checks and (row.get("error") or row.get("ok") is False) and name not in self._found["failed"]:
            self._found["failed"].append(name)
        self._write()

    def end(self, name: str, seconds: float) -> None:
        """The part is over."""
        self._found["parts"][name]["seconds"] = round(seconds, 1)
        self._write()

    def complete(self) -> None:
        """All parts are over."""
        self._found["complete"] = True
        self._write()

    def _write(self) -> None:
        for suffix, text in ((".json", json.dumps(self._found, indent=1)), (".md", "\n".join(self._lines()))):
            temporary = self._path.with_suffix(f"{suffix}.part")
            temporary.write_text(text + "\n")
            temporary.replace(self._path.with_suffix(suffix))

    def _lines(self) -> list[str]:
        found = self._found
        lines = [f"# benchmarks/gpu.py, {found['arguments'].get('device', '')}, {found['started']}", ""]
        unchecked = [f"{n} of {name}" for name, part in found["parts"].items() if (n := part["unchecked"])]
        lines += [f"Failed: {', '.join(found['failed']) or 'nothing'}.{'' if found['complete'] else ' Not complete.'}"]
        if unchecked:
            lines[-1] += f" Rows that checked nothing: {', '.join(unchecked)}; their notes say why."
        for part in found["parts"].values():
            took = "" if part["seconds"] is None else f" ({part['seconds']:.0f} s)"
            lines += ["", f"## {part['title']}{took}", "", *([part["legend"], ""] if part["legend"] else [])]
            lines += table(part["rows"])
        return lines


def table(rows: list[Row]) -> list[str]:
    """Rows in Markdown: a column for each key that any of them has, in the order in which they came."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return ["Nothing."]
    lines = [f"| {' | '.join(column.replace('_', ' ') for column in columns)} |", "| --- " * len(columns) + "|"]
    return lines + [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")

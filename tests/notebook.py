"""Runs the cells of a notebook without Jupyter; `python tests/notebook.py NOTEBOOK` writes what they print into it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def cells(path: Path) -> list[dict[str, Any]]:
    """Its cells of code, in order."""
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def printed(path: Path) -> list[str]:
    """What each cell of code prints, run in order in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for number, cell in enumerate(cells(path), 1):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
        found.append(output.getvalue())
    return found


def stored(cell: dict[str, Any]) -> str:
    """What the cell printed when it was written."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def write(path: Path) -> None:
    """Put what the cells print into the notebook."""
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(zip(code, printed(path), strict=True), 1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell |= {"execution_count": number, "outputs": [stream] if text else []}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

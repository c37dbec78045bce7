"""The support matrix of `docs/engines.md`, written by the tests' own results.

A test that shows what an engine can do says so::

    @pytest.mark.support("FSDP2", "uneven rows, ranks without rows")                     # the update is exact
    @pytest.mark.support("DeepSpeed", "elastic_checkpoint", outcome="refused")

``make support`` runs the suite and writes the table: a row is what it says if every test that is marked with it passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[1] / "docs" / "engines.md"
START, END = "<!-- written by make support: -->", "<!-- end -->"
OUTCOMES = ("exact", "refused", "not on CPU")
Row = tuple[str, str, str]  # engine, feature, outcome


def rows_of(items: Iterable[pytest.Item]) -> dict[Row, list[str]]:
    """The rows that tests are marked with, and the ids of the tests."""
    rows: dict[Row, list[str]] = {}
    for item in items:
        for mark in item.iter_markers("support"):
            engine, feature = mark.args
            outcome = mark.kwargs.get("outcome", "exact")
            assert outcome in OUTCOMES, f"{item.nodeid}: outcome {outcome!r} is none of {OUTCOMES}"
            rows.setdefault((engine, feature, outcome), []).append(item.nodeid)
    return rows


def table(rows: dict[Row, list[str]], failed: set[str]) -> str:
    """The rows in Markdown, those with a test in `failed` as failed."""
    lines = ["| engine | what | update of one process | tests |", "| --- | --- | --- | --- |"]
    for (engine, feature, outcome), tests in sorted(rows.items(), key=lambda row: row[0][0]):
        shown = "FAILED" if failed.intersection(tests) else outcome
        lines.append(f"| {engine} | {feature} | {shown} | {len(tests)} |")
    return "\n".join(lines)


def write(content: str) -> None:
    """Put the table in its place in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{START}\n{content}\n{END}{after}", encoding="utf-8")


def written() -> set[tuple[str, ...]]:
    """Rows of the document: engine, feature, outcome."""
    _, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    lines = rest.partition(END)[0].strip().splitlines()[2:]
    return {tuple(cell.strip() for cell in line.strip("|").split("|"))[:3] for line in lines}

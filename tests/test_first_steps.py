"""examples/first_steps.ipynb: its cells run, print what stands beneath them, and say what is so."""

from __future__ import annotations

import re
from pathlib import Path

from notebook import cells, printed, stored

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_steps.ipynb"


def losses(text: str) -> list[float]:
    """With three digits, as the cell that trains prints them."""
    return [float(number) for number in re.findall(r"\b\d\.\d{3}\b", text)]


def test_the_notebook_runs_and_prints_what_it_shows() -> None:
    shown = [stored(cell) for cell in cells(NOTEBOOK)]
    found = printed(NOTEBOOK)
    planned, size, groups, trained, resumed = found
    assert [planned, size, groups, resumed] == shown[:3] + shown[4:]
    assert "differ by 0.0 from" in resumed
    assert len(losses(trained)) == len(losses(shown[3])) == 14
    for here, there in zip(losses(trained), losses(shown[3]), strict=True):
        assert abs(here - there) < 0.05  # other processors round otherwise
    assert losses(trained)[-1] < losses(trained)[1] - 2
    assert trained.splitlines()[-1] == shown[3].splitlines()[-1]  # the bytes of state

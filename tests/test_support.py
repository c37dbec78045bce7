"""The support matrix in the documents is that of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import rows_of, written


def test_the_documented_support_matrix_is_that_of_the_tests(request: pytest.FixtureRequest) -> None:
    marked = set(rows_of(request.session.items))
    documented = written()
    assert marked <= documented, f"run `make support`; missing in docs/engines.md: {sorted(marked - documented)}"
    collected = {Path(item.path).name for item in request.session.items}
    if collected >= {path.name for path in Path(__file__).parent.glob("test_*.py")}:
        assert documented <= marked, f"run `make support`; no test shows {sorted(documented - marked)}"

"""For pytest: keeps its share of the tests that need a GPU, and writes how each ended as soon as it has."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from unittest.mock import MagicMock

import pytest

from gpu_parts.suite import REASON

# Modules of the tests import it, for tests that are not kept.
if importlib.util.find_spec("hypothesis") is None:
    sys.modules["hypothesis"] = sys.modules["hypothesis.strategies"] = MagicMock()


def pytest_configure(config: pytest.Config) -> None:
    """Marks of the suite, whose configuration is not read."""
    for mark in ("faults", "matrix", "support(engine, feature, outcome)", "timeout"):
        config.addinivalue_line("markers", mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs without a GPU, and what other processes run."""
    number, count = map(int, os.environ["GPU_SHARE"].split("/"))
    kept = [item for item in items if any(m.kwargs.get("reason") == REASON for m in item.iter_markers("skipif"))]
    kept = kept[number::count]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test."""
    if report.when != "call" and report.outcome == "passed":
        return
    message = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = " ".join(str(crash.message if crash else report.longrepr).split())[:240]
    line = {"test": report.nodeid.rpartition("/")[2], "outcome": report.outcome, "message": message}
    with open(os.environ["GPU_OUTCOMES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

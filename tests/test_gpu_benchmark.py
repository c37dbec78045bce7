"""`benchmarks/gpu.py`: the code of all its parts on a CPU at tiny shapes, and what is left of a run that breaks."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = "machine", "tests", "engines", "slices", "steps", "capture", "products", "activations", "training"


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def test_every_part_runs_on_a_cpu_and_writes_its_rows(tmp_path: Path) -> None:
    done = started(str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--smoke", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-gpu.json")
    found = json.loads(path.read_text())
    assert sorted(found) == ["arguments", "complete", "failed", "parts", "started"]
    assert found["complete"] and found["failed"] == []
    assert tuple(found["parts"]) == PARTS
    rows: dict[str, list[dict[str, Any]]] = {name: part["rows"] for name, part in found["parts"].items()}
    assert not [row for its in rows.values() for row in its if "error" in row]
    assert {"torch", "triton", "deepspeed", "GPU", "copy"} <= {row["case"] for row in rows["machine"]}
    assert rows["tests"][0]["case"].endswith(
        " tests of test_activations_triton.py, test_formats_triton.py, test_symmetric.py, test_triton.py, "
        "test_triton_travel.py"
    )
    engines = [row for row in rows["engines"] if "ok" in row]
    assert len(engines) == 11 and all(row["ok"] and 0 < row["error to fp64"] < 1e-3 for row in engines)
    assert {(row["ranks"], row["case"]) for row in engines} >= {(1, "plain"), (2, "FSDP1 + fuse_backward")}
    assert all(row["n with the same bits"] == "1-16" for row in rows["slices"]) and len(rows["slices"]) == 8
    measured = {row["optimizer"] for row in rows["steps"] if row.get("ms", 0) > 0 and row["state B/param"] > 0}
    assert measured >= {"AdamW fused", "energy-2", "paper-2", "orthogonal-1", "torch.optim.Muon"}
    assert [row["ok"] for row in rows["capture"]] == [True] * 5
    assert [row["ok"] for row in rows["activations"]] == [True] * 2
    assert all(row["pack ms"] > 0 and row["unpack, share of copy"] > 0 for row in rows["activations"])
    # Times are of this machine as it is now; that there are any is what counts here.
    assert all(row["share of the iteration"] > 0 for row in rows["training"]) and len(rows["training"]) == 4
    text = path.with_suffix(".md").read_text()
    assert "Failed: nothing. Rows that checked nothing: 1 of tests, 1 of engines; " in text
    assert text.count("\n## ") == len(PARTS) and "`ratio`: to fused AdamW" in text


BREAKS = """
import os, subprocess, sys, time
from pathlib import Path
import torch
import gpu
from gpu_parts import Part
from gpu_parts.report import Report
from gpu_parts.setting import Setting

def wrong(setting):
    yield {"case": "first", "ok": False}

def dies(setting):
    yield {"case": "first", "ok": True}
    os.abort()

def hangs(setting):
    yield {"case": "first", "ok": True, "pids": [os.getpid(), subprocess.Popen(["sleep", "20"]).pid]}
    time.sleep(20)

def raises(setting):
    yield {"case": "first", "ok": True}
    raise ValueError("a reason")

report = Report(Path(sys.argv[1]), {})
for function in wrong, dies, hangs, raises:
    for checks in (False, True):
        name = f"{function.__name__} {checks}"
        report.begin(name, name)
        deadline = time.monotonic() + (-2 if function is hangs else 60)  # what is left of a part comes on top
        rows = gpu.run(Part(name, name, function, 1, checks), Setting(torch.device("cpu"), True, deadline), report)
        for pid in rows[0].get("pids", ()):  # ended, if not yet waited for
            state = Path(f"/proc/{pid}/stat")
            if state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
                print("goes on:", pid)
"""


def test_a_part_that_breaks_keeps_its_rows_and_fails_the_run(tmp_path: Path) -> None:
    done = started("-c", BREAKS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-gpu.json")
    found = json.loads(path.read_text())
    assert not found["complete"]
    assert found["failed"] == ["wrong True", "dies True", "hangs True", "raises True"]
    said = {name: [row.get("error") for row in part["rows"]] for name, part in found["parts"].items()}
    assert all(part["rows"][0]["case"] == "first" for part in found["parts"].values())
    assert "goes on" not in done.stdout
    assert said["dies False"] == [None, "its process ended with exit code -6"]
    assert said["hangs False"] == [None, "stopped: no row within its time"]
    assert said["raises False"] == [None, "ValueError: a reason"]


def test_a_run_leaves_the_results_of_another_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_parts.report import Report

    for number in range(3):
        report = Report(tmp_path, {"device": f"device {number}"})
        report.begin("part", "part")
    said = [path.read_text() for path in sorted(tmp_path.glob("*.md"), key=lambda path: path.stem)]
    assert [f"device {number}" in text for number, text in enumerate(said)] == [True] * 3


def test_the_capture_in_the_documents_is_that_of_the_benchmark() -> None:
    """Its statements, without comments; a GPU has run them when the benchmark has."""
    page = (BENCHMARKS.parent / "docs" / "kernels.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module = ast.parse((BENCHMARKS / "gpu_parts" / "capture.py").read_text())
    (captured,) = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "captured"]
    documented = [ast.dump(statement) for statement in ast.parse(block).body]
    assert [ast.dump(s) for s in captured.body[1:-1]] == documented[: len(captured.body) - 2]

"""The tests that need a GPU, in processes of their own, each with its own row if it fails.

Most of their time is Triton's compiler, which takes one core: several processes share the tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_parts.setting import Row, Setting

ROOT = Path(__file__).parents[2]
MARK = "needs_gpu"  # of a test that needs a GPU ...
REASON = "no GPU here"  # ... and the reason that it is skipped for without one
MOST = 8  # processes: each has a context on the GPU


def rows(setting: Setting) -> Iterator[Row]:
    """Run every test that is skipped without a GPU, and say how each kind ended."""
    missing = [package for package in ("pytest", "numpy") if importlib.util.find_spec(package) is None]
    if missing:
        yield {"case": "pytest", "note": f"not run: {', '.join(missing)} not installed"}
        return
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if MARK in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pytest.ini").write_text("[pytest]\n")
        # The suite's own configuration names plugins, and its conftest packages, which need not be here.
        command = [sys.executable, "-m", "pytest", "-q", "-c", f"{folder}/pytest.ini", f"--rootdir={ROOT}"]
        command += ["--noconftest", "-p", "no:cacheprovider", "-p", "gpu_parts.suite_plugin", *files]
        paths = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        seconds, count = max(1.0, setting.left() - 2), max(1, min(MOST, (os.cpu_count() or 1) // 2))

        def share(number: int) -> tuple[str, str]:
            its = {"GPU_OUTCOMES": f"{folder}/outcomes-{number}", "GPU_SHARE": f"{number}/{count}"}
            return _ended(command, environment | its, seconds)

        with ThreadPoolExecutor(count) as pool:
            ended, said = max(pool.map(share, range(count)), key=lambda one: bool(one[0]))
        written = sorted(Path(folder).glob("outcomes-*"))
        found = [json.loads(line) for path in written for line in path.read_text().splitlines()]
    for one in found:
        if one["outcome"] == "failed":
            yield {"case": one["test"], "ok": False, "error": one["message"]}
    counts = Counter(one["outcome"] for one in found)
    kinds = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none ran"
    row: Row = {"case": f"{len(found)} tests of {', '.join(Path(file).name for file in files)}", "note": kinds}
    stand_ins = [name for name in ("hypothesis",) if importlib.util.find_spec(name) is None]
    if stand_ins:
        row["note"] += f"; {', '.join(stand_ins)} not installed, which these tests import and do not use"
    if ended or not found:
        row["error"] = f"pytest {ended or 'found no test'}: {said}"
    elif setting.on_gpu:
        row["ok"] = set(counts) == {"passed"}
    yield row


def _ended(command: list[str], environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """How a run of pytest ended, empty if it ran all tests, and the last line that it said."""
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"was stopped after {seconds:.0f} s", "what had ended by then is counted"
    print(done.stdout, flush=True)
    lines = done.stdout.strip().splitlines()
    fine = done.returncode in (0, 1, 5)  # 5: there was no test for it
    return "" if fine else f"exited with {done.returncode}", lines[-1] if lines else ""

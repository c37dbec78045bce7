"""A whole study: what its runs measure and keep, what it refuses, and the command around it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from documents import blocks
from gwt_dist.cli.app import main
from gwt_dist.study import compare as whole
from gwt_dist.study.compare import compare, identity
from gwt_dist.study.config import Batch, read_study, study_from
from gwt_dist.study.held import bytes_held
from gwt_dist.study.optimizers import ENTRIES
from gwt_dist.study.plots import front
from gwt_dist.study.results import read_results
from gwt_dist.study.run import rate_factor
from gwt_dist.study.table import lines_of, unequal
from small_study import ROWS, settings_in


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return settings_in(tmp_path)


def numbers(path: Path) -> dict[str, Any]:
    """What training gave, by run: all that must not depend on when and where it ran."""
    keys = (
        "row",
        "lr",
        "seed",
        "steps",
        "losses",
        "validation_loss",
        "state_bytes",
        "data_checksum",
        "weights_checksum",
    )
    return {key: [line.get(k) for k in keys] for key, line in read_results(path / "results.jsonl")[0].items()}


def test_a_study_that_was_interrupted_equals_one_that_was_not(settings: dict[str, Any], tmp_path: Path) -> None:
    study = study_from(settings, "here", "small")
    ended = compare(study, tmp_path / "whole", jobs=0)
    assert (ended.made, ended.left) == ((2 + 3 + 1) + (1 + 1), 0)
    assert compare(study, tmp_path / "whole", jobs=0).made == 0

    lines = (tmp_path / "whole" / "results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "results.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:50])
    assert compare(study, tmp_path / "cut", jobs=2, seconds=0).left > 0
    assert compare(study, tmp_path / "cut", jobs=2).made == 5  # in processes of their own
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert read_results(tmp_path / "cut" / "results.jsonl")[1] == 1  # the line that was cut

    # All rows began alike and read alike.
    results = read_results(tmp_path / "whole" / "results.jsonl")[0]
    assert unequal(results.values()) == []
    assert len({line["weights_checksum"] for line in results.values()}) == 2  # seeds
    damaged = [dict(line) for line in results.values()]
    damaged[-1]["data_checksum"] += 1
    assert len(unequal(damaged)) == 1

    by_row = {line.row: line for line in lines_of(study, identity(study), results, study.batches[0])}
    matrices = 4 * 16 * 16 + 3 * 16 * 24
    rest = 2 * 258 * 16 + 3 * 16
    tensors = 7 + 5  # matrices and the rest; a step of 4 bytes each, and a norm of 4 where GWT has one
    assert by_row["adamw"].state == pytest.approx((8 * (matrices + rest) + 4 * tensors) / (matrices + rest))
    assert 2.0 <= by_row["energy"].matrix_state < 2.0 + 8 * 7 / matrices + 1e-9
    assert [line.seeds for line in by_row.values()] == [2, 2]


def test_a_worker_ends_when_the_study_is_killed(settings: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of a run, which would go on for minutes. Between two runs a worker sees that its pipe is closed."""
    begun, log = tmp_path / "begun", tmp_path / "log"
    (tmp_path / "endless.py").write_text(
        "import os, pathlib, time\n"
        "def stay(matrices, rest, lr, rest_lr, options):\n"
        f"    pathlib.Path({str(begun)!r}).write_text(f'{{os.getpid()}}.')\n"
        "    time.sleep(600)\n"
    )
    file = tmp_path / "small.json"
    file.write_text(json.dumps(settings | {"rows": [{"name": "endless", "optimizer": "endless:stay", "lr": 0.1}]}))
    command = [sys.executable, "-m", "gwt_dist", "compare", str(file), "--jobs", "1", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with log.open("w") as told:
        study = subprocess.Popen(command, env=environment, stdout=told, stderr=told, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (begun.exists() and begun.read_text().endswith(".")):
            assert study.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        worker = psutil.Process(int(begun.read_text()[:-1]))
        assert worker.ppid() == study.pid
        study.kill()
        study.wait()
        deadline = time.monotonic() + 10
        with contextlib.suppress(psutil.NoSuchProcess):
            while worker.status() != psutil.STATUS_ZOMBIE:  # its new parent may be slow to take notice
                assert time.monotonic() < deadline, "the worker outlives its study by 10 seconds"
                time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):  # whatever the study has started is of its session
            os.killpg(study.pid, signal.SIGKILL)
        study.wait()


def test_a_row_that_fails_is_told_and_the_others_go_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange.py").write_text(
        "import torch\n"
        "def broken(matrices, rest, lr, rest_lr, options):\n    raise RuntimeError('no such thing')\n"
        "def wild(matrices, rest, lr, rest_lr, options):\n"
        "    return torch.optim.SGD([*matrices.values(), *rest.values()], lr=1e30)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [
        {"name": "broken", "optimizer": "strange:broken", "lr": [0.1, 0.2]},
        {"name": "wild", "optimizer": "strange:wild", "lr": [0.1]},
        {"name": "absent", "optimizer": "no_such_package:thing", "lr": [0.1]},
        ROWS[1],
    ]
    study = study_from(settings | {"rows": rows, "seeds": [0]}, "here")
    compare(study, tmp_path / "out", jobs=0)
    results = read_results(tmp_path / "out" / "results.jsonl")[0]
    lines = {line.row: line for line in lines_of(study, identity(study), results, study.batches[0])}
    assert lines["adamw"].loss is not None and lines["broken"].loss is None
    assert "RuntimeError: no such thing" in lines["broken"].notes
    assert "loss" in lines["wild"].notes and {r["status"] for r in results.values() if r["row"] == "wild"} == {
        "diverged"
    }
    assert "cannot be imported" in lines["absent"].notes


def test_a_study_on_a_gpu_has_other_runs_and_is_refused_without_one(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {}
    for device, found in (("cpu", False), ("auto", False), ("auto", True), ("cuda", False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        shared[device, found] = identity(study_from(settings | {"device": device}, "here"))
    assert shared["cpu", False] == shared["auto", False] != shared["auto", True] == shared["cuda", False]
    assert "device" not in shared["cpu", False]  # runs that were recorded before there was the key
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        compare(study_from(settings | {"device": "cuda"}, "here"), tmp_path, jobs=0)


@pytest.mark.parametrize("name", ["gpu-60m", "gpu-130m"])
def test_studies_of_a_gpu_at_tiny_shapes(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Each row of them, two steps on a CPU, in bf16 and on a BPE."""
    study, small = read_study(name), study_from(settings, "here")
    shapes = {"rank": 4, "num_embeds": 16, "num_heads": 2}
    slow = [row for row in study.rows if row.optimizer.startswith("adam-8bit")]  # theirs compile for half a minute
    rows = [
        dataclasses.replace(
            row,
            **{axis: getattr(row, axis)[:1] for axis in ("lr", "rest_lr", "weight_decay")},
            options={key: shapes.get(key, value) for key, value in row.options.items()},
        )
        for row in study.rows
        if row not in slow
    ]
    tiny = dataclasses.replace(small, rows=tuple(rows), batches=(Batch(tokens=32, steps=2),), seeds=(0,))
    tiny = dataclasses.replace(tiny, tokenizer="bpe:300", precision=study.precision, reference=study.reference)
    assert (study.device, study.compile, study.corpus) == ("auto", True, "packages:400")
    compare(tiny, tmp_path / "out", jobs=0)
    results = read_results(tmp_path / "out" / "results.jsonl")[0]
    found = {line.row: line for line in lines_of(tiny, identity(tiny), results, tiny.batches[0])}
    lacking = {line["row"] for line in results.values() if line["status"] == "unavailable"}
    assert found.keys() - lacking == {name for name, line in found.items() if line.loss is not None}
    assert {
        row.name for row in rows if ENTRIES[row.optimizer].package in ("torch", "gwt_dist")
    } <= found.keys() - lacking


def test_a_model_is_compiled_once_for_all_runs(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    row = {"name": "a", "optimizer": "adamw", "lr": 0.01}
    study = study_from(settings | {"rows": [row], "compile": True}, "here")
    torch._dynamo.reset()
    counters.clear()
    compare(study, tmp_path / "compiled", jobs=0)
    assert counters["stats"]["unique_graphs"] == 2  # training and validation, of two seeds
    compare(study_from(settings | {"rows": [row]}, "here"), tmp_path / "plain", jobs=0)
    plain, compiled = (list(numbers(tmp_path / name).values()) for name in ("plain", "compiled"))
    assert len(plain) == 2 and plain == compiled


def test_what_is_held_counts_projections_and_not_weights() -> None:
    class Projector:
        def __init__(self) -> None:
            self.matrix = torch.zeros(10, 10)[:, :3]  # GaLore: a view of a whole decomposition

    weight = torch.nn.Parameter(torch.zeros(10, 10))
    weight.grad = torch.ones(10, 10)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    optimizer.step()
    assert bytes_held([vars(optimizer)], [weight]) == 800 + 4
    optimizer.state[weight]["projector"] = Projector()
    optimizer.state[weight]["again"] = optimizer.state[weight]["exp_avg"][0]  # a view of what is counted
    assert bytes_held([vars(optimizer)], [weight]) == 800 + 4 + 120


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100, 0.1, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 == max(factors)
    assert factors[55] == pytest.approx(0.55, abs=0.01) and 0.1 <= factors[-1] < 0.101


def test_the_best_for_so_many_bytes_or_fewer() -> None:
    points = [(8.0, 1.6), (2.0, 1.5), (0.5, 1.7), (None, 1.0), (1.0, 1.7), (4.0, 1.4), (2.0, 1.6), (0.0, None)]
    assert front(points) == [(0.5, 1.7), (2.0, 1.5), (4.0, 1.4)]


def test_rows_of_the_quality_page_are_in_the_study() -> None:
    commands = [c for b in blocks("docs/quality.md") if b.language == "bash" for c in b.commands()]
    for words in map(shlex.split, commands):
        assert words[:2] == ["gwt-dist", "compare"] and words[3] == "--row"
        assert words[4] in {row.name for row in read_study(words[2]).rows}
    assert commands


def test_study_of_the_page(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("docs/compare.md") if block.language == "yaml"]
    (tmp_path / "page.yaml").write_text(block.text)
    assert [row.name for row in read_study(str(tmp_path / "page.yaml")).rows] == ["energy-2", "adamw"]


def test_the_command(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "small.json", tmp_path / "out"
    file.write_text(json.dumps(settings | {"seeds": [0]}))
    assert main(["compare", str(file), "--report", "--output", str(out)]) == 2
    assert "run the study first" in capsys.readouterr().err
    assert main(["compare", str(file), "--jobs", "0", "--output", str(out), "--row", "adamw"]) == 0
    assert [line["row"] for line in read_results(out / "results.jsonl")[0].values()] == ["adamw"]
    assert "No result yet: energy.\n" in (out / "table.md").read_text()
    assert main(["compare", str(file), "--jobs", "0", "--output", str(out)]) == 0
    table = (out / "table.md").read_text()
    assert "| energy |" in table and "| adamw |" in table and "No result yet" not in table
    assert "same weights and saw the same text" in table
    assert (out / "plots-64.png").stat().st_size > 10_000
    for text in tmp_path.glob("*.txt"):
        text.unlink()
    assert main(["compare", str(file), "--report", "--output", str(out)]) == 0  # the text is not read
    assert (out / "table.md").read_text() == table
    assert main(["compare", str(file), "--row", "nothing", "--output", str(out)]) == 2
    assert "rows: energy, adamw" in capsys.readouterr().err
    with whole.Writer(out / "results.jsonl"):
        assert main(["compare", str(file), "--output", str(out)]) == 2
    assert "another study writes" in capsys.readouterr().err

"""The parity benchmark sees no difference where there is none, and a large one where there is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # the ranks get this path, too

import sharded_parity  # noqa: E402
from sharded_parity import CANDIDATES, Row, measure, table  # noqa: E402


class UnitRows(torch.optim.Optimizer):
    """Scales every row of the gradient to norm 1, and takes a flat buffer for one long row."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(0.01 * parameter.grad / parameter.grad.norm(dim=-1, keepdim=True))


def unit_rows(model: nn.Module) -> torch.optim.Optimizer:
    return UnitRows(model.parameters(), {})


def raises(model: nn.Module) -> torch.optim.Optimizer:
    raise NotImplementedError("first line\nsecond line")


@pytest.mark.skipif("GWT_TEST_ALL" not in os.environ, reason="takes its time: make support has it")
def test_it_tells_the_same_optimizer_from_another(torch_extensions_dir: Path) -> None:
    builders = {
        "adamw": CANDIDATES["adamw"].build,
        "energy": CANDIDATES["gwt-energy"].build,
        "wrong": unit_rows,
        "raises": raises,
    }
    rows = measure(builders, ["zero2"], steps=3, timeout=60.0)
    assert rows["adamw"].cells["zero2"] < 1e-6
    assert rows["energy"].cells["zero2"] < 1e-6
    assert rows["wrong"].cells["zero2"] > 0.1
    assert rows["raises"].cells["zero2"] == "in one process: NotImplementedError: first line"
    assert rows["energy"].readable == "yes"


def test_the_table_shows_what_was_seen() -> None:
    rows = {
        "a": Row({"fsdp2": 0.0, "zero1": 2e-7}, "yes"),
        "b": Row({"fsdp2": float("nan"), "zero1": 0.5}, "E: unreadable"),
        "c": Row({"fsdp2": "E: one", "zero1": "E: two"}),
        "d": Row({"fsdp2": "not installed", "zero1": "not installed"}, "not installed"),
    }
    assert table(rows, ["fsdp2", "zero1"]) == (
        "| optimizer | FSDP2 | ZeRO-1 | `weights_only=True` |\n"
        "| --- | --- | --- | --- |\n"
        "| a | 0 | 2.0e-07 | yes |\n"
        "| b | **nan** | **5.0e-01** | FAIL [1] |\n"
        "| c | FAIL [2] | FAIL [3] | - |\n"
        "| d | not installed | not installed | not installed |\n"
        "\n1. `E: unreadable`\n2. `E: one`\n3. `E: two`\n"
    )


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--engines", "zero4"], ["--optimizers", "sgd"]])
def test_a_wrong_option_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sharded_parity.arguments(wrong)
    assert "error:" in capsys.readouterr().err


def test_its_help_runs() -> None:
    command = [sys.executable, str(BENCHMARKS / "sharded_parity.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in "".join(done.stdout.split()) for name in CANDIDATES)  # lines end at hyphens

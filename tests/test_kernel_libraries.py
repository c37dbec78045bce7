"""Which kernels there are for a program, how their libraries come to be, and what happens if they do not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gwt_dist.declare import Pass, Sum
from gwt_dist.kernels import build, choice, cpu, eager, variant
from gwt_dist.programs import ADAM
from gwt_dist.recipes import rule_of
from test_kernels import PIECES, VARIANTS, program, train


@pytest.mark.parametrize("file", ["cpu.cpp", "vectors.h", "details/residual.h"])
def test_another_source_is_another_library(file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(build.SOURCES, tmp_path / "kernels", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    here = build.library_of("cpu", "-DX")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "kernels")
    assert build.library_of("cpu", "-DX") == here != build.library_of("cpu", "-DY")
    with (tmp_path / "kernels" / file).open("a") as source:
        source.write("// more\n")
    assert build.library_of("cpu", "-DX")[2] != here[2]


def test_programs_share_a_library_where_they_differ_in_phases_and_numbers_alone() -> None:
    energy = program()
    assert cpu.library(energy) == cpu.library(program(limiter=1.01, nesterov=True))
    assert cpu.library() == cpu.library(program(recipe="orthogonal", nesterov=True)) != cpu.library(energy)
    assert len({cpu.library(program(**options)) for options in VARIANTS.values()}) == 4


@pytest.mark.parametrize(
    ("changed", "lacks"),
    [
        ({"formula": "another"}, "formulas of the name 'another'"),
        ({"detail": "another"}, "details of the name 'another'"),
        ({"write": "another"}, "writes of the name 'another'"),
        ({"numbers": ("beta1", "beta2")}, "rules without coherent, correct_bias"),
        ({"phases": (Pass("another", writes=True),)}, "phases such as .*another"),
        ({"phases": (Pass("moments", (Sum("update"),), then="another"), Pass("write", writes=True))}, "phases such as"),
    ],
)
def test_a_program_for_which_there_is_no_file_gets_the_reference(
    changed: dict[str, Any], lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    here, another = torch.device("cpu"), replace(program(), **changed)
    assert choice.choose(here, torch.float32, another, PIECES) is eager
    monkeypatch.setenv(choice.VARIABLE, "cpu")
    with pytest.raises(ValueError, match=f"GWT_DIST_KERNEL=cpu cannot take {lacks}"):
        choice.choose(here, torch.float32, another, PIECES)


def test_a_file_is_all_that_a_kernel_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(variant.HERE, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(variant, "HERE", tmp_path / "kernels")
    (tmp_path / "kernels" / "writes" / "another.h").touch()
    (tmp_path / "kernels" / "details" / "residual.py").unlink()
    another, foam = replace(program(), write="another"), program(recipe="foam")
    variant.lacking.cache_clear()
    try:
        assert [variant.lacking(p, suffix) for p in (another, foam) for suffix in (".h", ".py")] == [
            *("", "writes of the name 'another'"),
            *("", "details of the name 'residual'"),
        ]
    finally:
        variant.lacking.cache_clear()


def test_numbers_are_in_the_order_of_the_program(tmp_path: Path) -> None:
    """What C++ calls ``number::eps`` is where `eps` is in the rows that it is given, however the tuple is shuffled."""
    rule = rule_of({"lr": 7.0, "wavelet": "haar", "recipe": "energy", "eps": 3.0})
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler, "the kernels could not have been compiled without one"
    shuffled = replace(program(), numbers=(*ADAM[3:], *ADAM[:3]))
    checks = [f"static_assert(number::{name} == {place});" for place, name in enumerate(("lr", *shuffled.numbers))]
    source = tmp_path / "order.cpp"
    source.write_text("\n".join([f'#include "{build.SOURCES / "rule.h"}"', *checks]))
    command = [compiler, "-std=c++17", "-fsyntax-only", *cpu._defines(shuffled), str(source)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert cpu._row(rule, shuffled) == (7.0, *(rule[name] for name in shuffled.numbers))


def test_a_kernel_is_forced_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    here, fp32, energy = torch.device("cpu"), torch.float32, program()
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    assert choice.choose(here, fp32, energy, PIECES) is cpu
    assert choice.choose(here, torch.float64, energy, PIECES) is eager
    monkeypatch.setenv(choice.VARIABLE, "eager")
    assert choice.choose(here, fp32, energy, PIECES) is eager
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(ValueError, match="GWT_DIST_KERNEL='fast' must be one of"):
        choice.choose(here, fp32, energy, PIECES)
    monkeypatch.setenv(choice.VARIABLE, "cpu")
    with pytest.raises(ValueError, match=r"GWT_DIST_KERNEL=cpu cannot take parameters of torch\.float64"):
        choice.choose(here, torch.float64, energy, PIECES)
    for options, missing in (({"wavelet": "db2"}, "wavelets other than Haar"), ({"level": 9}, "levels above 8")):
        with pytest.raises(ValueError, match=missing):
            train("cpu", [(4, 1024)], **options)  # type: ignore[arg-type]


SCRIPT = """
import torch, warnings
from gwt_dist import GWTAdamW
p = torch.nn.Parameter(torch.ones(8, 8)); p.grad = torch.ones(8, 8)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    GWTAdamW([p], level=1).step()
    GWTAdamW([p], level=1).step()
print(*[f"{w.category.__name__}: {w.message}" for w in found])
"""


@pytest.mark.parametrize("forced", ["", "cpu"])
def test_without_a_compiler_there_is_one_warning_with_its_last_lines(forced: str, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *version*) echo "g++ 12.2.0";; *) echo the disk is full >&2; exit 1;; esac\n'
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": str(compiler), choice.VARIABLE: forced}
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    if forced:
        assert found.returncode == 1
        assert "BuildError" in found.stderr and "the disk is full" in found.stderr
    else:
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("RuntimeWarning") == 1, found.stdout
        assert found.stderr.count("compiles a kernel for this machine (travel.cpp)") == 1, found.stderr
        assert "the disk is full" in found.stdout and "goes on with its eager kernel" in found.stdout
    assert not list((tmp_path / "gwt_dist").glob("*.so"))


def test_a_process_that_is_killed_while_it_compiles_blocks_no_other(tmp_path: Path) -> None:
    slow = tmp_path / "g++"
    slow.write_text('#!/bin/sh\ncase "$*" in *version*) echo "g++ 12.2.0";; *) sleep 60;; esac\n')
    slow.chmod(0o755)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    killed = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env={**environment, "CXX": str(slow)}, start_new_session=True
    )
    try:
        for _ in range(600):
            if list((tmp_path / "gwt_dist").glob("tmp*/build.ninja")):
                break
            with pytest.raises(subprocess.TimeoutExpired):
                killed.wait(0.1)
        else:
            pytest.fail("it never came to compile")
    finally:
        os.killpg(killed.pid, 9)
        killed.wait()
    slow.write_text('#!/bin/sh\ncase "$*" in *version*) echo "g++ 12.2.0";; *) exit 1;; esac\n')
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**environment, "CXX": str(slow)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "RuntimeWarning" in found.stdout, found.stderr

"""The wheel, installed where the repository is not: every command in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import small_study

ROOT = Path(__file__).parents[1]
Command = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves build/ and *.egg-info beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    junk = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("gwt_dist", "tests", "launch", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=junk, symlinks=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", str(folder), str(tree)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def gwt_dist(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command of a fresh environment that has the wheel and, of this one, the other packages."""
    folder = tmp_path_factory.mktemp("installed")
    place = folder / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # A folder that a .pth file names has its own .pth files left unread, such as that of a repository being edited.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "RANK", "WORLD_SIZE")}
    # DeepSpeed starts ninja by name.
    environment |= {"PATH": f"{python.parent}:{Path(sys.executable).parent}:{environment['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments: object, code: int = 0, program: Path = python.parent / "gwt-dist") -> str:
        command = [str(program), *map(str, arguments)]
        done = subprocess.run(command, cwd=run.cwd, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.cwd = folder / "empty"
    run.cwd.mkdir()
    asked = "import sys, json, gwt_dist; print(json.dumps([gwt_dist.__file__, sys.path, [*map(str, sys.meta_path)]]))"
    module, path, finders = json.loads(run("-c", asked, program=python))
    assert Path(module).is_relative_to(site), "the wheel itself is imported"
    # The environment that has torch may lie within the clone; the package is found in none but its own.
    assert [entry for entry in path if entry and Path(entry, "gwt_dist").exists()] == [str(site)], path
    assert not any("editable" in finder for finder in finders)
    return run


def test_it_holds_every_module_and_configuration_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA")))
    listed = subprocess.run(["find", "-L", "gwt_dist", "-type", "f"], cwd=wheel.parent / "tree", capture_output=True)
    assert packed == set(listed.stdout.decode().split())
    assert {"gwt_dist/py.typed", "gwt_dist/configs/zero2.json", "gwt_dist/configs/models/7b.json"} <= packed
    assert re.search(rb"^License(-Expression)?: Apache-2.0$", metadata, re.M)


def test_names_of_configurations_are_known_anywhere(gwt_dist: Command) -> None:
    assert "6,738,415,616 weights" in gwt_dist("plan", "7b")
    assert "the names in" not in gwt_dist("plan", "tiny", "--deepspeed-config", "configs/zero2.json")
    assert "one of 130m, 1b, 350m, 3b, 60m, 7b" in gwt_dist("plan", "8b", code=2)
    examined = gwt_dist("doctor", "--model", "tiny", "--deepspeed-config", "configs/zero3.json", "--json")
    assert json.loads(examined)["examined"] == ["configs/zero3.json", "tiny"]
    assert "the names in configs/studies are cpu" in gwt_dist("compare", "smokey", code=2)
    assert "rows: energy-2, adamw" in gwt_dist("compare", "smoke", "--row", "nothing", code=2)


@pytest.mark.usefixtures("torch_extensions_dir")
def test_a_run_is_trained_reported_and_exported(gwt_dist: Command, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(4000)))
    run, options = tmp_path / "run", ("--sequence-length", 32, "--eval-tokens", 64, "--corpus", tmp_path)
    told = gwt_dist("train", "--steps", 3, "--log-every", 1, "--threads", 1, "--output", run, *options)
    assert "validation loss" in told
    assert json.loads((run / "run.json").read_text())["model"]["file"] == "tiny.json"
    gwt_dist("report", run, "--output", tmp_path / "page.html")
    assert "3 of 3" in (tmp_path / "page.html").read_text()
    gwt_dist("export", run, tmp_path / "out")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.matrix
def test_a_study_runs(gwt_dist: Command, tmp_path: Path) -> None:
    settings = small_study.settings_in(tmp_path) | {"seeds": [0], "batches": [{"tokens": 64, "steps": 2}]}
    rows = [{"name": "energy", "optimizer": "gwt", "options": {"recipe": "energy"}, "lr": [0.01]}]
    (tmp_path / "small.json").write_text(json.dumps(settings | {"rows": rows, "model": "tiny"}))
    told = gwt_dist("compare", tmp_path / "small.json", "--jobs", 0, "--output", tmp_path / "results")
    assert "1 runs made" in told
    (line,) = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == "ok" and json.loads(line)["commit"] == ""

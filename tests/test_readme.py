"""The README is run: its Python as it stands, its commands as far as they can be checked quickly.

Python blocks run in one process, top to bottom, sharing their variables. Shell commands are not run
in full (`make pretrain` has a test of its own): targets, scripts, files and flags must exist.
"""

from __future__ import annotations

import configparser
import functools
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[tuple[int, list[str]]]:
    """Every fenced block of a language: its first line's number and its lines."""
    found: list[tuple[int, list[str]]] = []
    fence = None
    for number, line in enumerate(README.read_text().splitlines(), 1):
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
            if fence == language:
                found.append((number + 1, []))
        elif fence == language:
            found[-1][1].append(line)
    return found


def commands() -> list[str]:
    """One entry a command of the bash blocks; continued lines joined, comments dropped."""
    text = "\n".join("\n".join(lines) for _, lines in blocks("bash")).replace("\\\n", " ")
    stripped = (line.strip().removeprefix("$ ") for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def test_it_fits_on_a_few_screens() -> None:
    assert len(README.read_text().splitlines()) < 150


def test_its_python_runs(tmp_path: Path, torch_extensions_dir: Path) -> None:
    # Every other line is left blank, so that a traceback names the README's own line numbers.
    lines = [""] * len(README.read_text().splitlines())
    for start, block in blocks("python"):
        lines[start - 1 : start - 1 + len(block)] = block
    # A process that ends with gloo's threads running may abort, once in a while.
    lines.append("__import__('torch').distributed.destroy_process_group()")
    script = tmp_path / "readme.py"
    script.write_text("\n".join(lines))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One rank on CPU, as a launcher would set it, for the lines that start an engine.
    environment = {
        **os.environ,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"README.md does not run:\n{done.stdout}\n{done.stderr}"


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)} --help fails:\n{done.stderr}"
    return done.stdout


def check_flags(words: list[str], *command: str) -> None:
    """Every ``--flag`` is in the command's help; every named configuration file exists."""
    for word in words:
        if word.startswith("-"):
            flag = re.escape(word.split("=")[0])
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(*command)), (
                f"{' '.join(command)} has no flag {word}"
            )
        elif word.endswith((".json", ".yaml", ".py")):
            assert (ROOT / word).is_file(), f"no file {word}"


def check(command: str) -> None:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # OMP_NUM_THREADS=1 torchrun ...
        words.pop(0)
    program, *words = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in words if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"no target {target}"
        for variable in (word.split("=")[0] for word in words if "=" in word):
            assert re.search(rf"^{variable} \?=", makefile, re.M), f"no variable {variable}"
    elif program in {"pip", "pip3"}:
        options = configparser.ConfigParser()
        options.read(ROOT / "setup.cfg")
        for extras in re.findall(r"\[([\w,]+)\]", command):
            for extra in extras.split(","):
                assert extra in options["options.extras_require"], f"no extra {extra}"
    elif program in {"python", "python3", "deepspeed", "torchrun"}:
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if script is not None:
            if program in {"deepspeed", "torchrun"}:
                check_flags(words[:script], str(BIN / program))
            check_flags(words[script:], sys.executable, words[script])
        else:
            assert words[:1] == ["-m"], f"neither a script nor a module: {command}"
            help_of(sys.executable, "-m", words[1])
    elif program == "gwt-dist":
        help_of(str(BIN / program), *words[:1])
    else:
        assert program in {"git", "cd"}, f"this test does not know how to check: {command}"


def test_its_commands_exist() -> None:
    for command in commands():
        check(command)


@pytest.mark.parametrize(
    "command", ["make nothing", "make test NOTHING=1", "pip install gwt_dist[nothing]", "rm -rf x"]
)
def test_a_wrong_command_is_seen(command: str) -> None:
    with pytest.raises(AssertionError):
        check(command)

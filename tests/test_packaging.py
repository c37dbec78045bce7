"""What is shipped: the wheel, the pins, the promised files, and nothing of somebody's machine."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMISED = """
    README.md LICENSE SECURITY.md CONTRIBUTING.md CHANGELOG.md Makefile setup.cfg pyproject.toml
    constraints.txt ruff.toml .ci/run gwt_dist/py.typed docker/README.md launch/README.md
""".split()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def pinned_extras() -> set[str]:
    """All but the optimizers of others: those are compared as they are today, so they have no pin."""
    return set(setup_cfg()["options.extras_require"]) - {"compare"}


def names(lines: str) -> set[str]:
    """The distributions named by requirement lines."""
    stripped = (line.strip() for line in lines.splitlines())
    return {normal(re.split(r"[^\w.-]", line)[0]) for line in stripped if line and not line.startswith("#")}


def text_files() -> list[Path]:
    """What a commit would hold; in a tree without git, everything but what tools left there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    except (FileNotFoundError, subprocess.CalledProcessError):
        left = {"build", "dist", "runs"}
        parts = [p for p in ROOT.iterdir() if p.name == ".ci" or p.name[0] != "."]
        parts = [p for p in parts if p.name not in left and p.suffix != ".egg-info"]
        paths = [f for p in parts for f in ([p] if p.is_file() else p.rglob("*"))]
    return [p for p in paths if p.is_file() and b"\0" not in p.read_bytes()[:8192]]


def test_every_requirement_is_pinned() -> None:
    options = setup_cfg()
    required = names(options["options"]["install_requires"])
    for extra in pinned_extras():
        required |= names(options["options.extras_require"][extra])
    assert required - names((ROOT / "constraints.txt").read_text()) == set()


def test_pins_are_exact_and_portable() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            # No local version (+cpu, +cu130): those exist on some machines only.
            assert re.fullmatch(r'[\w.-]+==[\w.]+(; python_version >= "3\.\d+")?', line), f"not an exact pin: {line!r}"


def test_make_installs_every_extra() -> None:
    installed = re.search(r"-e '\.\[(.*)\]'", (ROOT / "Makefile").read_text())
    assert installed is not None
    assert set(installed[1].split(",")) == pinned_extras()


def test_the_version_is_one() -> None:
    version = setup_cfg()["metadata"]["version"]
    assert importlib.metadata.version("gwt_dist") == version
    assert version in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", PROMISED)
def test_promised_files_exist(name: str) -> None:
    assert (ROOT / name).is_file()


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    private = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if private.search(line)
    ]
    assert found == []

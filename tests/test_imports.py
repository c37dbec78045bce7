"""The layers of the package: imports point down only, and heavy packages load only where used."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gwt_dist"
MODULES = sorted(PACKAGE.rglob("*.py"))
LINES = 400  # aim at 300; at this length a module does two things

# Which parts of gwt_dist a part may import, lowest layer first. A part is a module or a package
# right under gwt_dist (its own modules may import each other); "" is gwt_dist/__init__.py.
DECLARED = {"formats", "declare", "keys", "programs", "recipes", "notes", "extents"}  # what a recipe is, without torch
MATH = {"units", "wavelet", "noise", "piece", "products", "formulas", *DECLARED}
LAYOUT = {"layout", "exchange", "stacks", "owners", "matrices", "comm", "dtensor", "targets", "blocks", "groups"}
RUNTIME = {*LAYOUT, "kernels", "plan", "sums", "seats", "rounds", "stages", "schedule", "shards", "frozen"}
RUNTIME |= {"replaced", "steps", "state", "optimizer", "galore"}
STATE = {"checkpoint", "memory", "config", "ds_json"}
MAY_IMPORT: dict[str, set[str]] = {
    "layout": set(),
    "exchange": {"layout"},
    "stacks": {"layout", "exchange"},
    "units": {"layout"},
    "wavelet": {"units"},
    "shipped": set(),
    "formats": set(),
    "declare": {"formats"},
    "keys": {"formats"},
    "programs": {"units", "formats", "declare", "keys"},
    "recipes": {"units", "formats", "declare", "keys", "programs"},
    "notes": {"recipes"},
    "ds_json": {"keys"},
    "extents": {"layout", "exchange", "declare"},
    "noise": set(),
    "piece": {"layout", "units", "wavelet", "formats", "declare", "noise"},
    "products": set(),
    "formulas": {"declare", "keys", "noise", "piece", "layout", "products"},
    "owners": {"layout"},
    "matrices": {"layout", "owners"},
    "kernels": {"wavelet", "layout", "noise", "formats", "declare", "programs", "recipes", "piece", "formulas"},
    "comm": {"layout", "exchange", "stacks"},
    "targets": {"units"},
    "blocks": {"targets"},
    "groups": {"keys", "recipes", "targets", "blocks"},
    "dtensor": {"layout", "exchange", "stacks", "comm"},
    "plan": {"units", "exchange", "formats", "declare", "extents", "owners", "piece", "layout", "comm", "dtensor"},
    "sums": {"declare", "extents", "piece", "kernels", "plan"},
    "seats": {"declare", "formulas", "kernels", "layout", "noise", "plan"},
    "rounds": {"units", "declare", "products", "formulas", "kernels", "layout", "matrices", "comm", "plan", "seats"},
    "stages": {"declare", "exchange", "piece", "formulas", "kernels", "rounds", "sums"},
    "schedule": {"units", "declare", "kernels", "comm", "dtensor", "plan", "sums", "stages"},
    "shards": {"comm", "dtensor"},
    "frozen": {"comm"},
    "replaced": set(),
    "steps": {
        "comm",
        "declare",
        "dtensor",
        "formats",
        "frozen",
        "keys",
        "owners",
        "plan",
        "recipes",
        "replaced",
        "schedule",
        "shards",
    },
    "state": {
        "units",
        "comm",
        "declare",
        "dtensor",
        "extents",
        "formats",
        "keys",
        "piece",
        "plan",
        "recipes",
        "shards",
        "steps",
    },
    "galore": {"optimizer"},
    "optimizer": {
        "comm",
        "dtensor",
        "keys",
        "notes",
        "plan",
        "recipes",
        "replaced",
        "shards",
        "stacks",
        "steps",
        "state",
    },
    "engines": MATH | RUNTIME | {"activations", "ds_json"},
    "checkpoint": MATH | RUNTIME | {"engines"},
    "memory": {
        "layout",
        "exchange",
        "stacks",
        "units",
        "groups",
        "targets",
        "blocks",
        "owners",
        "matrices",
        "ds_json",
        *DECLARED,
    },  # what needs no torch: a plan is there before torch would be
    "config": MATH | RUNTIME | {"engines"},
    "activations": {"targets", "blocks", "kernels"},
    "description": {"dtensor", "engines", "memory", "optimizer", "shards", "units"},
    "": MATH | RUNTIME | STATE | {"engines", "activations", "description"},
    "integrations": MATH | RUNTIME | STATE | {"engines", ""},
    "train": MATH | RUNTIME | STATE | {"shipped", "declare", "keys", "engines", "integrations", ""},
    "report": {"checkpoint", "memory", "train"},
    "study": MATH | RUNTIME | STATE | {"keys", "engines", "integrations", "train", ""},
    "cli": MATH
    | RUNTIME
    | STATE
    | {"shipped", "declare", "keys", "piece", "activations", "engines", "integrations", "train", "report", "study", ""},
    "__main__": {"cli"},
}

# Packages beside the standard library that a part may import at all; torch alone if not listed.
EVERYTHING = {"*"}
THIRD_PARTY: dict[str, set[str]] = {
    "shipped": set(),
    "layout": set(),
    "exchange": set(),
    "stacks": set(),
    "owners": set(),
    "matrices": set(),
    **{part: set() for part in DECLARED},
    "ds_json": {"hjson"},
    "units": {"pywt"},
    "memory": {"torch"},
    "wavelet": {"torch", "pywt"},
    "products": {"torch", "triton"},
    "kernels": {"torch", "triton"},
    "engines": {"torch", "deepspeed", "fairscale"},
    "checkpoint": {"torch", "numpy", "safetensors", "huggingface_hub", "transformers"},
    "config": {"yaml"},
    "integrations": EVERYTHING,
    "train": EVERYTHING,
    "report": {"jinja2", "markupsafe", "plotly"},
    "study": EVERYTHING,
    "cli": EVERYTHING,
}
# ... and of these, what any part may import at module level. The rest is imported inside functions,
# so that `import gwt_dist` needs torch and PyWavelets alone.
LIGHT = {"torch", "pywt"}
# `import gwt_dist` never loads these.
ON_TOP_OF_THE_PACKAGE = {"integrations", "train", "report", "study", "cli", "__main__"}
# Nor these, which import triton: functions import them.
LAZY = {
    *(
        "products/symmetric_kernels.py",
        "kernels/triton_activations.py",
        "kernels/triton_formats.py",
        "kernels/triton_kernels.py",
    ),
    *("kernels/triton_lines.py", "kernels/triton_math.py", "kernels/triton_travel_kernels.py"),
    *(
        path.relative_to(PACKAGE).as_posix()
        for folder in ("formulas", "details", "writes")
        for path in (PACKAGE / "kernels" / folder).glob("[!_]*.py")
    ),
}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether importing the file imports it."""

    name: str
    line: int
    at_once: bool


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports_of(path: Path) -> list[Import]:
    return list(_imports(ast.parse(path.read_text()), path, at_once=True))


def _imports(node: ast.AST, path: Path, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_once)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:  # relative: counted from the file's own package
                package = ("gwt_dist", *path.relative_to(PACKAGE).parent.parts)
                parts = package[: len(package) + 1 - child.level]
                base = ".".join((*parts, base)).strip(".")
            for alias in child.names:
                # `from gwt_dist import layout` names a module, `from torch import Tensor` does not
                name = f"{base}.{alias.name}" if base == "gwt_dist" else base
                yield Import(name, child.lineno, at_once)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports(child, path, at_once and not function and not for_types)


def part_imported(name: str) -> str:
    """Of ``gwt_dist.layout.Fragment``: ``layout``; of ``gwt_dist.GWTAdamW``: the package itself."""
    first = name.split(".")[1] if "." in name else ""
    return first if (PACKAGE / f"{first}.py").exists() or (PACKAGE / first).is_dir() else ""


def wrong_imports(path: Path) -> list[str]:
    part = part_of(path)
    third_party = THIRD_PARTY.get(part, {"torch"})
    wrong = []
    for found in imports_of(path):
        where = f"{path.name}:{found.line} imports {found.name}"
        top = found.name.split(".")[0]
        if top == "gwt_dist":
            below = part_imported(found.name)
            if below != part and below not in MAY_IMPORT[part]:
                wrong.append(f"{where}: {part or 'gwt_dist'} may not import {below or 'gwt_dist'}")
        elif top not in sys.stdlib_module_names:
            if top not in third_party and third_party is not EVERYTHING:
                wrong.append(f"{where}: allowed here are {sorted(third_party) or 'none'}")
            elif found.at_once and top not in LIGHT and part not in ON_TOP_OF_THE_PACKAGE and name_of(path) not in LAZY:
                wrong.append(f"{where} at module level: import it in the function that uses it")
    return wrong


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    assert part_of(path) in MAY_IMPORT, "a new part: give it a line in MAY_IMPORT"
    assert wrong_imports(path) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_too_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LINES, f"{lines} lines: this module does two things"


def test_the_table_has_no_cycle() -> None:
    below: set[str] = set()
    left = dict(MAY_IMPORT)
    while left:
        ready = [part for part, parts in left.items() if parts <= below]
        assert ready, f"a cycle in MAY_IMPORT among {sorted(left)}"
        below.update(ready)
        for part in ready:
            del left[part]


def test_a_wrong_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule, broken once in a package made for it."""
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "optimizer.py").write_text("")
    (tmp_path / "engines").mkdir()
    broken = {
        "layout.py": ["import torch", "from gwt_dist import optimizer", "from . import optimizer"],
        "piece.py": ["import gwt_dist.engines", "def f():\n    from gwt_dist import GWTAdamW"],
        "engines/deepspeed.py": ["import deepspeed", "from ..train import loop", "import yaml"],
    }
    (tmp_path / "train").mkdir()
    fine = {
        "piece.py": ["import torch", "import math\nfrom torch import Tensor"],
        "engines/deepspeed.py": [
            "def f():\n    import deepspeed",
            "if TYPE_CHECKING:\n    import deepspeed",
            "from .flat import x",
            "from gwt_dist import optimizer",
        ],
        "train/loop.py": ["import yaml, deepspeed", "from gwt_dist import GWTAdamW"],
    }
    for sources, expected in ((broken, 1), (fine, 0)):
        for name, texts in sources.items():
            for text in texts:
                (tmp_path / name).write_text(text)
                assert len(wrong_imports(tmp_path / name)) == expected, (name, text)


def requirements(*distributions: str) -> set[str]:
    """The distributions and all that they require, without extras."""
    seen: set[str] = set()
    todo = list(distributions)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform
        if name not in seen:
            seen.add(name)
            todo += [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    return seen


def test_importing_the_package_needs_torch_and_pywavelets_alone() -> None:
    needed = requirements("torch", "PyWavelets")
    top_level = importlib.metadata.packages_distributions()
    allowed = {
        name
        for name, distributions in top_level.items()
        if any(re.sub(r"[-_.]+", "-", d).lower() in needed for d in distributions)
    }
    script = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    allowed = {allowed | {"gwt_dist"}!r} | sys.stdlib_module_names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in self.allowed:
            raise ModuleNotFoundError(f"absent in this test: {{name}}", name=name)

sys.meta_path.insert(0, Absent())
import gwt_dist
gwt_dist.GWTAdamW, gwt_dist.param_groups, gwt_dist.attach, gwt_dist.initialize
late = {{"gwt_dist." + name.removesuffix(".py").replace("/", ".") for name in {LAZY}}}
assert not late & set(sys.modules), late
print(*{{name.split(".")[0] for name in sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"torch", "pywt", "gwt_dist"} <= loaded
    assert not loaded & {"deepspeed", "transformers", "fairscale", "datasets", "yaml", "mpi4py"}

"""Is a step of one checkout slower than one of another? A step of each in turn, on the same tensors.

Each checkout has a process of its own, which waits while the other steps, so what slows the machine slows both. Prints
a Markdown table of the medians, and of the ratios of neighbours with their quartiles::

    git worktree add ../before HEAD~10
    python benchmarks/two_trees.py ../before .
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

BIG, SMALL = [[4096, 4096]], [[64, 64]] * 1000
SHAPES = {"4096x4096": BIG, "1,000 x 64x64": SMALL, "8 x 256x688": [[256, 688]] * 8}
CASES = [  # recipe, level, dtype, tensors, rounds
    *(("energy", level, "float32", "4096x4096", 31) for level in (0, 2, 3)),
    *(("paper", level, "float32", "4096x4096", 31) for level in (2, 3)),
    *((recipe, 2, "bfloat16", "4096x4096", 31) for recipe in ("energy", "paper")),
    *((recipe, 2, "float32", "1,000 x 64x64", 101) for recipe in ("energy", "paper")),
    ("orthogonal", 1, "float32", "8 x 256x688", 11),
]


def child() -> None:
    """Build what a line of JSON says, or take a step and print its seconds."""
    import torch

    from gwt_dist import GWTAdamW

    optimizer: Any = None
    for line in sys.stdin:
        case = json.loads(line)
        if case == "step":
            start = time.perf_counter()
            optimizer.step()
            print(time.perf_counter() - start, flush=True)
            continue
        recipe, level, dtype, tensors, _ = case
        optimizer = None
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape).to(getattr(torch, dtype))) for shape in SHAPES[tensors]]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = GWTAdamW(weights, weight_decay=0.1, recipe=recipe, level=level)
        for _ in range(3):
            optimizer.step()
        print("ready", flush=True)


def ask(process: subprocess.Popen[str], message: object) -> str:
    """The answer of a child."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def start(tree: Path, script: Path = Path(__file__)) -> subprocess.Popen[str]:
    """A child of `script` that imports the package of `tree`."""
    # Threads that spin while they wait would take the other process's cores.
    calm = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    return subprocess.Popen(
        [sys.executable, str(script), "--child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **calm, "PYTHONPATH": str(tree)},
    )


def main() -> None:
    """Compare the two checkouts of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs=2, type=Path, metavar="CHECKOUT")
    parser.add_argument("--starts", type=int, default=5, help="of both processes: where memory lies is luck")
    given = parser.parse_args()
    rounds: list[list[list[float]]] = [[] for _ in CASES]
    for _ in range(given.starts):
        children = [start(tree.resolve()) for tree in given.trees]
        for number, case in enumerate(CASES):
            assert [ask(process, case) for process in children] == ["ready", "ready"]
            for i in range(case[-1]):
                times = [float(ask(process, "step")) for process in (children if i % 2 else reversed(children))]
                rounds[number].append(times if i % 2 else times[::-1])
        for process in children:
            process.communicate()
    print("| recipe, level | dtype | tensors | first, ms | second, ms | second / first (quartiles) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (recipe, level, dtype, tensors, _), found in zip(CASES, rounds, strict=True):
        low, middle, high = quantiles([second / first for first, second in found], n=4)
        columns = " | ".join(f"{1e3 * median(times):.2f}" for times in zip(*found, strict=True))
        print(f"| {recipe}, {level} | {dtype} | {tensors} | {columns} | {middle:.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    child() if sys.argv[1:] == ["--child"] else main()

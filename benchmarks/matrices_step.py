"""A step of `"orthogonal"` on the 56 matrices of LLaMA-60M beside the iteration alone, of one checkout or of several.

The iteration alone is that of the last checkout on ready stacks of all matrices of one shape: what a step cannot do
without. Steps and iterations take turns, each checkout in a process of its own. Prints a Markdown table of the medians,
of the ratios of neighbours with their quartiles, and of the operations of torch in a step, views counted::

    python benchmarks/matrices_step.py ../before .
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from two_trees import ask, start

SHAPES = [(512, 512)] * 32 + [(1376, 512)] * 16 + [(512, 1376)] * 8
ROUNDS = 7


def child() -> None:
    """Count the operations of a step, take one, or iterate, as a line says, and print operations or seconds."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from gwt_dist import GWTAdamW
    from gwt_dist.formulas.orthogonal import newton_schulz

    class Count(TorchDispatchMode):
        """Counts operations."""

        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += 1
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = GWTAdamW(weights, level=1, recipe="orthogonal")
    optimizer.step()
    stacks = [torch.stack([w.grad for w in weights if w.shape == shape]) for shape in dict.fromkeys(SHAPES)]
    for line in sys.stdin:
        what = json.loads(line)
        begin = time.perf_counter()
        if what == "count":
            with Count() as count:
                optimizer.step()
            print(count.number, flush=True)
            continue
        if what == "step":
            optimizer.step()
        else:
            with torch.no_grad():
                for stack in stacks:
                    newton_schulz(stack)
        print(time.perf_counter() - begin, flush=True)


def main() -> None:
    """Compare the checkouts of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", type=Path, metavar="CHECKOUT")
    given = parser.parse_args()
    children = [start(tree.resolve(), Path(__file__)) for tree in given.trees]
    operations = [int(ask(process, "count")) for process in children]
    found: list[list[float]] = []
    for _ in range(ROUNDS):
        found.append([float(ask(process, "step")) for process in children])
        found[-1].append(float(ask(children[-1], "iterate")))
    for process in children:
        process.communicate()
    alone = [times[-1] for times in found]
    print("| | operations | ms | to the iteration alone (quartiles) |")
    print("| --- | ---: | ---: | ---: |")
    for number, tree in enumerate(given.trees):
        its = [times[number] for times in found]
        low, middle, high = quantiles([one / its_alone for one, its_alone in zip(its, alone, strict=True)], n=4)
        ms = 1e3 * median(its)
        print(f"| step of {tree} | {operations[number]:,} | {ms:.0f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    print(f"| the iteration alone | | {1e3 * median(alone):.0f} | 1 |")


if __name__ == "__main__":
    child() if sys.argv[1:] == ["--child"] else main()

"""What the host does in a GPU step, measured on a machine without a GPU: beside fused AdamW, and of two checkouts.

Tensors are on the CPU, and Triton's launches do all but the driver's call. `torch.optim.AdamW(fused=True)` steps the
same tensors, and as many of one element, which leaves its host's time with almost no arithmetic: the ratio is to these.
Prints a Markdown table of medians of the thread's own time, and how many launches of Triton and operations of torch a
step asks for, each of which costs more on a GPU. Each checkout has a process of its own, and steps take turns::

    python benchmarks/host_time.py ../before .
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from two_trees import ask, start

TENSORS = {"1 x 4096x4096": (1, 4096), "1,000 x 64x64": (1000, 64)}
OURS, THEIRS = ("energy", "paper", "energy, new gradients"), ("AdamW fused", "AdamW fused, one element")
ROUNDS, STEPS = 21, 9  # turns, and steps of each


class Driver:
    """Triton's driver and what its compiler returns; counts launches."""

    def __init__(self) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        self.launches = 0
        self.function = self.packed_metadata = None
        self.target = GPUTarget("cuda", 90, 32)

        def compiled(function: Any, key: Any, signature: Any, device: Any, *_: Any) -> Driver:
            function.device_caches[device][0][key] = self
            return self

        JITFunction._do_compile = compiled
        triton.runtime.driver.set_active(self)

    def get_current_device(self) -> int:
        """As a driver."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """As a driver."""
        return 0

    def get_current_target(self) -> Any:
        """As a driver."""
        return self.target

    def launch_metadata(self, *_: Any) -> None:
        """As a compiled kernel."""

    def run(self, *_: Any) -> None:
        """As a compiled kernel."""
        self.launches += 1


def stepper(name: str, tensors: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What comes before a step and is not timed, and the step."""
    import torch

    from gwt_dist import GWTAdamW

    torch.manual_seed(0)
    number, side = TENSORS[tensors]
    side = 1 if "one element" in name else side
    weights = [torch.nn.Parameter(torch.randn(side, side)) for _ in range(number)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    spare = [torch.randn_like(weight) for weight in weights] if "new" in name else []

    def swap() -> None:
        for i, weight in enumerate(weights if spare else ()):
            weight.grad, spare[i] = spare[i], weight.grad

    if name in THEIRS:
        return swap, torch.optim.AdamW(weights, fused=True).step
    return swap, GWTAdamW(weights, recipe=name.partition(",")[0], level=2).step


def child() -> None:
    """Build steps of the tensors that a line of JSON names, or take some of one and print its microseconds."""
    os.environ |= {"GWT_DIST_KERNEL": "triton", "KINETO_LOG_LEVEL": "9"}
    from torch.profiler import ProfilerActivity, profile

    from gwt_dist.kernels import triton

    driver, steps = Driver(), {}
    triton.takes = lambda device: True
    for line in sys.stdin:
        what, name = json.loads(line)
        if what == "build":
            steps.clear()
            steps.update({its: stepper(its, name) for its in (*THEIRS, *OURS)})
            print("ready", flush=True)
            continue
        before, step = steps[name]
        if what == "time":
            times = []
            for _ in range(STEPS):
                before()
                begin = time.thread_time()
                step()
                times.append(1e6 * (time.thread_time() - begin))
            print(median(times), flush=True)
        else:
            before()
            driver.launches = 0
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                step()
            asked = [event for event in profiler.events() if event.name.startswith("aten::")]
            outer = [e for e in asked if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
            print(json.dumps([driver.launches, len(outer)]), flush=True)


def main() -> None:
    """Compare the checkouts of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", type=Path, metavar="CHECKOUT")
    trees = [tree.resolve() for tree in parser.parse_args().trees]
    children = [start(tree, Path(__file__)) for tree in trees]
    print(f"| tensors | step | {' | '.join(f'{tree.name}: us | of AdamW | launches | torch' for tree in trees)} |")
    print(f"| --- | --- |{' ---: | ---: | ---: | ---: |' * len(trees)}")
    for tensors in TENSORS:
        assert all(ask(one, ["build", tensors]) == "ready" for one in children)
        times: dict[str, list[list[float]]] = {name: [[] for _ in children] for name in (*THEIRS, *OURS)}
        for _ in range(ROUNDS):
            for name, of_name in times.items():
                for its, one in zip(of_name, children, strict=True):
                    its.append(float(ask(one, ["time", name])))
        for name, of_name in times.items():
            columns = []
            for its, theirs, one in zip(of_name, times[THEIRS[-1]], children, strict=True):
                launches, asked = json.loads(ask(one, ["count", name]))
                ratio = median(a / b for a, b in zip(its, theirs, strict=True))
                columns.append(f"{median(its):,.0f} | {ratio:.2f} | {launches} | {asked}")
            print(f"| {tensors} | {name} | {' | '.join(columns)} |", flush=True)
    for one in children:
        one.communicate()


if __name__ == "__main__":
    child() if sys.argv[1:] == ["--child"] else main()

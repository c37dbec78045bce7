"""Which is faster at the products of the Newton-Schulz iteration on this GPU: torch's library or the symmetric kernel.

Times ``x x^T`` and ``b*g + c*g*g`` in bf16 on stacks as steps have them, in turn, round after round; medians count.
Says what to write into ``MEASURED`` of ``gwt_dist/products/choice.py``, and which tile is best where::

    python benchmarks/products.py
    python benchmarks/products.py --shapes 512x512,512x1376 --rounds 30
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # the package need not be installed
    sys.path.insert(0, str(ROOT))

from gwt_dist.products import choice, plain, stack_size, symmetric  # noqa: E402

B, C = -4.7750, 2.0315
SIDES = 512, 1024, 2048, 4096
SHAPES = [(rows, round(rows * wide)) for rows in SIDES for wide in (1, 2.7)]
ON_CPU = [(16, 16), (16, 43)]
TILES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {  # blocks and options of the kernel that are tried
    f"{block}, {stages} stages": ({"BLOCK": block, "DEPTH": 64}, {"num_warps": warps, "num_stages": stages})
    for block, warps in ((64, 4), (128, 8))
    for stages in (3, 4)
}


def measure(device: torch.device, shapes: Sequence[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """A row for each of `shapes` (rows, columns) and product.

    ``torch_ms``; ``kernel_ms``, None where it cannot run; ``tiles``, ms of the kernel by tile, whichever it would take.
    """
    found = []
    missing = symmetric.missing(device, torch.bfloat16)
    for rows, columns in shapes:
        x = torch.randn((stack_size(rows, columns, device), rows, columns), device=device)
        x /= x.norm(dim=(1, 2), keepdim=True)
        x = torch.nn.functional.pad(x, (0, -columns % 16, 0, -rows % 16)).bfloat16()  # as the iteration does
        calls: dict[str, tuple[Any, ...]] = {"gram": (x,), "quadratic": (plain.gram(x), B, C)}
        for product, arguments in calls.items():
            contenders: dict[str, Callable[[], Tensor]] = {"torch": partial(getattr(plain, product), *arguments)}
            if not missing:
                kernel = partial(getattr(symmetric, product), *arguments)
                contenders |= {"kernel": kernel} | {tile: partial(_with, its, kernel) for tile, its in TILES.items()}
            tiles = _times(contenders, device, rounds)
            row = {"shape": (rows, columns), "n": len(x), "product": product}
            found.append(row | {"torch_ms": tiles.pop("torch"), "kernel_ms": tiles.pop("kernel", None), "tiles": tiles})
    return found


def _with(setting: tuple[dict[str, int], dict[str, Any]], kernel: Callable[[], Tensor]) -> Tensor:
    """Run the kernel with blocks and options other than the package's."""
    usual, (blocks, options) = symmetric.setting, setting
    symmetric.setting = lambda rows: (blocks, {"enable_fp_fusion": False, **options})
    try:
        return kernel()
    finally:
        symmetric.setting = usual


def _times(contenders: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median ms of each, in turn; the first two rounds compile and warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, run in contenders.items():
            took = _gpu_ms(run) if device.type == "cuda" else _cpu_ms(run)
            if turn >= 2:
                times[name].append(took)
    return {name: median(its) for name, its in times.items()}


def _gpu_ms(run: Callable[[], Tensor], repeat: int = 5) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host queues all that is timed
    start.record()
    for _ in range(repeat):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeat


def _cpu_ms(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def fewest_rows(found: Sequence[dict[str, Any]]) -> int | None:
    """The fewest rows from which all larger shapes are faster by the kernel, both products together; None for none."""
    least = None
    for rows in sorted({row["shape"][0] for row in found}, reverse=True):
        for shape in {row["shape"] for row in found if row["shape"][0] == rows}:
            its = [row for row in found if row["shape"] == shape]
            if sum(row["kernel_ms"] for row in its) >= sum(row["torch_ms"] for row in its):
                return least
        least = rows
    return least


def report(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; TFLOP/s count all of a product, of which the kernel does half."""
    tiles = list(found[0]["tiles"])
    lines = [
        "| rows x columns | n | product | torch ms (TFLOP/s) | kernel ms (TFLOP/s) |"
        + "".join(f" {t} |" for t in tiles)
    ]
    lines.append("|---" * (5 + len(tiles)) + "|")
    for row in found:
        rows, columns = row["shape"]
        work = 2e-9 * row["n"] * rows * rows * (columns if row["product"] == "gram" else rows)
        cells = [f"{rows}x{columns}", str(row["n"]), row["product"]]
        for ms in (row["torch_ms"], row["kernel_ms"]):
            cells.append("none" if ms is None else f"{ms:.3f} ({work / ms:.0f})")
        cells += [f"{row['tiles'][tile]:.3f}" for tile in tiles]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and say what to write where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="such as 512x512,512x1376; rows are the smaller side")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = SHAPES if device.type == "cuda" else ON_CPU
    if options.shapes:
        shapes = [(int(rows), int(columns)) for rows, columns in (one.split("x") for one in options.shapes.split(","))]
    found = measure(device, shapes, options.rounds)
    print(f"torch {torch.__version__}, {device.type if device.type == 'cpu' else torch.cuda.get_device_name(device)}\n")
    print(report(found) + "\n")
    missing = symmetric.missing(device, torch.bfloat16)
    if missing:
        where = "There is no GPU here" if device.type == "cpu" else f"The kernel cannot take {missing}"
        print(f"{where}: it did not run, and nothing follows for the table of measured cards.")
        return
    name, least = torch.cuda.get_device_name(device), fewest_rows(found)
    if least is None:
        print(f"The kernel is not faster at the largest shapes: {name!r} stays out of MEASURED in {choice.__file__}.")
    else:
        print(f"The kernel is faster from {least} rows on. In MEASURED of {choice.__file__}:\n    {name!r}: {least},")


if __name__ == "__main__":
    main()

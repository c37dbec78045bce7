"""How long a step takes, beside other optimizers on the same tensors in the same run.

All optimizers update the same weights from the same gradients in turn, round after round, and what counts is the median
over rounds of each one's time divided by fused AdamW's in the same round: what slows the machine slows both.
Writes a dated Markdown table and a plot into ``benchmarks/results/``::

    make bench                                          # everything, about a quarter of an hour
    python benchmarks/step_time.py --models 16M --rounds 9
    python benchmarks/step_time.py --models 16M --only "energy level 2" 8bit
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from math import prod
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
for folder in (ROOT / "benchmarks", ROOT):  # the package need not be installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from sharded_steps import collective_cost, llama, offload  # noqa: E402

import gwt_dist  # noqa: E402
from gwt_dist import GWTAdamW  # noqa: E402
from gwt_dist.formats import FORMATS, FP32, STATE_DTYPES  # noqa: E402
from gwt_dist.kernels import build  # noqa: E402

Shapes = Sequence[tuple[int, ...]]
REFERENCE = "AdamW fused"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


MODELS: dict[str, tuple[str, Shapes]] = {
    "small": ("1,000 tensors of 64x64", [(64, 64)] * 1000),
    "16M": ("one tensor of 4096x4096", [(4096, 4096)]),
    "odd": ("one tensor of 4096x5461, no multiple of any unit", [(4096, 5461)]),
    "llama130m": ("LLaMA-130M, 111 tensors; embeddings and norms at level 0", llama(12, 768, 2048)),
    "64M": ("16 tensors of 2048x2048", [(2048, 2048)] * 16),
    "256M": ("16 tensors of 4096x4096", [(4096, 4096)] * 16),
}


@dataclass
class Contender:
    """One optimizer, and the bytes that a step has to move for each element of a matrix."""

    name: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    traffic: Callable[[int], float] | None = None  # bytes of a weight -> bytes an element
    seconds: list[float] = field(default_factory=list)
    peak: int = 0  # bytes of temporary tensors
    failed: str = ""


def ours(recipe: str, level: int, state_dtype: str = FP32) -> Contender:
    """One level of one recipe, its moments in one format."""
    # The weight is read and written, the gradient read; both moments are read and written, one for each unit.
    # Two phases read the gradient and the moments again. What waits for products is not bound by memory.
    again = 0 if recipe == "energy" else 1
    its = FORMATS[STATE_DTYPES[state_dtype][0]]
    moment = its.bytes + (4 / its.cell if its.scaled else 0)
    return Contender(
        f"gwt_dist {recipe} level {level}" + f", {state_dtype}" * (state_dtype != FP32),
        partial(_ours, recipe=recipe, level=level, state_dtype=state_dtype),
        None if recipe == "orthogonal" else lambda size: (3 + again) * size + (4 + 2 * again) * moment / 2**level,
    )


def _ours(parameters: list[nn.Parameter], recipe: str, level: int, state_dtype: str) -> GWTAdamW:
    # Embeddings and output heads are the tensors with very many rows; 1-D tensors are level 0 by themselves.
    excluded = [p for p in parameters if p.shape[0] >= 32_000]
    matrices = [p for p in parameters if p.shape[0] < 32_000]
    groups = [{"params": matrices, "level": level}, {"params": excluded, "level": 0}]
    return GWTAdamW(
        [group for group in groups if group["params"]], recipe=recipe, state_dtype=state_dtype, weight_decay=0.01
    )


def _deepspeed(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, weight_decay=0.01)


def _bitsandbytes(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters)


def _torchao(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters)


def contenders() -> list[Contender]:
    """All that are compared, the reference first."""

    def adamw(size: int) -> float:
        return 7 * size

    return [
        Contender(REFERENCE, lambda ps: torch.optim.AdamW(ps, fused=True), adamw),
        Contender("AdamW foreach", lambda ps: torch.optim.AdamW(ps, foreach=True)),
        Contender("DeepSpeedCPUAdam", _deepspeed, adamw),
        Contender("bitsandbytes AdamW8bit", _bitsandbytes),
        Contender("torchao AdamW8bit", _torchao),
        *(ours(recipe, level) for recipe in ("energy", "paper") for level in (1, 2, 3)),
        *(ours(*pair, form) for pair in (("energy", 2), ("orthogonal", 1)) for form in ("bf16", "int8")),
    ]


def chosen(parts: Sequence[str]) -> list[Contender]:
    """The reference, and those that have one of `parts` in their names; raises `SystemExit` if a part has none."""
    found = contenders()
    for part in parts:
        if not any(part in contender.name for contender in found):
            raise SystemExit(f"no optimizer has {part!r} in its name: {', '.join(c.name for c in found)}")
    return [c for c in found if c.name == REFERENCE or any(part in c.name for part in parts)]


def measure(found: list[Contender], shapes: Shapes, dtype: torch.dtype, rounds: int) -> list[Contender]:
    """Time the contenders in turn on one set of weights and gradients."""
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    steps: list[tuple[Contender, Callable[[], object]]] = []
    for contender in found:
        try:
            optimizer = contender.make(parameters)
            for _ in range(2):
                optimizer.step()
            contender.peak = peak_of_temporaries(optimizer.step)
        except Exception as error:  # a package that is not there or does not run here is a row of the table
            contender.failed = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:90]}" if str(error) else repr(error)
            )
        else:
            steps.append((contender, optimizer.step))
    for _ in range(rounds):
        for contender, step in steps:
            begin = time.perf_counter()
            step()
            contender.seconds.append(time.perf_counter() - begin)
    gc.collect()
    return found


def peak_of_temporaries(step: Callable[[], object]) -> int:
    """Most bytes of tensors that `step` holds at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = most = 0
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def copy_bandwidth() -> float:
    """Bytes a second that `Tensor.copy_` reads and writes on 256 MiB."""
    source, target = torch.ones(1 << 26), torch.ones(1 << 26)
    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return 2 * 4 * source.numel() / median(seconds)


def table(found: Sequence[Contender], numel: int, size: int, bandwidth: float) -> list[str]:
    """Markdown rows of one set of tensors."""
    lines = [
        "| optimizer | ms (median) | ratio to fused AdamW | quartiles | bytes an element | share of copy bandwidth | "
        "peak temporaries |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for contender in found:
        if contender.failed:
            lines.append(f"| {contender.name} | does not run: {contender.failed} | | | | | |")
            continue
        paired = ratios(contender, found[0])
        low, high = paired[len(paired) // 4], paired[-1 - len(paired) // 4]
        seconds, peak = median(contender.seconds), contender.peak / 2**20
        moved = share = ""
        if contender.traffic is not None:
            moved = f"{contender.traffic(size):.1f}"
            share = f"{contender.traffic(size) * numel / seconds / bandwidth:.0%}"
        lines.append(
            f"| {contender.name} | {seconds * 1e3:.2f} | {median(paired):.3f} | {low:.3f}-{high:.3f} | {moved} | "
            f"{share} | {peak:.2f} MiB |"
        )
    return lines


def ratios(contender: Contender, reference: Contender) -> list[float]:
    """Time of `contender` divided by that of `reference`, round by round, sorted."""
    return sorted(a / b for a, b in zip(contender.seconds, reference.seconds, strict=True))


def plot(measured: dict[str, list[Contender]], path: Path) -> None:
    """Bars of the ratios to fused AdamW, one panel for each set of tensors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(measured), 1, figsize=(9, 2.6 * len(measured)), squeeze=False)
    for axes, (title, found) in zip(panels[:, 0], measured.items(), strict=True):
        shown = [c for c in found if c.seconds]
        values = [median(ratios(c, found[0])) for c in shown]
        colors = ["tab:blue" if c.name.startswith("gwt_dist") else "tab:gray" for c in shown]
        bars = axes.barh([c.name for c in shown], values, color=colors)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlim(0, min(2.5, 1.15 * max(values)))
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
        axes.set_title(f"{title}: time of a step divided by fused AdamW's", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def machine() -> str:
    """Hardware and versions."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    versions = [f"gwt_dist {gwt_dist.__version__}"]
    for package in ("torch", "deepspeed", "bitsandbytes", "torchao"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return (
        f"{cpu}, {os.cpu_count()} cores, {build.capability()}, {torch.get_num_threads()} threads, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}; {', '.join(versions)}"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", default=list(MODELS), choices=MODELS, help="sets of tensors; default: all"
    )
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES, help="of weights and gradients")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of optimizers, beside fused AdamW")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each optimizer; 256M has a third")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    now, bandwidth = datetime.now(timezone.utc), copy_bandwidth()
    lines = [f"# Time of a step, {now:%Y-%m-%d %H:%M} UTC", "", machine(), ""]
    lines += [f"Bandwidth of a copy: {bandwidth / 1e9:.1f} GB/s (read and written). Medians of paired ratios.", ""]
    measured: dict[str, list[Contender]] = {}
    for model in arguments.models:
        title, shapes = MODELS[model]
        for name in arguments.dtypes:
            numel, dtype = sum(map(prod, shapes)), DTYPES[name]
            rounds = arguments.rounds if numel < 1 << 27 else max(3, arguments.rounds // 3)
            found = measured[f"{model}, {name}"] = measure(chosen(arguments.only), shapes, dtype, rounds)
            part = [f"## {title}, {numel / 1e6:.1f} M elements, {name}, {rounds} rounds", ""]
            part += [*table(found, numel, dtype.itemsize, bandwidth), ""]
            print("\n".join(part), flush=True)
            lines += part
    part = ["## ZeRO-Offload: the flat fp32 buffer of LLaMA-130M on one rank", "", *offload(arguments.rounds), ""]
    part += [
        "## Collectives: LLaMA-60M, 2 ranks over gloo, one thread each",
        "",
        *collective_cost(arguments.rounds),
        "",
    ]
    print("\n".join(part), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{now:%Y-%m-%d}-step-time"
    path.with_suffix(".md").write_text("\n".join(lines + part))
    plot(measured, path.with_suffix(".png"))
    print(f"written: {path}.md, {path}.png")


if __name__ == "__main__":
    main()

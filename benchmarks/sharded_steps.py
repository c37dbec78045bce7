"""Steps of sharded optimizers: what collectives cost, and ZeRO-Offload's step. Called by `step_time.py`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
for folder in (ROOT / "tests", ROOT):  # tests/ranks.py starts the ranks; the package need not be installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gwt_dist.comm  # noqa: E402
from gwt_dist import Fragment, GWTAdamW  # noqa: E402
from gwt_dist.comm import Peers, Shard  # noqa: E402
from gwt_dist.exchange import join  # noqa: E402
from ranks import RankPool  # noqa: E402

Shapes = Sequence[tuple[int, ...]]


def llama(layers: int, hidden: int, intermediate: int, vocabulary: int = 32_000) -> list[tuple[int, ...]]:
    """The parameters of a LLaMA, as the transformers library makes them."""
    layer = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *layer * layers, (hidden,), (vocabulary, hidden)]


def flat_optimizer(shapes: Shapes, rank: int = 0, world: int = 1, **options: Any) -> tuple[GWTAdamW, nn.Parameter]:
    """An optimizer on the flat fp32 buffer of `rank`: equal parts of the concatenated tensors, as ZeRO-1 and 2 cut."""
    ranks: list[list[Fragment]] = [[] for _ in range(world)]
    part = -(-sum(map(prod, shapes)) // world)
    begin = 0
    for i, shape in enumerate(shapes):
        for owner in range(world):
            start = min(max(0, owner * part - begin), prod(shape))
            stop = min(max(0, (owner + 1) * part - begin), prod(shape))
            ranks[owner].append(Fragment(f"{i}", shape, start, stop, max(0, begin - owner * part)))
        begin += prod(shape)
    flat = nn.Parameter(torch.randn(part))
    flat.grad = torch.randn(part)
    optimizer = GWTAdamW([flat], **options)
    groups = (dist.group.WORLD,) if world > 1 else ()
    peers = Peers(tuple(range(world)), rank, dist.group.WORLD if world > 1 else None, ranks.__getitem__)
    optimizer.attach({flat: Shard(join(ranks), tuple(ranks[rank]), groups, groups, peers)})  # type: ignore[arg-type]
    return optimizer, flat


def collective_cost(rounds: int) -> list[str]:
    """The share of collectives in a step of LLaMA-60M over two gloo ranks, cut as ZeRO-1 and 2 cut it."""
    lines = [
        "| recipe | level | boundary | step, ms | exchange of cut units and sum of norms, ms | share |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    pool = RankPool(2)
    try:
        for recipe in ("energy", "paper"):
            for level in (2, 3):
                for cut in (False, True):
                    results = pool.run(_collective_rank, recipe, level, cut, rounds, timeout=300.0)
                    step, waited = (max(median(r[i]) for r in results) for i in (0, 1))
                    times = f"{step * 1e3:.2f} | {waited * 1e3:.3f} | {waited / step:.1%}"
                    lines.append(f"| {recipe} | {level} | {'cuts a unit' if cut else 'between units'} | {times} |")
    finally:
        pool.close()
    return lines


def _collective_rank(recipe: str, level: int, cut: bool, rounds: int) -> tuple[list[float], list[float]]:
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    shapes = [*llama(8, 512, 1376), *([(5,)] if cut else [])]  # five elements more move the boundary by three
    optimizer, _ = flat_optimizer(shapes, rank, world, recipe=recipe, level=level)
    steps, collectives = [], []
    real = gwt_dist.comm.all_reduce

    def timed(buffer: Tensor, group: dist.ProcessGroup) -> None:
        begin = time.perf_counter()
        real(buffer, group)
        collectives[-1] += time.perf_counter() - begin

    gwt_dist.comm.all_reduce = timed
    try:
        for i in range(rounds + 2):
            dist.barrier()
            collectives.append(0.0)
            begin = time.perf_counter()
            optimizer.step()
            if i >= 2:
                steps.append(time.perf_counter() - begin)
    finally:
        gwt_dist.comm.all_reduce = real
    return steps, collectives[2:]


def offload(rounds: int) -> list[str]:
    """ZeRO-Offload's step: the fp32 flat buffer of one rank, as DeepSpeed hands it to its optimizer on the CPU."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    shapes = llama(12, 768, 2048)
    energy, flat = flat_optimizer(shapes, recipe="energy", level=2)
    paper, _ = flat_optimizer(shapes, recipe="paper", level=2)
    reference = DeepSpeedCPUAdam([flat], weight_decay=0.01)
    steps: dict[str, Callable[[], Any]] = {
        "DeepSpeedCPUAdam": reference.step,
        "gwt_dist energy level 2": energy.step,
        "gwt_dist paper level 2": paper.step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if i >= 2:
                seconds[name].append(time.perf_counter() - begin)
    lines = ["| optimizer | ms (median) | ratio to DeepSpeedCPUAdam |", "| --- | ---: | ---: |"]
    for name, mine in seconds.items():
        ratio = median(a / b for a, b in zip(mine, seconds["DeepSpeedCPUAdam"], strict=True))
        lines.append(f"| {name} | {median(mine) * 1e3:.2f} | {ratio:.3f} |")
    return lines

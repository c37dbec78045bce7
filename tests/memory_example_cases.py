"""What `test_examples.py` runs of the example with a working memory."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

EXAMPLES = Path(__file__).parents[1] / "examples"


def example() -> Any:
    """The module `working_memory`."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import working_memory  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(EXAMPLES))
    return working_memory


def table_case(seed: int) -> list[dict[str, Any]]:
    """The rows of the table that the example prints."""
    return [row._asdict() for row in example().main(seed)]


def update_case(lora: bool) -> dict[str, Any]:
    """Three steps on all ranks, beside one process with the whole batches and one with this rank's part alone."""
    memory = example()
    torch.manual_seed(0)
    model = memory.Agent().double()
    targets: tuple[str, ...] = ("memory", "attn", "mlp")
    if lora:
        model, targets = memory.with_lora(model).double(), ("memory",)
    start = memory.whole(model)
    rank, world = dist.get_rank(), dist.get_world_size()

    def trained(model: Any, rank: int, world: int) -> dict[str, Tensor]:
        memory.train(model, targets, 3, 0, 0, rank, world)
        return memory.whole(model)  # type: ignore[no-any-return]

    expected = trained(copy.deepcopy(model), 0, 1)
    part = trained(copy.deepcopy(model), rank, world)
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    found = trained(memory.sharded(model), rank, world)

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float((a[name] - b[name]).square().sum()) for name in b) ** 0.5

    moved = {name for name in start if not torch.equal(start[name], found[name])}
    return {
        "sharded": all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters()),
        "error": distance(found, expected) / distance(start, expected),
        "error of a part": distance(part, expected) / distance(start, expected),
        "only what is trained moved": moved == adapted,
    }

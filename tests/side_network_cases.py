"""What the ranks of `test_side_network.py` run: side networks of the example under an engine, and one process."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

EXAMPLES = Path(__file__).parents[1] / "examples"
Weights = dict[str, Tensor]


def example() -> Any:
    """The module of the example."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import side_network  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(EXAMPLES))
    return side_network


def whole(model: nn.Module) -> Weights:
    """All weights, gathered: of ZeRO-3, of FSDP2, of one process."""
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    gathering: Any = nullcontext()
    if partitioned:
        from deepspeed import zero

        gathering = zero.GatheredParameters(partitioned)
    with gathering:
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        }


def difference(a: Weights, b: Weights) -> float:
    """Of the side weights."""
    return sum(float((a[n] - b[n]).double().square().sum()) for n in a if n.startswith("side.")) ** 0.5


def steps_case(engine: str) -> list[dict[str, Any]]:
    """`_steps` of both side networks."""
    return [_steps(kind, engine) for kind in ("sherl", "losa")]


def _steps(kind: str, engine: str) -> dict[str, Any]:
    """Three steps of a side network: how far they are from one process on whole batches, relative to the change, and
    what has gradients and state. In float64 where the engine has it.
    """
    side = example()
    backbone = side.tiny_llama(4)
    if engine == "fsdp2":
        backbone.double()
    start = whole(side.adapted(kind, backbone))
    expected = whole(side.run(kind, None, backbone, steps=3)[0])
    model, optimizer, _ = side.run(kind, engine, backbone, steps=3)
    module = model.module if engine == "zero3" else model
    ids = side.Text().sequences[:2]
    loss = model(input_ids=ids, labels=ids).loss
    if engine == "zero3":
        model.backward(loss)
        stepped = {tensor.fqn for shard in optimizer.shards.values() for tensor in shard.tensors}
    else:
        loss.backward()
        stepped = {name for name, p in module.named_parameters() if p in optimizer.state}
    frozen = {name: p for name, p in module.named_parameters() if name.startswith("backbone.")}
    found = whole(module)
    result = {
        "error": difference(found, expected) / difference(expected, start),
        "stepped": stepped == start.keys() - frozen.keys(),
        "gradients": [name for name, p in frozen.items() if p.requires_grad or p.grad is not None],
        "moved": [name for name in frozen if not torch.equal(found[name], start[name])],
        "frozen": len(frozen),
    }
    if engine == "zero3":
        model.destroy()
    return result


def cost_case() -> dict[str, dict[str, Any]]:
    """What the example measures under FSDP2, of all that it compares; a step shows what the others cost."""
    side = example()
    backbone = side.pretrained(None)
    steps = {"full": 1, "lora": 1, "sherl": side.STEPS, "losa": side.STEPS}
    measured = {kind: side.run(kind, "fsdp2", backbone, number)[2] for kind, number in steps.items()}
    return {kind: asdict(m) | {"beside": m.beside} for kind, m in measured.items()}

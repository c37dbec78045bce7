"""What the ranks of `test_deepspeed_engines.py` run: every layout that DeepSpeed has, its settings and what goes wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gwt_dist
from fsdp2_cases import Counter
from gwt_dist import GWTAdamW, param_groups
from zero_cases import Dot, Net, Scale, gradients, initial, load, options, planned, shapes_of

Step = dict[str, Tensor]
TARGETS = ["attn", "mlp"]


class Tied(Net):
    """Two modules with one weight, which is one parameter and gets the sum of both gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp_tied = Dot(66, 97)
        self.mlp_tied.weight = self.attn_q.weight

    def forward(self, gradients: dict[str, dict[str, Tensor]]) -> Tensor:
        # Half of the gradient comes through each name; halves of eighths are exact.
        half = {"weight": gradients["attn_q"]["weight"] / 2}
        return super().forward({**gradients, "attn_q": half}) + self.mlp_tied(half)


class Vectors(nn.Module):
    """1-D tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Scale(11)
        self.mlp_scale = Scale(3)

    def forward(self, gradients: dict[str, dict[str, Tensor]]) -> Tensor:
        return sum((getattr(self, name)(g) for name, g in gradients.items()), torch.zeros(()))


MODELS: dict[str, Callable[[], nn.Module]] = {"net": Net, "tied": Tied, "vectors": Vectors}


def by_hand(model: nn.Module, level: int, recipe: str) -> list[dict[str, Any]]:
    """Groups as a user writes them: rates and decay of their own, 1-D tensors alone, fewer elements than ranks."""
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tiny, thin = tensors.pop("mlp_tiny.weight"), tensors.pop("mlp_thin.weight")
    flat = [tensors.pop(n) for n in ("norm.weight", "mlp_down.bias")]
    row = tensors.pop("mlp_row.weight")
    return [
        {"params": list(tensors.values()), **options(level, recipe), "lr": 0.03},
        {"params": flat, **options(level, recipe), "weight_decay": 0.0},
        {"params": [tiny], **options(level, recipe), "lr": 0.002},
        {"params": [row, thin], **options(1, "energy"), "lr": 0.005, "betas": (0.8, 0.99)},
    ]


def groups_of(model: nn.Module, kind: str, level: int, recipe: str) -> list[dict[str, Any]]:
    if kind == "by hand":
        return by_hand(model, level, recipe)
    if kind == "one":
        return [{"params": [p for p in model.parameters() if p.requires_grad], **options(level, recipe)}]
    return param_groups(model, targets=TARGETS, **options(level, recipe))


def clipped(step: Step, limit: float) -> tuple[Step, float]:
    """A gradient clipped by its norm over all tensors, as the user expects it: before anything else."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in step.values()))
    factor = limit / (norm + 1e-6) if limit and norm > limit else 1.0
    return {name: g * factor for name, g in step.items()}, norm


def reference(kind: str, groups: str, level: int, recipe: str, steps: Sequence[Step]) -> dict[str, Tensor]:
    """The weights of one process after these gradients."""
    model = MODELS[kind]()
    load(model, initial(shapes_of(model)))
    optimizer = GWTAdamW(groups_of(model, groups, level, recipe))
    for step in steps:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = step[name].clone()
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def build(config: dict[str, Any], kind: str, groups: str, level: int, recipe: str) -> tuple[nn.Module, Any]:
    """A model of known weights and its engine."""
    model = MODELS[kind]()
    load(model, initial(shapes_of(model)))
    optimizer = GWTAdamW(groups_of(model, groups, level, recipe))
    return model, gwt_dist.initialize(model=model, optimizer=optimizer, config=config)[0]


def backward(engine: Any, model: nn.Module, step: Step, scale: float) -> None:
    """Gradients through DeepSpeed's reduction: this rank's part is `scale` times `step`."""
    dtype = next(model.parameters()).dtype
    nested: dict[str, dict[str, Tensor]] = {}
    for name, gradient in step.items():
        module, _, parameter = name.partition(".")
        nested.setdefault(module, {})[parameter] = (gradient * scale).to(dtype)
    engine.backward(engine(nested))
    engine.step()


def micro_batches(step: Step, number: int) -> Iterator[Step]:
    """Gradients whose mean is `step`, exact in bf16."""
    for i in range(number):
        sign = 0 if number == 1 else (-1) ** i
        yield {name: g + sign * (i // 2 + 1) * torch.ones_like(g) / 8 for name, g in step.items()}


def masters(engine: Any, model: nn.Module) -> dict[str, Tensor]:
    """The whole fp32 weights, put together from the fragments of all ranks."""
    attached = dict(engine.basic_optimizer._shards.items())
    if not attached:
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    mine = [
        (f, parameter.detach().reshape(-1)[f.offset : f.offset + f.numel].clone())
        for parameter, shard in attached.items()
        for f in shard.fragments
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, Tensor] = {}
    for fragment, values in (item for items in everyone for item in items):
        tensor = whole.setdefault(fragment.fqn, torch.full(fragment.shape, math.nan))
        tensor.view(-1)[fragment.start : fragment.stop] = values
    return whole


def poison_padding(optimizer: GWTAdamW) -> int:
    """NaN in every element of the flat buffers that belongs to no tensor; how many there are."""
    poisoned = 0
    for parameter, shard in optimizer._shards.items():
        padding = torch.ones(parameter.numel(), dtype=torch.bool)
        for fragment in shard.fragments:
            padding[fragment.offset : fragment.offset + fragment.numel] = False
        parameter.data.view(-1)[padding] = math.nan
        poisoned += int(padding.sum())
    return poisoned


def difference(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Largest difference, relative to the change of its tensor; NaN is infinitely far."""
    errors = [(found[n] - expected[n]).abs().max() / (expected[n] - start[n]).abs().max() for n in expected]
    return max(float(e) if e.isfinite() else math.inf for e in errors)


def stale(model: nn.Module, found: dict[str, Tensor]) -> float:
    """How far the weights that the model computes with are from the masters in its precision."""
    from deepspeed import zero

    parameters = [p for p in model.parameters() if hasattr(p, "ds_id")]
    with zero.GatheredParameters(parameters, enabled=bool(parameters)):
        return max(
            float((p.detach().float() - found[n].to(p.device, p.dtype).float()).abs().max())
            for n, p in model.named_parameters()
            if n in found
        )


class Recorder(Counter):
    """The collectives of each `step()` of an optimizer."""

    def watch(self, optimizer: GWTAdamW) -> list[list[tuple[str, int]]]:
        steps: list[list[tuple[str, int]]] = []

        def begin(*_: Any) -> None:
            self.calls = []
            steps.append(self.calls)

        optimizer.register_step_pre_hook(begin)
        return steps


def engine_case(
    config: dict[str, Any],
    level: int,
    recipe: str,
    kind: str = "net",
    groups: str = "by name",
    accumulate: int = 1,
    clip: float = 0.0,
) -> dict[str, Any]:
    """Five steps under an engine whose padding is NaN: how far from one process, and what it cost."""
    config = copy.deepcopy(config) | {"gradient_accumulation_steps": accumulate}
    summed = config.get("gradient_allreduce_op") == "sum"
    model, engine = build(config, kind, groups, level, recipe)
    optimizer, shapes = engine.basic_optimizer, shapes_of(model)
    at_start = len(optimizer.state)
    poisoned = poison_padding(optimizer)
    start = initial(shapes)
    averaged = dist.get_world_size() if not summed else 1
    expected_steps, norms = [], []
    with Recorder() as recorder:
        steps = recorder.watch(optimizer)
        for step in gradients(shapes, 5):
            for part in micro_batches(step, accumulate):
                backward(engine, model, part, averaged if dist.get_rank() == 0 else 0)
            expected, norm = clipped(step, clip)
            expected_steps.append(expected)
            norms.append((float(engine.get_global_grad_norm() or 0), norm))
    found = masters(engine, model)
    states = list(optimizer.state.values())
    plans = list(optimizer._plans.values())
    zero = config.get("zero_optimization", {})
    result = {
        "error": difference(found, reference(kind, groups, level, recipe, expected_steps), start),
        "stale": stale(model, found),
        "at start": at_start,
        "poisoned": poisoned,
        "steps": sorted({float(s["step"]) for s in states}),
        "norms": norms,
        "collectives": steps,
        "wrapper": type(engine.optimizer).__name__,
        "moments": sum(s["exp_avg"].numel() for s in states),
        "received": sum(len(p.exchange.receives) for p in plans),
        "cut": [(i, r.slot) for i, p in enumerate(plans) for r in p.exchange.receives],
        "bytes": sum(t.numel() * t.element_size() for s in states for t in s.values()),
        "planned": planned(zero["stage"], level, recipe, "haar") if zero.get("stage") and kind == "net" else None,
        "rates": [g["lr"] for g in optimizer.param_groups],
    }
    engine.destroy()
    return result


def snapshot(engine: Any) -> list[Tensor]:
    """Weights of this rank and all state, as they are."""
    optimizer = engine.basic_optimizer
    parameters = list(optimizer._shards) or [p for g in optimizer.param_groups for p in g["params"]]
    kept = [p.detach().clone() for p in parameters]
    return kept + [t.clone() for p in parameters for t in optimizer.state.get(p, {}).values()]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def spoiled_case(config: dict[str, Any], recipe: str, value: float, first: bool) -> dict[str, Any]:
    """Steps with one that has a value that is not finite in one element of the last rank's gradient."""
    model, engine = build(copy.deepcopy(config), "net", "by name", 2, recipe)
    optimizer, shapes = engine.basic_optimizer, shapes_of(model)
    start, good = initial(shapes), list(gradients(shapes, 4))
    scale = dist.get_world_size() if dist.get_rank() == 0 else 0
    before = [] if first else good[:2]
    with Recorder() as recorder:
        steps = recorder.watch(optimizer)
        for step in before:
            backward(engine, model, step, scale)
        kept, calls = snapshot(engine), len(steps)
        spoiled = {name: g.clone() for name, g in good[3].items()}
        if dist.get_rank() == dist.get_world_size() - 1:
            spoiled["mlp_down.weight"][11, 1234] = value
        backward(engine, model, spoiled, 1)
        result: dict[str, Any] = {"called": len(steps) - calls, "same": same_bits(kept, snapshot(engine))}
        after = masters(engine, model)
        result["lost"] = {n for n, w in after.items() if not bool(w.isfinite().all())}
        result["bits"] = [w.view(torch.int32).sum(dtype=torch.int64).item() for w in after.values()]
        for step in good[2:]:
            backward(engine, model, step, scale)
    expected = reference("net", "by name", 2, recipe, [*before, *good[2:]])
    result["error"] = difference(masters(engine, model), expected, start)
    result["collectives"] = steps
    engine.destroy()
    return result


def init_case(config: dict[str, Any]) -> dict[str, int]:
    """Steps that the engine made while it was built, and the state that was there afterwards."""
    steps: list[GWTAdamW] = []
    handle = torch.optim.optimizer.register_optimizer_step_pre_hook(lambda optimizer, *_: steps.append(optimizer))
    try:
        model = Net()
        config = copy.deepcopy(config) | {"optimizer": {"type": "GWTAdamW", "params": {"targets": TARGETS}}}
        engine = gwt_dist.initialize(model=model, config=config)[0]
    finally:
        handle.remove()
    result = {"steps": len(steps), "state": len(engine.basic_optimizer.state)}
    engine.destroy()
    return result

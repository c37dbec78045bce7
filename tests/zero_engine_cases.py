"""What the ranks of `test_deepspeed_engines.py` run: DeepSpeed's layouts and settings, and what goes wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gwt_dist
from fsdp2_cases import Counter
from gwt_dist import GWTAdamW, param_groups
from zero_cases import Net, gradients, load, options, planned, shapes_of
from zero_cases import initial as large
from zero_cases import settings as zero

Step = dict[str, Tensor]
TARGETS = ["attn", "mlp"]


CPU = {"device": "cpu", "pin_memory": False}
BF16_OPTIMIZER = {**zero(1, True), "data_types": {"grad_accum_dtype": "fp32"}}
ENGINES: dict[str, dict[str, Any]] = {
    "no zero section": {k: v for k, v in zero(0).items() if k != "zero_optimization"},  # T2
    "0 fp32": zero(0),  # T2
    "0 bf16": zero(0, True),  # T2
    "bf16 optimizer": BF16_OPTIMIZER,  # T13
    "bf16 optimizer, immediate": {**BF16_OPTIMIZER, "bf16": {"enabled": True, "immediate_grad_update": True}},  # T13
    "2 bf16, fp32 accumulation": {**BF16_OPTIMIZER, **zero(2, True)},  # T13
    "1 offload": zero(1, offload_optimizer=CPU),  # T12
    "2 offload": zero(2, True, offload_optimizer=CPU),  # T12
    "3 offload": zero(3, offload_optimizer=CPU),  # T12
    "3 offload both": zero(3, True, offload_optimizer=CPU, offload_param=CPU),  # T12
    "3 offload weights": zero(3, offload_param=CPU),  # T12
    "1 round robin": zero(1, round_robin_gradients=True),  # T18
    "2 round robin": zero(2, True, round_robin_gradients=True),  # T18
    "1 aligned": zero(1, True, parameter_alignment=True),
    "2 aligned": zero(2, parameter_alignment=True),
    "2 round robin, aligned": zero(2, True, round_robin_gradients=True, parameter_alignment=True),  # T18
    "1 no reduce-scatter": zero(1, True, reduce_scatter=False),  # T4
    "2 no reduce-scatter": zero(2, reduce_scatter=False),  # T4
    "3 no reduce-scatter": zero(3, reduce_scatter=False),  # T4
    "3 tiny sub-groups": zero(3, True, sub_group_size=1000),  # T27
}
ENGINES |= {"1": zero(1), "2": zero(2), "2 bf16": zero(2, True), "3": zero(3), "3 bf16": zero(3, True)}


def initial(shapes: dict[str, tuple[int, ...]]) -> Step:
    """Weights that bf16 holds exactly, and so small that their rounding in fp32 is nothing beside an update."""
    return {name: weight / 256 for name, weight in large(shapes).items()}


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
    return param_groups(model, targets=TARGETS, **options(level, recipe))


def clipped(step: Step, limit: float) -> tuple[Step, float]:
    """A gradient clipped by its norm over all tensors, as the user expects it: before anything else."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in step.values()))
    factor = limit / (norm + 1e-6) if limit and norm > limit else 1.0
    return {name: g * factor for name, g in step.items()}, norm


def reference(groups: str, level: int, recipe: str, steps: Sequence[Step]) -> dict[str, Tensor]:
    """The weights of one process after these gradients."""
    model = Net()
    load(model, initial(shapes_of(model)))
    optimizer = GWTAdamW(groups_of(model, groups, level, recipe))
    for step in steps:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = step[name].clone()
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def build(config: dict[str, Any], groups: str, level: int, recipe: str) -> tuple[nn.Module, Any]:
    """A model of known weights and its engine."""
    model = Net()
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
    attached = dict(engine.basic_optimizer.shards.items())
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
    for parameter, shard in optimizer.shards.items():
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
    groups: str = "by name",
    accumulate: int = 1,
    clip: float = 0.0,
) -> dict[str, Any]:
    """Five steps under an engine whose padding is NaN: how far from one process, and what it cost."""
    config = copy.deepcopy(config) | {"gradient_accumulation_steps": accumulate}
    summed = config.get("gradient_allreduce_op") == "sum"
    model, engine = build(config, groups, level, recipe)
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
    plans = list(optimizer._steps.plans.values())
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage")
    result = {
        "error": difference(found, reference(groups, level, recipe, expected_steps), start),
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
        "planned": planned(zero["stage"], level, recipe, "haar", zero.get("sub_group_size", 10**9)) if stage else 0,
        "rates": [g["lr"] for g in optimizer.param_groups],
    }
    engine.destroy()
    return result


def snapshot(engine: Any) -> list[Tensor]:
    """Weights of this rank and all state, as they are."""
    optimizer = engine.basic_optimizer
    parameters = list(optimizer.shards) or [p for g in optimizer.param_groups for p in g["params"]]
    kept = [p.detach().clone() for p in parameters]
    return kept + [t.clone() for p in parameters for t in optimizer.state.get(p, {}).values()]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def spoiled_case(config: dict[str, Any], recipe: str, value: float, first: bool) -> dict[str, Any]:
    """Steps with one that has a value that is not finite in one element of the last rank's gradient."""
    model, engine = build(copy.deepcopy(config), "by name", 2, recipe)
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
    expected = reference("by name", 2, recipe, [*before, *good[2:]])
    result["error"] = difference(masters(engine, model), expected, start)
    result["collectives"] = steps
    engine.destroy()
    return result


def init_case(config: dict[str, Any]) -> dict[str, int]:
    """Steps that the engine made while it was built, and the state that was there afterwards."""
    steps: list[GWTAdamW] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: steps.append(optimizer))
    try:
        model = Net()
        config = copy.deepcopy(config) | {
            "optimizer": {"type": "GWTAdamW", "params": {"level": 2, "recipe": "energy", "targets": TARGETS}}
        }
        engine = gwt_dist.initialize(model=model, config=config)[0]
    finally:
        handle.remove()
    result = {"steps": len(steps), "state": len(engine.basic_optimizer.state)}
    engine.destroy()
    return result


def read_again_case(config: dict[str, Any]) -> list[bool]:
    """Whether the layout is read alike where DeepSpeed does not say at which element a tensor begins."""
    from gwt_dist.engines import deepspeed as adapter

    _, engine = build(copy.deepcopy(config), "by name", 2, "paper")
    before = [buffer.fragments for buffer in adapter.read(engine.optimizer) or []]
    offsets = engine.optimizer.__dict__.pop("round_robin_bit16_offsets")
    after = [buffer.fragments for buffer in adapter.read(engine.optimizer) or []]
    engine.optimizer.round_robin_bit16_offsets = offsets
    engine.destroy()
    return [before == after, len(before) == 2]


def plain(config: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A model and an engine of plain `deepspeed.initialize`, which nobody has attached yet."""
    import deepspeed

    model = Net()
    load(model, initial(shapes_of(model)))
    optimizer = GWTAdamW(groups_of(model, "by name", 2, "paper"))
    config = copy.deepcopy(config) | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return model, deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def wrapper_case(config: dict[str, Any]) -> float:
    """Attached through the wrapper alone, which is what a callback of a Trainer has in hand."""
    model, engine = plain(config)
    gwt_dist.attach(engine.optimizer, engine.optimizer)
    steps = list(gradients(shapes_of(model), 3))
    for step in steps:
        backward(engine, model, step, dist.get_world_size() if dist.get_rank() == 0 else 0)
    found = masters(engine, model)
    engine.destroy()
    return difference(found, reference("by name", 2, "paper", steps), initial(shapes_of(model)))


def forgotten_case(config: dict[str, Any]) -> tuple[str, bool]:
    """The message of the first step of an engine that nobody attached, and whether the weights stayed as they were."""
    model, engine = plain(config)
    parameters = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    try:
        backward(engine, model, next(gradients(shapes_of(model), 1)), 1)
    except ValueError as error:
        return str(error), same_bits(before, [p.detach() for p in parameters])
    finally:
        engine.destroy()
    return "no error", False


def refused_attach_case(config: dict[str, Any], what: str) -> str:
    """The message of `attach` for an engine that is not what it was when it was built, or that is no engine of ours."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    _, engine = plain(config)
    optimizer = engine.basic_optimizer
    target: Any = engine
    if what == "expert":
        engine.module.mlp_down.weight.allreduce = False
    elif what == "tensor parallel":
        engine.mpu = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 2)
    elif what == "pipeline":
        engine.pipeline_parallelism = True
    elif what == "swapped":
        optimizer = object.__new__(DeepSpeedCPUAdam)  # without the extension that its constructor compiles
        optimizer.opt_id, optimizer.ds_opt_adam = 0, SimpleNamespace(destroy_adam=lambda _: None)
        optimizer = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    elif what == "other":
        optimizer = GWTAdamW(Net().parameters(), level=1)
    else:
        target = engine.optimizer
    try:
        gwt_dist.attach(optimizer, target)
    except ValueError as error:
        return str(error)
    finally:
        engine.module.mlp_down.weight.allreduce = True
        engine.destroy()
    return "no error"


def groups_case(config: dict[str, Any], what: str) -> tuple[str, list[float]]:
    """The message of `initialize` for groups of the user, or the rates after four steps."""
    model = Net()
    groups = by_hand(model, 2, "paper")
    if what == "frozen":
        groups.append({"params": list(model.frozen.parameters())})
    elif what == "expert":
        model.mlp_down.weight.allreduce = False
    try:
        engine = gwt_dist.initialize(model=model, optimizer=GWTAdamW(groups), config=copy.deepcopy(config))[0]
    except ValueError as error:
        return str(error), []
    for step in gradients(shapes_of(model), 4):
        backward(engine, model, step, 1)
    rates = [group["lr"] for group in engine.basic_optimizer.param_groups]
    engine.destroy()
    return "no error", rates


def rounded_case(config: dict[str, Any]) -> list[str]:
    """The messages for bf16 weights rounded by chance: of `initialize`, and of `attach` after DeepSpeed's own."""
    import deepspeed

    messages = []
    for build in (gwt_dist.initialize, deepspeed.initialize):
        model = Net().bfloat16()
        load(model, initial(shapes_of(model)))
        optimizer = GWTAdamW(param_groups(model, targets=TARGETS, stochastic_rounding=True, level=2, recipe="energy"))
        settings = copy.deepcopy(config) | {"zero_allow_untested_optimizer": True}
        try:
            engine = build(model=model, optimizer=optimizer, config=settings)[0]
            gwt_dist.attach(optimizer, engine)
            with patch.dict("os.environ", GWT_DIST_KERNEL="eager"):  # others would be compiled for this alone
                backward(engine, model, next(gradients(shapes_of(model), 1)), 1)
            engine.destroy()
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


def universal_case(config: dict[str, Any], folder: str) -> str:
    """The message of DeepSpeed's conversion of its own checkpoint, on rank 0."""
    from deepspeed.checkpoint import ds_to_universal

    model, engine = build(copy.deepcopy(config), "by name", 2, "paper")
    for step in gradients(shapes_of(model), 2):
        backward(engine, model, step, 1)
    engine.save_checkpoint(folder, tag="step")
    engine.destroy()
    arguments = ["--input_folder", f"{folder}/step", "--output_folder", f"{folder}/universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    try:
        if dist.get_rank() == 0:
            with patch("sys.argv", ["ds_to_universal", *arguments, *workers]):
                ds_to_universal.main(ds_to_universal.parse_arguments())
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return "no error"

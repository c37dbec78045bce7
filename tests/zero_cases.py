"""What the ranks of the DeepSpeed tests run: a model whose gradients are chosen, trained by an engine and by
one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gwt_dist
from gwt_dist import GWTAdamW, LayoutError, memory, param_groups

LR = 0.01


class Dot(nn.Linear):
    """A Linear whose gradients are its inputs: the forward is the sum of elementwise products."""

    def __init__(self, rows: int, columns: int, bias: bool = False) -> None:
        super().__init__(columns, rows, bias=bias)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        # By attribute: FSDP1 puts views there and leaves no parameters.
        return sum(((getattr(self, name) * g).sum() for name, g in gradients.items()), torch.zeros(()))


class Scale(nn.Module):
    """A 1-D parameter, as a norm has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return (self.weight * gradients["weight"]).sum()


class Experts(nn.Module):
    """A stack of matrices in one parameter, as mixtures of experts keep them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return (self.weight * gradients["weight"]).sum()


class Net(nn.Module):
    """Odd shapes: units that end at no boundary, a row shorter than a unit, fewer elements than ranks, 1-D, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Dot(7, 13)
        self.attn_q = Dot(66, 97)
        self.norm = Scale(11)
        self.mlp_down = Dot(16, 5461, bias=True)  # the MLP of the field's 1B LLaMA is this wide
        self.mlp_row = Dot(1, 29)
        self.mlp_tiny = Dot(1, 2)
        self.mlp_thin = Dot(9, 3)
        self.frozen = Dot(5, 5)
        self.frozen.requires_grad_(False)

    def forward(self, gradients: dict[str, dict[str, Tensor]]) -> Tensor:
        return sum((getattr(self, name)(g) for name, g in gradients.items()), torch.zeros(()))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters() if p.requires_grad}


def initial(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that bf16 holds exactly, so that masters start alike in every precision."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).bfloat16().float() for name, shape in shapes.items()}


def gradients(shapes: dict[str, tuple[int, ...]], steps: int) -> Iterator[dict[str, Tensor]]:
    """Gradients of few significant bits: three times one, and its third again, are exact in fp32 and bf16."""
    generator = torch.Generator().manual_seed(2)
    for size in [1.0, 0.25, 4.0, 1.0, 2.0][:steps]:
        yield {
            name: size * torch.randint(-9, 10, shape, generator=generator).float() / 8 for name, shape in shapes.items()
        }


def options(level: int, recipe: str, wavelet: str = "haar") -> dict[str, Any]:
    """Of a group; "energy in int8" is the recipe with moments in that format."""
    recipe, _, state_dtype = recipe.partition(" in ")
    keys = {"state_dtype": state_dtype} if state_dtype else {}
    return dict(lr=LR, level=level, recipe=recipe, wavelet=wavelet, weight_decay=0.1, **keys)


@cache
def reference(level: int, recipe: str, steps: int, wavelet: str = "haar") -> dict[str, Tensor]:
    """The weights after `steps` steps of one process."""
    model = Net()
    shapes = shapes_of(model)
    load(model, initial(shapes))
    optimizer = GWTAdamW(param_groups(model, targets=["attn", "mlp"], **options(level, recipe, wavelet)))
    for step in gradients(shapes, steps):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = step[name].clone()
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def settings(stage: int, bf16: bool = False, **zero: Any) -> dict[str, Any]:
    """A DeepSpeed JSON without clipping, which DeepSpeed has on by default."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, **zero},
    }


def build(config: dict[str, Any], zero_init: bool = False) -> tuple[Any, Any]:
    """A model of known weights, under `zero.Init` or not, and its engine."""
    import deepspeed

    if zero_init:
        shapes = shapes_of(Net())
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Net()
        for name, weight in initial(shapes).items():
            parameter = model.get_parameter(name)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    parameter.data.copy_(weight)
    else:
        model = Net()
        load(model, initial(shapes_of(model)))
    return model, gwt_dist.initialize(model=model, config=config)[0]


def train(engine: Any, model: nn.Module, steps: int) -> None:
    """The first steps of `gradients`."""
    train_on(engine, model, list(gradients(shapes_of(model), steps)))


def train_on(engine: Any, model: nn.Module, steps: list[dict[str, Tensor]]) -> None:
    """A step for each of these gradients: rank 0 brings all of them, so that averaging gives them back exactly."""
    dtype = next(model.parameters()).dtype
    factor = dist.get_world_size() if dist.get_rank() == 0 else 0
    for step in steps:
        nested: dict[str, dict[str, Tensor]] = {}
        for name, gradient in step.items():
            module, _, parameter = name.partition(".")
            nested.setdefault(module, {})[parameter] = (gradient * factor).to(dtype)
        engine.backward(engine(nested))
        engine.step()


def masters(model: nn.Module) -> dict[str, Tensor]:
    """The whole fp32 weights, gathered by DeepSpeed."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        n: safe_get_full_fp32_param(p).detach().clone().view(getattr(p, "ds_shape", p.shape))
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def planned(stage: int, level: int, recipe: str, wavelet: str, sub_group_size: int = 1_000_000_000) -> int:
    """State bytes of this rank from shapes alone."""
    model = Net()
    groups = param_groups(model, targets=["attn", "mlp"], **options(level, recipe, wavelet))
    specs = memory.specs(model.named_parameters(), groups)
    return memory.plan_zero(
        specs, stage=stage, world_size=dist.get_world_size(), rank=dist.get_rank(), sub_group_size=sub_group_size
    ).total


def zero_case(
    stage: int, bf16: bool, zero_init: bool, level: int, recipe: str, wavelet: str = "haar"
) -> dict[str, Any]:
    """Five steps under an engine; how far they are from one process, and what this rank holds."""
    from deepspeed import zero

    config = settings(stage, bf16)
    params = {**options(level, recipe, wavelet), "targets": ["attn", "mlp"]}
    config["optimizer"] = {"type": "GWTAdamW", "params": params}
    model, engine = build(config, zero_init)
    start = initial(shapes_of(model))
    train(engine, model, steps=5)
    expected, found = reference(level, recipe, 5, wavelet), masters(model)
    error = max(float((found[n] - expected[n]).abs().max() / (expected[n] - start[n]).abs().max()) for n in expected)
    with zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        stale = max(
            float((p.detach().float() - found[n].to(p.dtype).float()).abs().max())
            for n, p in model.named_parameters()
            if n in found
        )
    optimizer = engine.basic_optimizer
    states = list(optimizer.state.values())
    result = {
        "error": error,
        "stale": stale,
        "steps": sorted({float(s["step"]) for s in states}),
        "moments": sum(s["exp_avg"].numel() for s in states),
        "bytes": sum(t.numel() * t.element_size() for s in states for t in s.values()),
        "planned": planned(stage, level, recipe, wavelet),
        "received": sum(len(p.exchange.receives) for p in optimizer._steps.plans.values()),
        "cut": [(i, r.slot) for i, p in enumerate(optimizer._steps.plans.values()) for r in p.exchange.receives],
    }
    engine.destroy()
    return result


def resume_case(stage: int, bf16: bool, folder: str) -> float:
    """Five steps at once, and two and three with DeepSpeed's own checkpoint between: largest difference."""
    config = settings(stage, bf16)
    config["optimizer"] = {"type": "GWTAdamW", "params": {**options(3, "paper"), "targets": ["attn", "mlp"]}}
    model, engine = build(config)
    steps = list(gradients(shapes_of(model), 5))
    train_on(engine, model, steps)
    expected = masters(model)
    engine.destroy()
    first, engine = build(config)
    train_on(engine, first, steps[:2])
    engine.save_checkpoint(folder)
    engine.destroy()
    second, engine = build(config)
    assert engine.load_checkpoint(folder)[0] is not None
    train_on(engine, second, steps[2:])
    found = masters(second)
    engine.destroy()
    return max(float((found[n] - expected[n]).abs().max()) for n in expected)


def forgotten_attach_case(stage: int) -> str:
    """The message of the first step of an engine that nobody attached, built by plain `deepspeed.initialize`."""
    import deepspeed

    model = Net()
    config = settings(stage, False, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}))
    config |= {
        "optimizer": {"type": "GWTAdamW", "params": {"lr": LR, "recipe": "energy"}},
    }
    parameters = [{"params": [p for p in model.parameters() if p.requires_grad], "level": 2}]
    engine = deepspeed.initialize(model=model, config=config, model_parameters=parameters)[0]
    try:
        train(engine, model, 1)
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"


def plain_json_case(stage: int) -> float:
    """Plain `deepspeed.initialize` with the type in the JSON and groups that say their level, then
    `gwt_dist.attach`: as one process at that level for all.
    """
    import deepspeed

    model = Net()
    load(model, initial(shapes_of(model)))
    config = settings(stage, False) | {
        "optimizer": {"type": "GWTAdamW", "params": options(1, "paper")},
    }
    parameters = [{"params": [p for p in model.parameters() if p.requires_grad], "level": 2}]
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config, model_parameters=parameters)
    gwt_dist.attach(optimizer, engine)
    train(engine, model, 3)
    found = masters(model)
    engine.destroy()
    whole = Net()
    load(whole, initial(shapes_of(whole)))
    reference_optimizer = GWTAdamW([p for p in whole.parameters() if p.requires_grad], **options(2, "paper"))
    for step in gradients(shapes_of(whole), 3):
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad:
                parameter.grad = step[name].clone()
        reference_optimizer.step()
    start = initial(shapes_of(whole))
    expected = {n: p.detach() for n, p in whole.named_parameters() if p.requires_grad}
    return max(float((found[n] - expected[n]).abs().max() / (expected[n] - start[n]).abs().max()) for n in expected)


def wrong_layout_case(stage: int, what: str) -> str:
    """The message of `attach` when DeepSpeed lays a buffer out in another way on rank 1 alone."""
    from gwt_dist.engines import deepspeed as adapter

    real = adapter.read

    def shifted(wrapper: Any) -> Any:
        buffers = real(wrapper)
        if buffers is None or dist.get_rank() != 1:
            return buffers
        number = next(i for i, f in enumerate(buffers[0].fragments) if f.numel > 4)
        f = buffers[0].fragments[number]
        if what == "offset":
            other = replace(f, offset=f.offset + 1)
            weights = buffers[0].weights
        else:  # the last element left out, weights and buffer agreeing
            other = replace(f, stop=f.stop - 1)
            weights = tuple(w[:-1] if i == number else w for i, w in enumerate(buffers[0].weights))
        fragments = tuple(other if i == number else g for i, g in enumerate(buffers[0].fragments))
        return [replace(buffers[0], fragments=fragments, weights=weights), *buffers[1:]]

    config = settings(stage, False)
    config["optimizer"] = {"type": "GWTAdamW", "params": {**options(2, "paper"), "targets": ["attn", "mlp"]}}
    adapter.read = shifted
    try:
        build(config)
    except LayoutError as error:
        return str(error)
    finally:
        adapter.read = real
    return "no error"


def refused_case(change: dict[str, Any], params: dict[str, Any], client: bool = False) -> str:
    """The message of `initialize` for a JSON that is changed in one place."""
    config: dict[str, Any] = settings(2, False)
    for section, value in change.items():
        config[section] = {**config.get(section, {}), **value} if isinstance(value, dict) else value
    config["optimizer"] = {"type": "GWTAdamW", "params": {**options(2, "paper"), "targets": ["mlp"], **params}}
    model = Net()
    optimizer = GWTAdamW(model.parameters(), level=1) if client else None
    try:
        gwt_dist.initialize(model=model, config=config, optimizer=optimizer)
    except ValueError as error:
        return str(error)
    return "no error"

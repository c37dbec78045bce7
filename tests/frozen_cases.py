"""What the ranks of `test_frozen.py` run: weights frozen and thawed while an engine trains, and one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gwt_dist
from gwt_dist import GWTAdamW
from zero_cases import Net, gradients, initial, load, options, shapes_of, train_on
from zero_engine_cases import difference, masters

Phase = tuple[int, str]  # steps, and the prefix of the names of what is frozen in them; "" for nothing


def groups_of(model: nn.Module, alone: str, recipe: str) -> list[dict[str, Any]]:
    """All trained parameters in one group, but for those whose name begins with `alone`, if that says anything."""
    named = [(n, p) for n, p in model.named_parameters() if "frozen" not in n]
    mine = [p for n, p in named if alone and n.startswith(alone)]
    rest = [p for n, p in named if not (alone and n.startswith(alone))]
    return [{"params": its, **options(2, recipe)} for its in (rest, mine) if its]


def freeze(model: nn.Module, prefix: str) -> None:
    """Train all but what begins with `prefix`."""
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
        if not name.startswith("frozen"):
            parameter.requires_grad_(not (prefix and name.startswith(prefix)))


def reference(alone: str, recipe: str, phases: Sequence[Phase]) -> dict[str, Tensor]:
    """The weights of one process."""
    model = Net()
    shapes = shapes_of(model)
    load(model, initial(shapes))
    optimizer = GWTAdamW(groups_of(model, alone, recipe))
    steps = gradients(shapes, sum(number for number, _ in phases))
    for number, prefix in phases:
        freeze(model, prefix)
        for _ in range(number):
            for (name, parameter), its in zip(named(model), [next(steps)] * len(shapes), strict=True):
                parameter.grad = its[name].clone() if parameter.requires_grad else None
            optimizer.step()
    return {n: p.detach().clone() for n, p in named(model)}


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What is trained at some time."""
    return [(n, p) for n, p in model.named_parameters() if not n.startswith("frozen")]


def zero_case(
    config: dict[str, Any], alone: str, recipe: str, phases: Sequence[Phase], at_start: str = ""
) -> tuple[float, float, str]:
    """How far the masters are from one process, how far what was frozen moved in the second phase, and the error."""
    model = Net()
    shapes = shapes_of(model)
    load(model, initial(shapes))
    freeze(model, at_start)
    engine = gwt_dist.initialize(model=model, optimizer=GWTAdamW(groups_of(model, alone, recipe)), config=config)[0]
    steps, message, moved = gradients(shapes, sum(number for number, _ in phases)), "", 0.0
    for number, prefix in phases:
        freeze(model, prefix)
        before = _masters(engine, model)
        for _ in range(number):
            try:
                train_on(engine, model, [next(steps)])
            except ValueError as error:
                message = str(error)
                engine.destroy()
                return 0.0, moved, message
        after = _masters(engine, model)
        still = [
            float((after[n] - before[n]).abs().max()) for n in shapes if prefix and n.startswith(prefix) and n in after
        ]
        moved = max(moved, *still, 0.0)
    found = _masters(engine, model)
    engine.destroy()
    return difference(found, reference(alone, recipe, phases), initial(shapes)), moved, message


def zero_cases(config: dict[str, Any], runs: Sequence[tuple[str, str, Sequence[Phase], str]]) -> list[Any]:
    """`zero_case` of each of `runs`."""
    return [zero_case(config, *run) for run in runs]


def resumed_case(config: dict[str, Any], recipe: str, folder: str) -> tuple[float, dict[str, int], str]:
    """Two steps, two with `mlp` frozen, saved, one more in a new engine: how far from one process, counts, the error
    of thawing it then.
    """
    phases = [(2, ""), (2, "mlp"), (1, "mlp")]
    model, engine = _engine(config, recipe)
    shapes = shapes_of(model)
    steps = list(gradients(shapes, 5))
    train_on(engine, model, steps[:2])
    freeze(model, "mlp")
    train_on(engine, model, steps[2:4])
    gwt_dist.save(folder, engine, engine.optimizer, step=4)
    engine.destroy()
    model, engine = _engine(config, recipe)
    freeze(model, "mlp")
    gwt_dist.load(folder, engine, engine.optimizer)
    train_on(engine, model, steps[4:])
    found, message = _masters(engine, model), ""
    gwt_dist.save(folder, engine, engine.optimizer, step=5)
    freeze(model, "")
    try:
        train_on(engine, model, steps[:1])
    except ValueError as error:
        message = str(error)
    engine.destroy()
    tensors = json.loads((Path(folder) / "step-00000005" / "index.json").read_text())["tensors"]
    counts = {name: entry["step"] for name, entry in tensors.items() if not name.startswith("frozen")}
    return difference(found, reference("", recipe, phases), initial(shapes)), counts, message


def own_checkpoint_case(config: dict[str, Any], recipe: str, folder: str) -> tuple[float, str]:
    """The same through DeepSpeed's own checkpoint: how far from one process, and the error of thawing after it."""
    model, engine = _engine(config, recipe)
    shapes = shapes_of(model)
    steps = list(gradients(shapes, 5))
    train_on(engine, model, steps[:2])
    freeze(model, "mlp")
    train_on(engine, model, steps[2:4])
    engine.save_checkpoint(folder)
    engine.destroy()
    found, message = {}, ""
    for prefix in ("mlp", ""):
        model, engine = _engine(config, recipe)
        freeze(model, prefix)
        engine.load_checkpoint(folder)
        try:
            train_on(engine, model, steps[4:])
            found = _masters(engine, model)
        except ValueError as error:
            message = str(error)
        engine.destroy()
    return difference(found, reference("", recipe, [(2, ""), (2, "mlp"), (1, "mlp")]), initial(shapes)), message


def _engine(config: dict[str, Any], recipe: str) -> tuple[nn.Module, Any]:
    model = Net()
    load(model, initial(shapes_of(model)))
    optimizer = GWTAdamW(groups_of(model, "", recipe))
    return model, gwt_dist.initialize(model=model, optimizer=optimizer, config=config)[0]


def _masters(engine: Any, model: nn.Module) -> dict[str, Tensor]:
    attached = dict(engine.basic_optimizer.shards.items())
    return masters(engine, model) if attached else {n: p.detach().clone().float() for n, p in named(model)}


def sharded_case(kind: str, recipe: str, runs: Sequence[tuple[Sequence[Phase], str]]) -> list[float]:
    """The same under DDP, FSDP2 and FSDP1, of each of `runs`: how far from one process."""
    return [_sharded(kind, recipe, *run) for run in runs]


def _sharded(kind: str, recipe: str, phases: Sequence[Phase], at_start: str) -> float:
    model: Any = Net()
    shapes = shapes_of(model)
    load(model, initial(shapes))
    freeze(model, at_start)
    if kind == "DDP":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif kind == "FSDP2":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    params = [p for n, p in model.named_parameters() if "frozen." not in n]
    optimizer = GWTAdamW(params, **options(2, recipe))
    gwt_dist.attach(optimizer, model)
    steps = gradients(shapes, sum(number for number, _ in phases))
    scale = dist.get_world_size() if dist.get_rank() == 0 else 0
    for number, prefix in phases:
        freeze(model, prefix)
        for _ in range(number):
            optimizer.zero_grad()
            nested: dict[str, dict[str, Tensor]] = {}
            for name, gradient in next(steps).items():
                module, _, parameter = name.partition(".")
                nested.setdefault(module, {})[parameter] = gradient * scale
            model(nested).backward()
            optimizer.step()
    found = {}
    if kind == "FSDP1":
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            for name, p in model.named_parameters():
                found[name.replace("_fsdp_wrapped_module.", "")] = p.detach().clone()
    else:
        for name, p in model.named_parameters():
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            found[name.removeprefix("module.")] = whole.detach().clone()
    return difference(found, reference("", recipe, phases), initial(shapes))

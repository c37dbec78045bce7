"""What the ranks of `test_roads.py` run: state on its way around `gwt_dist.save` and `load`."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import gwt_dist
from fsdp1_cases import refusal, unit_options
from gwt_dist import GWTAdamW
from zero_cases import settings

Trained = tuple[Any, GWTAdamW]
BEFORE, AFTER = 3, 2


def net(even: bool = False) -> nn.Sequential:
    """Three layers whose parts on ranks differ in size, or two that fall to two ranks evenly."""
    torch.manual_seed(0)
    if even:
        return nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def optimizer_of(model: nn.Module, **options: Any) -> GWTAdamW:
    return GWTAdamW(model.parameters(), **{"lr": 0.01, "level": 2, "recipe": "paper", **options})


def batch(number: int) -> Tensor:
    """The same on all ranks, so that what they average is what one process has."""
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(number))


def train(trained: Trained, first: int, last: int) -> None:
    model, optimizer = trained
    for number in range(first, last):
        model(batch(number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(**options: Any) -> Trained:
    model = net()
    return model, optimizer_of(model, **options)


def fsdp2(**options: Any) -> Trained:
    model = net()
    for block in (model[0], model[2]):
        fully_shard(block)
    fully_shard(model)
    return model, optimizer_of(model, **options)


def fsdp1(use_orig_params: bool, fused: bool = False, even: bool = False, **options: Any) -> Trained:
    model = FullyShardedDataParallel(net(even), **unit_options("FULL_SHARD", use_orig_params))
    optimizer = optimizer_of(model, **options)
    gwt_dist.attach(optimizer, model)
    if fused:
        gwt_dist.fuse_backward(optimizer, model)
    return model, optimizer


class Engine:
    """A DeepSpeed engine around `net`, trained as the others are."""

    def __init__(self, stage: int, bf16: bool = False, even: bool = False, **options: Any) -> None:
        zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        self.module = net(even)
        self.optimizer = optimizer_of(self.module, **options)
        config = settings(stage, bf16, **zero) | {"train_micro_batch_size_per_gpu": 6}
        self.engine = gwt_dist.initialize(model=self.module, optimizer=self.optimizer, config=config)[0]
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def train(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.engine.backward(self.engine(batch(number).to(self.dtype)).square().mean())
            self.engine.step()


def whole(model: nn.Module) -> list[Tensor]:
    """The weights, whole."""
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, as a part of how far one process has moved."""
    start = [p.detach() for p in net().parameters()]
    moved = max(float((b - a).abs().max()) for a, b in zip(start, expected, strict=True))
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / moved


def expected_of(last: int, **options: Any) -> list[Tensor]:
    trained = alone(**options)
    train(trained, 0, last)
    return whole(trained[0])


def through_torch(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# ---------------------------------------------------------------------------------------------- state_dict and DCP


def between_layouts_case(recipe: str) -> dict[str, Any]:
    """State of one layout, loaded into another: the messages, and whether anything changed."""
    single = alone(recipe=recipe)
    train(single, 0, BEFORE)
    told = single[1].state_dict()
    sharded = fsdp2(recipe=recipe)
    train(sharded, 0, BEFORE)
    before = [t.clone() for s in sharded[1].state.values() for t in s.values()]
    results = {"plain to DTensor": refusal(lambda: sharded[1].load_state_dict(copy.deepcopy(told)))}
    fresh = fsdp2(recipe=recipe)
    results["plain to fresh DTensor"] = refusal(lambda: fresh[1].load_state_dict(copy.deepcopy(told)))
    dtensors = sharded[1].state_dict()
    again = alone(recipe=recipe)
    results["DTensor to plain"] = refusal(lambda: again[1].load_state_dict(dtensors))
    after = [t for s in sharded[1].state.values() for t in s.values()]
    results["changed"] = not all(torch.equal(local_of(a), local_of(b)) for a, b in zip(before, after, strict=True))
    results["left"] = len(again[1].state) + len(fresh[1].state)
    return results


def local_of(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat_and_whole_case(use_orig_params: bool) -> dict[str, str]:
    """State of one process for FSDP1, and the reverse."""
    single, flat = alone(), fsdp1(use_orig_params)
    train(single, 0, 1)
    train(flat, 0, 1)
    mine, its = single[1].state_dict(), flat[1].state_dict()
    assert mine.keys() == {"state", "param_groups"}
    return {
        "to flat": refusal(lambda: flat[1].load_state_dict(mine)),
        "to whole": refusal(lambda: single[1].load_state_dict(its)),
    }


def aligned_columns_case() -> str:
    """A state of aligned columns, loaded where it was saved, and that of rows for it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    told = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dim in (0, 1):
        weight = nn.Parameter(distribute_tensor(torch.ones(8, 16), mesh, [Shard(dim)]))
        optimizer = GWTAdamW([weight], level=2, recipe="energy")
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        told.append(optimizer.state_dict())
    optimizer.load_state_dict(told[1])
    return refusal(lambda: optimizer.load_state_dict(told[0]))


def other_mesh_case() -> dict[str, str]:
    """DTensors over the ranks in another order, and placed in another way."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate

    trained = fsdp2()
    train(trained, 0, 1)
    results = {}
    turned = DeviceMesh("cpu", list(reversed(range(dist.get_world_size()))))
    for what in ("mesh", "placement"):
        told = trained[1].state_dict()
        state = {key: dict(values) for key, values in told["state"].items()}
        full = state[0]["exp_avg"].full_tensor()
        if what == "mesh":
            state[0]["exp_avg"] = distribute_tensor(full, turned, state[0]["exp_avg"].placements)
        else:
            state[0]["exp_avg"] = distribute_tensor(full, state[0]["exp_avg"].device_mesh, [Replicate()])
        results[what] = refusal(lambda told=told, state=state: trained[1].load_state_dict({**told, "state": state}))
    return results


def dtensors_of_rank_0_case() -> list[str]:
    """The DTensors of a state that rank 0 wrote, read by all: they are those of rank 0, whatever their shapes say."""
    trained = fsdp2()
    train(trained, 0, 1)
    told: list[Any] = [trained[1].state_dict()]
    found = [refusal(lambda: trained[1].load_state_dict(through_torch(trained[1].state_dict())))]
    dist.broadcast_object_list(told, src=0)
    return [*found, refusal(lambda: trained[1].load_state_dict(told[0]))]


def full_state_case(broadcast: bool) -> float:
    """The way out of the message: state of one process through torch's `set_optimizer_state_dict`."""
    single = alone()
    train(single, 0, BEFORE)
    _, told = get_state_dict(*single, options=StateDictOptions(full_state_dict=True))
    if broadcast and dist.get_rank():
        told = {}
    sharded = fsdp2()
    with torch.no_grad():
        for mine, other in zip(sharded[0].parameters(), single[0].parameters(), strict=True):
            mine.copy_(torch.distributed.tensor.distribute_tensor(other.detach(), mine.device_mesh, mine.placements))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_optimizer_state_dict(*sharded, optim_state_dict=told, options=options)
    train(sharded, BEFORE, BEFORE + AFTER)
    return off(whole(sharded[0]), expected_of(BEFORE + AFTER))


def fused_dcp_case(folder: str, fused: bool, kind: str) -> float:
    """Three steps, `dcp.save`, new objects, `dcp.load`, two more."""

    def built() -> Trained:
        trained = fsdp2() if kind == "fsdp2" else alone()
        if fused:
            gwt_dist.fuse_backward(trained[1], trained[0])
        return trained

    first = built()
    train(first, 0, BEFORE)
    model, optimizer = get_state_dict(*first)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=Path(folder))
    second = built()
    model, optimizer = get_state_dict(*second)
    content = {"model": model, "optimizer": optimizer}
    dcp.load(content, checkpoint_id=Path(folder))
    set_state_dict(*second, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    train(second, BEFORE, BEFORE + AFTER)
    return off(whole(second[0]), expected_of(BEFORE + AFTER))


def some_ranks_dcp_case(folder: str, options: dict[str, Any], saving: bool) -> float:
    """What is on some ranks alone goes through `dcp.save` and, on other ranks, `dcp.load`; no whole tensors of it."""
    trained = fsdp2(**options)
    if saving:
        train(trained, 0, BEFORE)
        model, state = get_state_dict(*trained)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
        if dist.get_world_size() > 1:
            told = refusal(lambda: get_optimizer_state_dict(*trained, options=StateDictOptions(full_state_dict=True)))
            assert "is kept by some ranks alone, so it would be lost" in told, told
    else:
        model, state = get_state_dict(*trained)
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(*trained, model_state_dict=model, optim_state_dict=state)
        train(trained, BEFORE, BEFORE + AFTER)
        return off(whole(trained[0]), expected_of(BEFORE + AFTER, **options))
    return 0.0


def fused_by_hand_case(kind: str) -> dict[str, float]:
    """Gradients set by hand, before and after fused steps."""
    trained: Trained
    if kind == "fsdp1":
        trained = fsdp1(True, fused=True)
    else:
        trained = fsdp2() if kind == "fsdp2" else alone()
        gwt_dist.fuse_backward(trained[1], trained[0])
    other = fsdp1(True) if kind == "fsdp1" else fsdp2() if kind == "fsdp2" else alone()
    for number in range(4):
        for one, its in zip(trained[0].parameters(), other[0].parameters(), strict=True):
            if number % 2 == 0:
                one.grad = torch.full_like(one, 0.1 * number + 0.1)
                its.grad = torch.full_like(its, 0.1 * number + 0.1)
        if number % 2:
            trained[0](batch(number)).square().mean().backward()
            other[0](batch(number)).square().mean().backward()
        for _, optimizer in (trained, other):
            optimizer.step()
            optimizer.zero_grad()
    pairs = list(zip(trained[0].parameters(), other[0].parameters(), strict=True))
    steps = {float(state["step"]) for state in trained[1].state.values()}
    differ = [float((local_of(a) - local_of(b)).abs().max()) for a, b in pairs if local_of(a).numel()]
    return {"differ": max(differ, default=0.0), "steps": max(steps, default=4.0)}


def another_meaning_case(kind: str, folder: str) -> dict[str, str]:
    """State that was saved with a limiter, loaded into an optimizer without one, by each road of an engine."""
    without = {"recipe": "paper", "limiter": 0.0}
    if kind.startswith("zero"):
        first = Engine(int(kind[4]), kind.endswith("bf16"))
        first.train(0, 1)
        first.engine.save_checkpoint(folder)
        second = Engine(int(kind[4]), kind.endswith("bf16"), **without)
        found = {"load_checkpoint": refusal(lambda: second.engine.load_checkpoint(folder))}
        first.engine.destroy()
        second.engine.destroy()
        return found
    build: Callable[..., Trained] = {"alone": alone, "fsdp2": fsdp2, "fsdp1": lambda **o: fsdp1(True, **o)}[kind]
    first_, fresh, stepped = build(), build(**without), build(**without)
    train(first_, 0, 1)
    train(stepped, 0, 1)
    told = first_[1].state_dict()
    found = {
        "fresh": refusal(lambda: fresh[1].load_state_dict(told)),
        "stepped": refusal(lambda: stepped[1].load_state_dict(told)),
    }
    assert not fresh[1].state and fresh[1].param_groups[0]["limiter"] == 0.0
    if kind != "fsdp1":
        _, optimizer = get_state_dict(*first_)
        found["set_optimizer_state_dict"] = refusal(
            lambda: set_optimizer_state_dict(*stepped, optim_state_dict=optimizer)
        )
    gwt_dist.save(folder, *first_, step=1)
    found["gwt_dist.load"] = refusal(lambda: gwt_dist.load(folder, *fresh))
    return found


def of_rank_0_case(kind: str) -> list[str]:
    """The state of rank 0, given to all; that of rank 1 has the same sizes."""
    if kind.startswith("zero"):
        engine = Engine(int(kind[4]), even=True)
        engine.train(0, 1)
        zero = engine.engine.optimizer
        if kind == "zero3":
            zero._set_fp32_optimizer_param_groups()
        optimizer = engine.optimizer
    else:
        _, optimizer = trained = fsdp1(kind == "fsdp1", even=True)
        train(trained, 0, 1)
    told: list[Any] = [optimizer.state_dict()]
    own = refusal(lambda: optimizer.load_state_dict(told[0]))
    dist.broadcast_object_list(told, src=0)
    found = [own, refusal(lambda: optimizer.load_state_dict(told[0]))]
    if kind.startswith("zero"):
        engine.engine.destroy()
    return found


# ----------------------------------------------------------------------------------------------------- state by name


def by_name_case(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's functions and `full_state` return of each tensor after three steps, beside one process."""
    from deepspeed import utils

    single = alone(**options)
    train(single, 0, BEFORE)
    engine = Engine(int(kind[4]), kind.endswith("bf16"), **options)
    engine.train(0, BEFORE)
    engine.engine.backward(engine.engine(batch(BEFORE).to(engine.dtype)).square().mean())
    single[0](batch(BEFORE)).square().mean().backward()
    messages, weights, gradients, states = set(), 0.0, 0.0, 0.0
    for (name, parameter), one in zip(engine.module.named_parameters(), single[0].parameters(), strict=True):
        value = torch.zeros(one.shape)
        calls: list[Callable[[], object]] = [
            lambda p=parameter: utils.safe_get_full_optimizer_state(p, "exp_avg"),
            lambda p=parameter: utils.safe_get_full_optimizer_state(p, "step"),
            lambda p=parameter, v=value: utils.safe_set_full_optimizer_state(p, v, "exp_avg_sq"),
        ]
        if kind.startswith("zero3"):
            calls += [
                lambda p=parameter: utils.safe_get_local_optimizer_state(p, "exp_avg"),
                lambda p=parameter, v=value: utils.safe_set_local_optimizer_state(p, v, "exp_avg"),
            ]
        messages |= {refusal(call) for call in calls}
        weight, gradient = utils.safe_get_full_fp32_param(parameter), utils.safe_get_full_grad(parameter)
        weights = max(weights, _apart(weight, one.detach()))
        gradients = max(gradients, _apart(gradient, one.grad))
        utils.safe_set_full_fp32_param(parameter, weight)
        state = gwt_dist.full_state(engine.engine, engine.optimizer, name)
        states = max(states, differ(state, single[1].state[one]))
    found = {"messages": messages, "weights": weights, "gradients": gradients, "states": states}
    engine.engine.destroy()
    return found


def _apart(found: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    return float((found.float() - expected).abs().max())


def differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of two states of the same keys, shapes and dtypes, as a part of what is expected."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype), key
    return max(float((found[k] - v).abs().max() / v.abs().max().clamp(min=1e-30)) for k, v in expected.items())


def full_state_of_case(kind: str, recipe: str) -> dict[str, Any]:
    """`full_state` under other engines, before and after steps, and of a name that there is not."""
    options = {"recipe": recipe, **({"nor": 0.95} if recipe == "orthogonal" else {})}
    single = alone(**options)
    train(single, 0, BEFORE)
    build = {"ddp": alone, "fsdp2": fsdp2, "fsdp1": partial(fsdp1, True), "fsdp1 flat": partial(fsdp1, False)}[kind]
    trained = build(**options)
    empty = gwt_dist.full_state(*trained, "2.weight")
    train(trained, 0, BEFORE)
    parameters = dict(single[0].named_parameters())
    states = [(gwt_dist.full_state(*trained, name), single[1].state[p]) for name, p in parameters.items()]
    return {
        "empty": empty,
        "differ": max(differ(mine, its) for mine, its in states),
        "unknown": refusal(lambda: gwt_dist.full_state(*trained, "2.wieght")),
    }


def torchs_roads_case(use_orig_params: bool) -> dict[str, str]:
    """What torch's functions say that gather the state of FSDP1, or cut a whole one into it."""
    model, optimizer = trained = fsdp1(use_orig_params)
    train(trained, 0, 1)
    single = alone()
    train(single, 0, 1)
    _, told = get_state_dict(*single, options=StateDictOptions(full_state_dict=True))
    wrapper, whole_options = FullyShardedDataParallel, StateDictOptions(full_state_dict=True)
    return {
        "optim_state_dict": refusal(lambda: wrapper.optim_state_dict(model, optimizer)),
        "full_optim_state_dict": refusal(lambda: wrapper.full_optim_state_dict(model, optimizer)),
        "sharded_optim_state_dict": refusal(lambda: wrapper.sharded_optim_state_dict(model, optimizer)),
        "get_optimizer_state_dict": refusal(lambda: get_optimizer_state_dict(model, optimizer)),
        "set_optimizer_state_dict": refusal(
            lambda: set_optimizer_state_dict(model, optimizer, optim_state_dict=told, options=whole_options)
        ),
        "optim_state_dict_to_load": refusal(
            lambda: optimizer.load_state_dict(wrapper.optim_state_dict_to_load(model, optimizer, told))
        ),
    }


def without_shards_case() -> float:
    """Under NO_SHARD tensors are whole, and torch's functions move their state."""
    from torch.distributed.fsdp import ShardingStrategy

    def built() -> Trained:
        options = unit_options("FULL_SHARD", True) | {"sharding_strategy": ShardingStrategy.NO_SHARD}
        model = FullyShardedDataParallel(net(), **options)
        optimizer = optimizer_of(model)
        gwt_dist.attach(optimizer, model)
        return model, optimizer

    first, second = built(), built()
    train(first, 0, BEFORE)
    told = FullyShardedDataParallel.optim_state_dict(*first)
    second[1].load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(*second, told))
    second[0].load_state_dict(first[0].state_dict())
    train(second, BEFORE, BEFORE + AFTER)
    return off(whole(second[0]), expected_of(BEFORE + AFTER))

"""What the ranks of `test_counters.py` run: a tiny model under ZeRO, saved and loaded at other accumulations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gwt_dist
from gwt_dist import CheckpointError, GWTAdamW, param_groups

STEPS = 9
OPTIONS: dict[str, Any] = dict(lr=0.01, level=1, recipe="paper", targets=["0", "1"])
Sizes = tuple[int, int, int]  # ranks, accumulation, sequences of a micro-batch


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5))


@cache
def batches(size: int) -> Tensor:
    """`[STEPS, size, 8]`: what each step sees, whoever shares it."""
    return torch.randn(STEPS, size, 8, generator=torch.Generator().manual_seed(size))


def loss_of(model: Any, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@cache
def through(size: int) -> list[list[Tensor]]:
    """The weights after each number of steps, of one process that takes each batch at once."""
    model = net()
    optimizer = GWTAdamW(param_groups(model, **OPTIONS))
    found = [[p.detach().clone() for p in model.parameters()]]
    for batch in batches(size):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    return found


def size_of(sizes: Sizes) -> int:
    return sizes[0] * sizes[1] * sizes[2]


def engine_of(sizes: Sizes, stage: int, **changes: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": sizes[2],
        "gradient_accumulation_steps": sizes[1],
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "GWTAdamW", "params": OPTIONS},
        **changes,
    }
    return gwt_dist.initialize(model=net(), config=config)[0]


def micro_batches(sizes: Sizes, step: int) -> Iterator[Tensor]:
    """What this rank has of a step, cut into micro-batches."""
    yield from batches(size_of(sizes))[step].view(dist.get_world_size(), sizes[1], sizes[2], 8)[dist.get_rank()]


def train(engine: Any, sizes: Sizes, steps: range) -> None:
    for step in steps:
        for micro in micro_batches(sizes, step):
            engine.backward(loss_of(engine, micro))
            engine.step()


def weights(engine: Any) -> list[Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return [
        safe_get_full_fp32_param(p).detach().clone().view(getattr(p, "ds_shape", p.shape))
        for p in engine.module.parameters()
    ]


def error_of(found: list[Tensor], size: int, steps: int) -> float:
    """Largest difference to the run through, relative to how far it has come."""
    expected, before = through(size)[steps], through(size)[0]
    moved = max(float((a - b).abs().max()) for a, b in zip(expected, before, strict=True))
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / moved


def place(folder: str, sizes: Sizes) -> Path:
    return Path(folder, "-".join(map(str, sizes)))


def save_case(folder: str, runs: list[Sizes]) -> list[float]:
    """A checkpoint after each of the first seven steps of each run; how far each is from the run through."""
    errors = []
    for i, sizes in enumerate(runs):
        engine = engine_of(sizes, 2 + i % 2)
        for step in range(7):
            train(engine, sizes, range(step, step + 1))
            gwt_dist.save(place(folder, sizes), engine, engine.optimizer, step=step + 1, random_states=False)
        errors.append(error_of(weights(engine), size_of(sizes), 7))
        engine.destroy()
    return errors


def load_case(folder: str, saved: list[Sizes], runs: list[Sizes]) -> dict[tuple[Any, ...], tuple[float, list[int]]]:
    """From every second saved step on, a step on other ranks with other accumulation: how far from the run through,
    and what the engine counts then.
    """
    results = {}
    for i, sizes in enumerate(runs):
        engine = engine_of(sizes, 3 - i % 2)
        for step in range(1 + (i + sizes[0]) % 2, 8, 2):
            by = [one for one in saved if size_of(one) == size_of(sizes)]
            source = by[(i + step) % len(by)]
            gwt_dist.load(place(folder, source), engine, engine.optimizer, which=step)
            train(engine, sizes, range(step, step + 1))
            error = error_of(weights(engine), size_of(sizes), step + 1)
            results[source, sizes, step] = error, counted(engine)
        engine.destroy()
    return results


def counted(engine: Any) -> list[int]:
    return [engine.global_steps, engine.micro_steps, engine.global_samples]


# ---- the middle of a step


def message_of(what: Any) -> str:
    try:
        what()
    except CheckpointError as error:
        return str(error)
    return ""


def middle_case(folder: str, stage: int, changes: dict[str, Any]) -> list[str]:
    """What `save` and `load` say with one of three micro-batches done, between backward and step, and after the step;
    then the same with the boundary set by hand, as Accelerate does.
    """
    sizes, said = (dist.get_world_size(), 3, 2), []
    engine = engine_of(sizes, stage, **changes)
    path = Path(folder, f"{stage}{len(changes)}")

    def save(step: int) -> str:
        return message_of(lambda: gwt_dist.save(path, engine, engine.optimizer, step=step))

    def load() -> str:
        return message_of(lambda: gwt_dist.load(path, engine, engine.optimizer))

    said.append(save(0))
    managed = engine.managed_gradient_accumulation()
    for by_hand in (False, True) if managed else (False,):
        for i, micro in enumerate(micro_batches(sizes, 0)):
            last = i == sizes[1] - 1
            if by_hand:
                engine.set_gradient_accumulation_boundary(last)
            engine.backward(loss_of(engine, micro))
            said += [save(9), load()]
            if last or not (by_hand or not managed):
                engine.step()
            if not last:
                said += [save(9), load()]
        said += [save(1 + by_hand), load()]
    engine.destroy()
    return said


def fused_case(folder: str) -> list[str]:
    """The same under `fuse_backward`."""
    from torch.distributed.fsdp import fully_shard

    model, said = fully_shard(net()), []
    optimizer = GWTAdamW(param_groups(model, **OPTIONS))
    gwt_dist.fuse_backward(optimizer, model)

    def save(step: int) -> str:
        return message_of(lambda: gwt_dist.save(folder, model, optimizer, step=step))

    said.append(save(0))
    with optimizer.accumulating():
        loss_of(model, batches(2)[0]).backward()
        said.append(save(9))
    said += [save(9), message_of(lambda: gwt_dist.load(folder, model, optimizer))]
    loss_of(model, batches(2)[0]).backward()
    optimizer.step()
    return [*said, save(1), message_of(lambda: gwt_dist.load(folder, model, optimizer))]


def plain_case(kind: str, folder: str) -> list[str]:
    """The same in a loop without an engine: before anything, in the middle of a first and a later step, with gradients
    of no worth, after `zero_grad`, after each step with and without it.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model: Any = {"one": lambda m: m, "DDP": DistributedDataParallel, "FSDP2": fully_shard}[kind](net())
    optimizer, said = GWTAdamW(param_groups(model, **OPTIONS)), []
    numbers = iter(range(9))

    def save() -> None:
        step = next(numbers)
        said.append(message_of(lambda: gwt_dist.save(folder, model, optimizer, step=step)))

    def backward() -> None:
        loss_of(model, batches(2)[0]).backward()

    save()
    with model.no_sync() if kind == "DDP" else nullcontext():
        backward()
    save()
    backward()
    optimizer.step()
    save()
    optimizer.zero_grad(set_to_none=False)
    save()
    backward()
    save()
    first = next(p for p in model.parameters() if p.grad is not None)
    gradient = first.grad.to_local() if kind == "FSDP2" else first.grad
    if gradient.numel():
        gradient.view(-1)[0] = math.inf  # which a GradScaler does not step on
    save()
    optimizer.zero_grad()
    save()
    return said


def counted_case(folder: str) -> dict[str, Any]:
    """Counters that no engine saved; those of an engine whose user counts otherwise; and the scale of a loss."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    model = net()
    optimizer = GWTAdamW(param_groups(model, **OPTIONS))
    gwt_dist.save(Path(folder, "one"), model, optimizer, step=5)
    sizes, found = (dist.get_world_size(), 3, 2), {}
    engine = engine_of(sizes, 2)
    gwt_dist.load(Path(folder, "one"), engine, engine.optimizer)
    found["of one process"] = counted(engine)
    train(engine, sizes, range(1))
    gwt_dist.save(Path(folder, "otherwise"), engine, engine.optimizer, step=106)
    wider = engine_of((sizes[0], 6, 1), 3)
    loaded = gwt_dist.load(Path(folder, "otherwise"), wider, wider.optimizer)
    found["counted otherwise"] = loaded.step, counted(wider)
    wider.destroy()

    def scale_after_load(dynamic: bool) -> list[float]:
        scaler = DynamicLossScaler(1024.0, 100, 1.0, 2, False)
        static, engine.optimizer.loss_scaler = engine.optimizer.loss_scaler, scaler
        scaler.cur_iter, scaler.cur_scale = 7, 256.0
        gwt_dist.save(Path(folder, f"scale {dynamic}"), engine, engine.optimizer, step=6)
        engine.optimizer.loss_scaler = other = DynamicLossScaler(1024.0, 100, 1.0, 2, False) if dynamic else static
        gwt_dist.load(Path(folder, f"scale {dynamic}"), engine, engine.optimizer)
        engine.optimizer.loss_scaler = static
        return [other.cur_scale, getattr(other, "cur_iter", 0)]

    found["scales"] = [scale_after_load(True), scale_after_load(False)]
    gwt_dist.save(Path(folder, "static"), engine, engine.optimizer, step=6)
    engine.optimizer.loss_scaler = scaler = DynamicLossScaler(1024.0, 100, 1.0, 2, False)
    gwt_dist.load(Path(folder, "static"), engine, engine.optimizer)
    found["scales"].append([scaler.cur_scale, scaler.cur_iter])
    engine.destroy()
    return found


# ---- schedules

WARM: dict[str, Any] = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.01}}}


def rate(step: int) -> float:
    """A warm-up of four steps, then a decay."""
    return (step + 1) / 4 if step < 4 else 0.9**step


class Scheduled:
    """Under DDP, ZeRO-2 or ZeRO-3, with the schedules named: of the engine and given to save and load."""

    def __init__(self, kind: str, engine: str = "", given: str = "") -> None:
        self.kind, self.sizes = kind, (dist.get_world_size(), 1, 2)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(kind[-1]) if kind != "ddp" else 0},
            **(WARM if engine == "WarmupLR" else {}),
        }
        model = net()
        self.optimizer = GWTAdamW(param_groups(model, **OPTIONS))
        if kind == "ddp":
            self.model: Any = nn.parallel.DistributedDataParallel(model)
        else:
            lambdas = schedule_of(self.optimizer, engine) if engine == "LambdaLR" else None
            self.model = gwt_dist.initialize(
                model=model, optimizer=self.optimizer, config=config, lr_scheduler=lambdas
            )[0]
        if given == "the engine's":
            self.given = self.model.lr_scheduler
        else:
            self.given = schedule_of(self.optimizer, given) if given else None

    def train(self, steps: range) -> list[float]:
        """The rate of each step."""
        rates = []
        for step in steps:
            (micro,) = micro_batches(self.sizes, step)
            if self.kind == "ddp":
                self.optimizer.zero_grad()
                loss_of(self.model, micro).backward()
                self.optimizer.step()
            else:
                self.model.backward(loss_of(self.model, micro))
                self.model.step()
            if self.given is not None and self.given is not getattr(self.model, "lr_scheduler", None):
                self.given.step()
            rates.append(self.rate())
        return rates

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def save(self, path: Path, step: int) -> None:
        gwt_dist.save(path, self.model, self.optimizer, step=step, scheduler=self.given, random_states=False)

    def load(self, path: Path, **keywords: Any) -> None:
        gwt_dist.load(path, self.model, self.optimizer, **{"scheduler": self.given, **keywords})

    def close(self) -> None:
        if self.kind != "ddp":
            self.model.destroy()


def schedule_of(optimizer: Any, name: str) -> Any:
    if name == "LambdaLR":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


Which = tuple[str, str, str]  # kind, the engine's, given


def roads_case(folder: str, pairs: list[tuple[Which, Which]]) -> list[dict[str, Any]]:
    """From the first of each pair into the second, after five steps: the rates of three more, and those of the run
    through; what was said if it was refused; and with `scheduler=False`.
    """
    results = []
    for i, (source, target) in enumerate(pairs):
        path = Path(folder, str(i))
        first = Scheduled(*source)
        first.train(range(5))
        first.save(path, 5)
        result: dict[str, Any] = {"saved": first.rate()}
        result["through"] = first.train(range(5, 8))
        first.close()
        second = Scheduled(*target)
        before = second.rate(), [p.detach().clone() for p in second.model.parameters()]
        result["said"] = message_of(partial(second.load, path))
        if result["said"]:
            after = second.rate(), list(second.model.parameters())
            result["changed"] = before[0] != after[0] or not all(map(torch.equal, before[1], after[1]))
            second.load(path, scheduler=False)
        result["loaded"] = second.rate()
        result["steps"] = getattr(second.model, "global_steps", 5)
        result["rates"] = second.train(range(5, 8))
        second.close()
        results.append(result)
    return results


def sharded_case(folder: str, library: str) -> tuple[list[float], list[float], float]:
    """An optimizer within one that has parameter groups of its own: rates after a save, after its load, and when that
    has been done without a schedule.
    """
    from fairscale.optim import OSS
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def build() -> tuple[nn.Module, Any, Any]:
        model = net()
        kind = {"fairscale": OSS, "torch": ZeroRedundancyOptimizer}[library]
        optimizer = kind(model.parameters(), GWTAdamW, lr=0.1, level=0)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def rates(model: nn.Module, optimizer: Any, schedule: Any) -> list[float]:
        found = []
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            found.append(optimizer.optim.param_groups[0]["lr"])
            schedule.step()
        return found

    model, optimizer, schedule = build()
    rates(model, optimizer, schedule)
    gwt_dist.save(folder, model, optimizer, step=3, scheduler=schedule)
    expected = rates(model, optimizer, schedule)
    again = build()
    gwt_dist.load(folder, *again[:2], scheduler=again[2])
    found = rates(*again)
    alone = build()
    gwt_dist.load(folder, *alone[:2], scheduler=False)
    return expected, found, rates(*alone)[0]

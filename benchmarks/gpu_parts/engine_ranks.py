"""What a rank of the engines' part runs: a few steps of one model under an engine, and how far they are from fp64.

The gradients are given: the loss is the sum of weights times numbers, which are the gradient then, and of which ranks
bring unequal parts. They have few bits, so the mean over two ranks is exact, and what is compared is the update.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import gwt_dist
from gpu_parts.setting import Row, summary
from gwt_dist import GWTAdamW, param_groups

SHAPES = (66, 97), (16, 5461), (64, 96), (64, 96), (9, 3), (1, 29), (1, 2)
STEPS, RATE = 6, 0.01
# Of the change of a tensor: to fp64 in fp32, or where products are in bf16; and to one process on the same device.
FINE, COARSE, ALIKE = 1e-3, 0.2, 1e-5
Case = tuple[str, str, int, dict[str, Any]]  # engine, recipe, level, further keys of its groups
Weights = dict[str, Tensor]


class Given(nn.Linear):
    """A matrix whose gradient is what `forward` is given."""

    def forward(self, gradient: Tensor) -> Tensor:
        """A number."""
        return (self.weight * gradient).sum()


class Model(nn.Module):
    """Matrices that divide badly, two of one shape among them, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mlp": Given(columns, rows, bias=False)}) for rows, columns in SHAPES
        )
        self.norm = nn.Parameter(torch.linspace(0.5, 1.5, 13))

    def forward(self, gradients: list[Tensor]) -> Tensor:
        """A number whose gradients these are."""
        *matrices, vector = gradients
        found = (self.norm * vector).sum()
        for block, gradient in zip(self.blocks, matrices, strict=True):
            found = found + block["mlp"](gradient)
        return found


def gradients() -> Iterator[list[Tensor]]:
    """Of each step: fp32, with the bits of bf16. One is eight times as large, for the limiters."""
    generator = torch.Generator().manual_seed(1)
    shapes = [*SHAPES, (13,)]
    common = [torch.randn(shape, generator=generator) for shape in shapes]
    for t in range(STEPS):
        size = 0.08 if t == 3 else 0.01
        drawn = [size * (0.7 * one + torch.randn(one.shape, generator=generator)) for one in common]
        yield [gradient.bfloat16().float() for gradient in drawn]


def run(
    rank: int, world_size: int, backend: str, device: torch.device, cases: Iterable[Case], folder: str
) -> Iterator[Row]:
    """One row a case."""
    torch.set_num_threads(1)
    # DeepSpeed wants them to be set; the group exists by then.
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=50)
    )
    for engine, *recipe in cases:
        try:
            yield _compared(engine, _optimizer(*recipe), recipe, device)
        except Exception as error:
            yield _failed(engine, device, summary(error))


def _failed(engine: str, device: torch.device, said: str) -> Row:
    """An error, with whether the engine trains with SGD: if not, it is no error of ours."""
    try:
        _trained(engine, lambda model: torch.optim.SGD(model.parameters(), lr=RATE), device)
    except Exception as error:
        return {"note": f"the engine does not run here, nor with SGD ({summary(error)})"}
    return {"error": said}


def _compared(engine: str, make: Callable[[nn.Module], GWTAdamW], recipe: list[Any], device: torch.device) -> Row:
    key = recipe[0], recipe[1], tuple(recipe[2].items())
    exact, alone = _reference("fp64", torch.device("cpu"), *key), _reference("plain", device, *key)
    found = _trained(engine, make, device)
    start = {name: weight.detach().double() for name, weight in Model().named_parameters()}

    def furthest(expected: Weights) -> float:
        return max(
            float((found[name] - weight).norm() / (weight - start[name]).norm()) for name, weight in expected.items()
        )

    to_fp64, to_one = furthest(exact), furthest(alone)
    limit = COARSE if recipe[0] == "orthogonal" and recipe[2].get("products") != "fp32" else FINE
    return {"ok": to_fp64 <= limit and to_one <= ALIKE, "error to fp64": to_fp64, "error to one process": to_one}


@cache
def _reference(kind: str, device: torch.device, recipe: str, level: int, keys: tuple[tuple[str, Any], ...]) -> Weights:
    """The weights after all steps of one process."""
    return _trained(kind, _optimizer(recipe, level, dict(keys)), device)


def _optimizer(recipe: str, level: int, keys: dict[str, Any]) -> Callable[[nn.Module], GWTAdamW]:
    return lambda model: GWTAdamW(
        param_groups(model, level=level, targets=("mlp",), recipe=recipe, **keys), lr=RATE, weight_decay=0.1
    )


def _trained(engine: str, make: Callable[[nn.Module], torch.optim.Optimizer], device: torch.device) -> Weights:
    """The weights after all steps, fp64, on the CPU."""
    model = Model()
    kind = engine.partition(" + ")[0]
    if kind.startswith("ZeRO"):
        return _trained_by_deepspeed(int(kind[-1]), model, make)
    model = model.double() if kind == "fp64" else model.to(device)
    dtype, outer = model.norm.dtype, wrapped(kind, model, device)
    optimizer = make(outer)
    if isinstance(optimizer, GWTAdamW):
        if kind == "FSDP1":
            gwt_dist.attach(optimizer, outer)
        if engine.endswith("fuse_backward"):
            gwt_dist.fuse_backward(optimizer, outer)
    share = 1.0 if kind in ("fp64", "plain") else _share()
    for step in gradients():
        optimizer.zero_grad()
        outer([share * gradient.to(device, dtype) for gradient in step]).backward()
        optimizer.step()
    if isinstance(outer, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(outer, writeback=False):
            return _weights(model)
    return _weights(model)


def wrapped(kind: str, model: nn.Module, device: torch.device) -> nn.Module:
    """The model under an engine of torch; what it is wrapped in, or itself."""
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "FSDP1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=device)
    if kind == "FSDP2":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block["mlp"], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _trained_by_deepspeed(stage: int, model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Weights:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    deepspeed.init_distributed(dist.get_backend())
    optimizer = make(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if isinstance(optimizer, GWTAdamW):
        gwt_dist.attach(optimizer, engine)
    for step in gradients():
        engine.backward(engine([_share() * gradient.to(engine.device) for gradient in step]))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return _weights(model)


def _share() -> float:
    """What this rank brings of a gradient: ranks differ, and their mean is 1."""
    if dist.get_world_size() == 1:
        return 1.0
    return 1.5 if dist.get_rank() == 0 else 0.5


def _weights(model: nn.Module) -> Weights:
    """By name, whole, fp64, on the CPU."""
    found = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name.replace("_fsdp_wrapped_module.", "")] = whole.detach().double().cpu().clone()
    return found

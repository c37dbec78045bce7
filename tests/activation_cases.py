"""What the ranks of the tests of `compress_activations` run, and the models of these tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gwt_dist
from gwt_dist import GWTAdamW, compress_activations, param_groups
from gwt_dist.engines.weights import clean
from zero_cases import settings
from zero_engine_cases import masters

WIDTH, INNER, HEADS, TOKENS = 160, 224, 4, 64  # no whole numbers of 128


class Attention(nn.Module):
    """Causal, with biases as little as LLaMA's."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (its(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for its in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Gated."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """As LLaMA's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.self_attn = nn.RMSNorm(WIDTH), Attention()
        self.norm_2, self.mlp = nn.RMSNorm(WIDTH), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Decoder(nn.Module):
    """Some blocks; `recompute` keeps their inputs alone."""

    def __init__(self, recompute: bool = False, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(64, WIDTH), nn.ModuleList(Block() for _ in range(blocks))
        self.head, self.recompute = nn.Linear(WIDTH, 64, bias=False), recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.roll(-1, 1).flatten())


def batch(number: int, sequences: int = 2) -> Tensor:
    """The same on all ranks, whose average is exact then."""
    return torch.randint(64, (sequences, TOKENS), generator=torch.Generator().manual_seed(number))


def summed(model: Any) -> None:
    """Let ranks add gradients and not average them: of three that are equal, and of their triple, that is exact."""

    def add(_, bucket):  # without types, which torch would compare as text
        dist.all_reduce(bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, add)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def trained(kind: str, steps: int, autocast: bool = False, times: int = 0) -> tuple[dict[str, Tensor], int]:
    """The weights after some steps with compressed activations under an engine, and the bytes that were compressed.

    Gradients are those of `times` ranks, added; 0: the average.
    """
    model: Any = Decoder(recompute=kind == "recomputed")
    found = compress_activations(model)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (model.blocks[0].mlp, *model.blocks, model):  # a chosen module by itself too
            fully_shard(part, mesh=mesh)
    module = model
    optimizer = GWTAdamW(param_groups(model, targets=["attn", "mlp"], recipe="energy"), lr=0.01)
    if kind.startswith("zero"):
        config = settings(int(kind[4]), False, stage3_param_persistence_threshold=0)
        model = gwt_dist.initialize(model=module, optimizer=optimizer, config=config)[0]
    elif kind == "ddp":
        model = DistributedDataParallel(module)
    if times:
        summed(model)
    for number in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(batch(number))
        if kind.startswith("zero"):
            model.backward(loss)
            model.step()
            continue
        loss.backward()
        for parameter in module.parameters() if times and kind == "one" else ():
            parameter.grad.mul_(times)
        optimizer.step()
        optimizer.zero_grad()
    if kind.startswith("zero"):
        return masters(model, module), found.before
    named = {clean(n): p.detach() for n, p in module.named_parameters()}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in named.items()}, found.before


OWN = 64  # tokens of each rank in `exact_case`, of which all that are taken at once are enough to be compressed


def exact_case(kind: str) -> dict[str, Any]:
    """The gradient of a layer of which each rank has tokens of its own, in two parts, beside that of one process.

    Saved activations are multiples of 2**-13 once they were rounded, and gradients of outputs are -1, 0 or 1: no sum of
    them is rounded, in whatever order, so all that is left to differ are the codes.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(OWN * ranks, WIDTH, generator=generator).clamp(-2.9, 2.9)
    x[:, 0], x[:, 130], x[:, 1], x[:, 131] = -2.9, -2.9, 2.9, 2.9
    x *= 0.75 + torch.rand(len(x), 1, generator=generator) / 4  # scales are many, of one exponent
    sign = torch.randint(-1, 2, (len(x), INNER), generator=generator).float()
    torch.manual_seed(0)
    alone: Any = nn.Sequential()
    alone.add_module("mlp", nn.Linear(WIDTH, INNER, bias=False))
    model = deepcopy(alone)
    exact = sign.double().T @ x.double()
    compress_activations(alone, "mlp")
    (alone(x) * sign).sum().backward()

    compress_activations(model, "mlp")
    module = model
    if kind == "ddp":
        model = DistributedDataParallel(module)
    else:
        shape = (ranks,) if kind == "fsdp2" else (2, ranks // 2)
        names = ("replica", "shard")[-len(shape) :]
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    parts = torch.arange(rank, len(x), ranks).split([36, OWN - 36])  # of which the first is not reduced
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if kind != "ddp":
            model.set_requires_gradient_sync(last)
        with model.no_sync() if kind == "ddp" and not last else nullcontext():
            (model(x[part]) * sign[part]).sum().mul(ranks).backward()  # engines take the mean over ranks
    gradient = module.mlp.weight.grad
    gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    expected = alone.mlp.weight.grad
    return {"same": torch.equal(gradient, expected), "off": float((expected - exact).norm() / exact.norm())}


def engine_case(kind: str, steps: int) -> dict[str, Any]:
    """The largest difference of a weight from one process, as a part of how far that has moved."""
    times = (
        dist.get_world_size() if dist.get_world_size() % 2 else 0
    )  # the average of two is exact, that of three is not
    expected, before = trained("one", steps, times=times)
    start = dict(Decoder().named_parameters())
    weights, compressed = trained(kind, steps, times=times)
    moved = max(float((expected[n] - start[n]).abs().max()) for n in expected)
    off = max(float((weights[n].view_as(w) - w).abs().max()) for n, w in expected.items())
    return {"off": off / moved, "bytes": (before, compressed)}


def saved(model: nn.Module, run: Callable[[nn.Module], Any]) -> int:
    """Bytes of what a forward pass saves, each memory once, without weights, in codes or not."""
    memory: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            memory[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model)
    return sum(memory.values())

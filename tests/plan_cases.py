"""What the ranks of `test_plan.py` run: an engine of the matrix takes a step, and its bytes are counted."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from fsdp2_cases import Counter, local
from gwt_dist import comm, param_groups, save
from gwt_dist.cli.models import meta_model
from gwt_dist.optimizer import GWTAdamW
from gwt_dist.recipes import rule_of
from gwt_dist.schedule import Member
from gwt_dist.sums import lay_out
from matrix_cases import FAMILIES, Model
from zero_cases import gradients, shapes_of

ONCE = ("step", "limited_norm", "priority_0", "priority_1")  # state that there is one number of a tensor or a parameter


def size(tensor: Tensor) -> int:
    return local(tensor).numel() * tensor.element_size()


def state_of(optimizer: GWTAdamW) -> dict[str, int]:
    """Bytes of state by name, and of what there is one of a tensor."""
    found: dict[str, int] = {}
    for state in optimizer.state.values():
        for name, tensor in state.items():
            place = "scalars" if name in ONCE else name
            found[place] = found.get(place, 0) + size(tensor)
    return found


def storages(tensors: list[Tensor]) -> int:
    """Bytes of the memory behind tensors, padding included, what they share counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(found.values())


def weights_of(model: nn.Module) -> int:
    """Bytes of the model's own weights."""
    parameters = list(model.parameters())
    if hasattr(parameters[0], "ds_tensor"):
        whole = [p for p in parameters if p.ds_status.name == "AVAILABLE"]
        return sum(size(p.ds_tensor) for p in parameters) + sum(size(p) for p in whole)
    handles = [m._handle for m in model.modules() if isinstance(m, FullyShardedDataParallel) and m._handle]
    if handles:
        return sum(size(getattr(h.flat_param, "_local_shard", h.flat_param)) for h in handles)
    # FSDP2 keeps the storage of a rank without rows as well.
    if isinstance(parameters[0], DTensor):
        return sum(p._local_tensor.untyped_storage().nbytes() for p in parameters)
    return storages(parameters)


class Messages:
    """Counts the bytes that the optimizer hands over for other ranks: matrices and what goes along, there and back."""

    def __init__(self) -> None:
        self.bytes = 0
        self._real = comm.post

    def __enter__(self) -> Messages:
        def counted(outgoing: comm.Kinds, incoming: comm.Kinds, peers: comm.Peers) -> Callable[[], None]:
            to_others = [buffer for kind in outgoing for i, buffer in enumerate(kind) if i != peers.here]
            self.bytes += sum(buffer.nbytes for buffer in to_others)
            return self._real(outgoing, incoming, peers)

        comm.post = counted
        return self

    def __exit__(self, *_: object) -> None:
        comm.post = self._real


def allocated_case(family: str, arguments: tuple[Any, ...], kind: str) -> dict[str, Any]:
    """Bytes after a step in which every trained tensor has a gradient, and what the step sends: elements, bytes."""
    with FAMILIES[family](kind, *arguments) as built:
        held = {id(p) for p in built.model.parameters()}
        given: list[int] = []
        stepped: dict[Tensor, None] = {}

        def watch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            stepped.update(dict.fromkeys(parameters))
            given.append(sum(size(p.grad) for p in parameters if p.grad is not None))

        built.optimizer.register_step_pre_hook(watch)
        step = next(gradients(shapes_of(Model(kind)), 1))
        with Counter() as counter, Messages() as messages:
            built.take(step)
        own = {id(p) for p in stepped} & held
        return {
            **state_of(built.optimizer),
            "weights": weights_of(built.model),
            "masters": sum(size(p) for p in stepped if id(p) not in held) if not own else 0,
            "given": max(given),
            "collectives": sum(length for _, length in counter.calls),
            "travelling": messages.bytes,
        }


def checkpoint_case(family: str, arguments: tuple[Any, ...], folder: str) -> list[int]:
    """Bytes of tensors in the file of each rank of a checkpoint."""
    with FAMILIES[family]("shapes", *arguments) as built:
        built.take(next(gradients(shapes_of(Model("shapes")), 1)))
        saved = save(folder, built.model, built.optimizer, step=1, random_states=False)
    found = []
    for rank in range(dist.get_world_size()):
        content = Path(saved, f"rank-{rank:05}.safetensors").read_bytes()
        found.append(len(content) - 8 - struct.unpack("<Q", content[:8])[0])
    return found


def faked(rank: int, models: list[str], meshes: list[list[int]], level: int) -> None:
    """Prints, as JSON, bytes of a rank of a world of torch's process group that sends nothing, by model and mesh.

    `fully_shard` and the optimizer's own layout, all of it on the meta device. A process is one rank for good: torch
    keeps a rank's place in a mesh.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(meshes[0]))
    found = []
    for name in models:
        for mesh in meshes:
            names = ("replicate", "shard")[-len(mesh) :]
            where = init_device_mesh("cpu", tuple(mesh), mesh_dim_names=names)
            found.append(_on_meta(meta_model(name), where, level))
    dist.destroy_process_group()
    print(json.dumps(found))


def _on_meta(model: Any, mesh: DeviceMesh, level: int) -> dict[str, int]:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = GWTAdamW(param_groups(model, level=level), recipe="paper")
    found = {"moments": 0, "scalars": 0, "weights": 0, "norms": 0}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            plan = optimizer.plan_of(parameter, number)
            assert plan is not None
            for name, tensor in plan.fresh_state(parameter).items():
                found["scalars" if name in ONCE else "moments"] += size(tensor)
            found["weights"] += parameter._local_tensor.untyped_storage().nbytes()
            rule = rule_of(group)
            member = Member(plan, number, parameter.dtype, True, rule.program, rule.plain)
            for phase in range(len(rule.program.phases)):
                found["norms"] += sum(lay_out(list(member.entries(0)), phase).over[0])
    return found

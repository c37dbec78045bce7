"""What the ranks of `test_save_parts.py` run: saves without frozen weights, and by a part of the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gwt_dist
from gwt_dist import CheckpointError, GWTAdamW
from gwt_dist.checkpoint import read_index
from gwt_dist.engines.weights import clean
from zero_cases import Net, gradients, initial, load, options, settings, shapes_of

Weights = dict[str, Tensor]
TRAINED = ("attn_q.weight", "mlp_row.weight", "mlp_thin.weight")  # the adapters; all else is the frozen base


class Adapted(Net):
    """Most of the model is frozen, and it has a buffer."""

    def __init__(self, base: float) -> None:
        super().__init__()
        load(self, initial(shapes_of(self)))
        for name, parameter in self.named_parameters():
            if name not in TRAINED:
                parameter.requires_grad_(False).data.fill_(base)
        self.register_buffer("mask", torch.full((3,), base))


class Mpu(SimpleNamespace):
    """What DeepSpeed asks who runs it on a part of the ranks."""

    def __init__(self, group: Any) -> None:
        super().__init__(get_data_parallel_group=lambda: group, get_model_parallel_group=lambda: None)
        self.get_data_parallel_world_size = lambda: dist.get_world_size(group)
        self.get_data_parallel_rank = lambda: dist.get_rank(group)
        self.get_model_parallel_world_size = self.get_tensor_model_parallel_world_size = lambda: 1
        self.get_model_parallel_rank = lambda: 0


class Part:
    """A model under an engine on the ranks of a group, None for all; what it computes on rank 0 of it counts."""

    def __init__(self, kind: str, model: Any, group: Any = None) -> None:
        self.kind, self.module, self.model, self.group = kind, model, model, group
        if kind == "fsdp2":
            mesh = DeviceMesh.from_group(dist.group.WORLD if group is None else group, "cpu")
            for child in model.children():
                fully_shard(child, mesh=mesh)
            self.model = fully_shard(model, mesh=mesh)
        elif kind.startswith("fsdp1"):
            common: dict[str, Any] = dict(
                process_group=group, use_orig_params=kind == "fsdp1", device_id=torch.device("cpu")
            )
            for name, child in model.named_children():
                setattr(model, name, FullyShardedDataParallel(child, **common))
            self.model = FullyShardedDataParallel(model, **common)
        elif kind == "ddp":
            self.model = DistributedDataParallel(model, process_group=group)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: Any = GWTAdamW(parameters, **options(2, "paper"))
        if kind.startswith("fsdp1"):
            gwt_dist.attach(self.optimizer, self.model)
        if kind.startswith("zero"):
            config = settings(int(kind[4]), stage3_param_persistence_threshold=0) if kind == "zero3" else settings(2)
            mpu = None if group is None else Mpu(group)
            built = gwt_dist.initialize(model=self.module, optimizer=self.optimizer, config=config, mpu=mpu)
            self.model = built[0]

    def train(self, steps: Sequence[Weights]) -> None:
        factor = dist.get_world_size(self.group) if dist.get_rank(self.group) == 0 else 0
        for step in steps:
            nested: dict[str, Weights] = {}
            for name, gradient in step.items():
                module, _, parameter = name.partition(".")
                nested.setdefault(module, {})[parameter] = gradient * factor
            self.optimizer.zero_grad()
            loss = self.model(nested)
            if self.kind.startswith("zero"):
                self.model.backward(loss)
                self.model.step()
            else:
                loss.backward()
                self.optimizer.step()

    def weights(self) -> Weights:
        """The whole weights, and buffers."""
        buffers = {clean(n): b.clone() for n, b in self.model.named_buffers()}
        if self.kind.startswith("zero"):
            from deepspeed import zero

            buffers = {n: b.clone() for n, b in self.module.named_buffers()}
            with zero.GatheredParameters([p for p in self.module.parameters() if hasattr(p, "ds_id")]):
                return {n: p.detach().clone() for n, p in self.module.named_parameters()} | buffers
        if self.kind.startswith("fsdp1"):
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
                return {clean(n): p.detach().clone() for n, p in self.model.named_parameters()} | buffers
        named = self.module.named_parameters()
        whole = ((n, p.full_tensor() if isinstance(p, DTensor) else p) for n, p in named)
        return {n: tensor.detach().clone() for n, tensor in whole} | {
            n: b.clone() for n, b in self.module.named_buffers()
        }

    def close(self) -> None:
        if self.kind.startswith("zero"):
            from deepspeed.utils import groups

            self.model.destroy()
            groups.mpu = None  # else the next engine of this process, of another test, shards over this group


def steps_of(names: Sequence[str]) -> list[Weights]:
    shapes = {name: shape for name, shape in shapes_of(Net()).items() if name in names}
    return list(gradients(shapes, 4))


def alone(base: float) -> Weights:
    """Four steps of one process."""
    model = Adapted(base)
    optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], **options(2, "paper"))
    for step in steps_of(TRAINED):
        for name, gradient in step.items():
            model.get_parameter(name).grad = gradient.clone()
        optimizer.step()
    return {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def error_of(found: Weights, right: Weights) -> float:
    """The largest difference; infinity for other names."""
    if found.keys() != right.keys():
        return float("inf")
    return max(float((found[n] - right[n]).abs().max()) for n in found)


def stored_names(folder: Path) -> set[str]:
    """Tensors of which any byte is in the files, by safetensors' own reader."""
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {key.rsplit(":", 2)[0] for key in file.keys()}
    return {name for name in names if not name.startswith("random")}


def adapters_case(folder: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Two steps, a save without what is frozen, and two more on a model with another base."""
    results = {}
    for kind in kinds:
        path = Path(folder, kind.replace(" ", "-"))
        part = Part(kind, Adapted(1.0))
        part.train(steps_of(TRAINED)[:2])
        gwt_dist.save(path, part.model, part.optimizer, step=2, exclude=["all-frozen", "mask"])
        part.close()
        again = Part(kind, Adapted(3.0))
        loaded = gwt_dist.load(path, again.model, again.optimizer)
        weights_only = Part("ddp", Adapted(5.0))
        left = gwt_dist.load(path, weights_only.model, weights_only.optimizer, weights_only=True).left
        again.train(steps_of(TRAINED)[2:])
        index = read_index(loaded.folder)
        results[kind] = {
            "error": error_of(again.weights(), alone(3.0)),
            "stored": sorted(stored_names(loaded.folder)),
            "bytes": sum(f.bytes - f.header_bytes for f in index.files.values())
            - sum(s.bytes for _, s in index.stored()),
            "index": {name: (one.shape, one.dtype) for name, one in index.excluded.items()},
            "left": (loaded.left.excluded, loaded.left == left, loaded.left.in_model),
            "base": float(weights_only.weights()["frozen.weight"].mean()),
        }
        again.close()
    return results


def groups_case(folder: str, kind: str, members: Sequence[Sequence[int]]) -> Any:
    """Disjoint groups of ranks train, save and load at once, each in a folder of its own; ranks of none are refused."""
    groups = [dist.new_group(list(ranks)) for ranks in members]
    mine = next((i for i, ranks in enumerate(members) if dist.get_rank() in ranks), None)
    if mine is None:
        model = Adapted(1.0)
        optimizer = GWTAdamW([p for p in model.parameters() if p.requires_grad], level=1)
        messages = list(_messages(folder, model, optimizer, groups[0]))
        return messages
    path, group = Path(folder, str(mine)), groups[mine]
    part = Part(kind, Adapted(float(mine)), group)
    part.train(steps_of(TRAINED)[:2])
    torch.manual_seed(100 * mine + dist.get_rank(group))
    gwt_dist.save(path, part.model, part.optimizer, step=2, process_group=group)
    expected = float(torch.rand(()))
    state = gwt_dist.full_state(part.model, part.optimizer, "attn_q.weight", process_group=group)
    assert (float(state["step"]), tuple(state["exp_avg"].shape)) == (2.0, (66, 25))
    part.close()
    again = Part(kind, Adapted(9.0), group)
    loaded = gwt_dist.load(path, again.model, again.optimizer, process_group=group)
    drawn = float(torch.rand(()))
    again.train(steps_of(TRAINED)[2:])
    index = read_index(loaded.folder)
    error = error_of(again.weights(), alone(float(mine)))
    again.close()
    return error, index.world_size, sorted(index.files), sorted(index.random), drawn == expected, loaded.random_restored


def _messages(folder: str, model: Any, optimizer: Any, group: Any) -> Iterator[str]:
    for call in (
        lambda: gwt_dist.save(folder, model, optimizer, step=1, process_group=group),
        lambda: gwt_dist.load(folder, model, optimizer, process_group=group),
        lambda: gwt_dist.full_state(model, optimizer, "attn_q.weight", process_group=group),
    ):
        try:
            call()
            yield "no error"
        except CheckpointError as error:
            yield str(error)


def elsewhere_case(folder: str, kind: str, members: Sequence[int] | None) -> Any:
    """What a group saved, loaded by other ranks: the last two steps."""
    group = None if members is None else dist.new_group(list(members))
    if members is not None and dist.get_rank() not in members:
        return None
    part = Part(kind, Adapted(9.0), group)
    loaded = gwt_dist.load(folder, part.model, part.optimizer, process_group=group)
    part.train(steps_of(TRAINED)[2:])
    error = error_of(part.weights(), alone(0.0))
    part.close()
    return error, loaded.random_restored


def disagreeing_case(folder: str) -> list[str]:
    """Ranks that do not say the same: all raise."""
    part = Part("ddp", Adapted(1.0))
    messages = []
    rank = dist.get_rank()
    gwt_dist.save(folder, part.model, part.optimizer, step=1)
    for call in (
        lambda: gwt_dist.save(folder, part.model, part.optimizer, step=2, exclude=["frozen", "embed"][rank]),
        lambda: gwt_dist.load(folder, part.model, part.optimizer, weights_only=rank == 0),
    ):
        try:
            call()
            messages.append("no error")
        except CheckpointError as error:
            messages.append(str(error))
    return messages

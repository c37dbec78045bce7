"""A frozen LLaMA adapted to another text by a side network, beside full fine-tuning and LoRA: memory and traffic.

torchrun --standalone --nproc-per-node 2 examples/side_network.py --side sherl
torchrun --standalone --nproc-per-node 2 examples/side_network.py --side losa --engine zero3
"""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from side_models import SideNetwork, with_lora
from tiny import Text, tiny_llama
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import gwt_dist
from gwt_dist import GWTAdamW, param_groups

STEPS, LAYERS = 20, 8
ROWS, HELD_OUT = 8, -64  # sequences a step, of all ranks together; those at the end are not trained on
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {"targets": ["attn", "mlp"], "lr": 3e-3},
    # What is small and new takes larger rates than what was pre-trained. `scale` is the recipe's own.
    "lora": {"targets": ["lora_"], "lr": 2e-2, "recipe": "energy", "scale": 1.0},
    "sherl": {"targets": ["side.down", "side.up"], "lr": 2e-2, "scale": 0.5},
    "losa": {"targets": ["side.mixers"], "lr": 2e-2, "scale": 0.5},
}


class Traffic(TorchDispatchMode):
    """Counts the bytes of collectives, whoever makes them: what is gathered or reduced, in its whole size.

    Of W ranks each sends (W - 1) / W of that. A message counts where it is sent; one rank alone sends nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Look at what goes to `torch.distributed`."""
        name = func._schema.name
        if name.startswith("c10d::") and "recv" not in name and dist.get_world_size() > 1:
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args[:2]]
            self.bytes += max(sizes) * (2 if "allreduce" in name else 1)  # which reduces, and then gathers
        return func(*args, **(kwargs or {}))


class Saved(saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for the backward pass: each storage once, weights apart."""

    def __init__(self, model: nn.Module) -> None:
        self.storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            # Asked each time: an engine puts whole weights in the place of shards, and takes them away.
            weights = {p.untyped_storage().data_ptr() for p in model.parameters() if not isinstance(p, DTensor)}
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Of all that was kept."""
        return sum(self.storages.values())


@dataclass
class Measured:
    """What a run cost this rank, in bytes, and what it reached."""

    trained: int  # weights of the whole model
    gradients: int
    state: int
    saved: int
    passes: float  # moved by collectives of the forward and backward pass, in sizes of the backbone
    optimizer: float  # and by those of the optimizer's step
    before: float  # loss on sequences that are not trained on
    after: float

    @property
    def beside(self) -> int:
        """All that a step needs beside the weights; not all of it is there at once."""
        return self.gradients + self.state + self.saved


@cache
def pretrained(folder: str | None) -> LlamaForCausalLM:
    """The backbone of a folder that `gwt-dist export` wrote, whose first 64 tokens are the letters here; None: a tiny
    one that learns a text first.
    """
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = tiny_llama(LAYERS)
    optimizer = GWTAdamW(param_groups(model), lr=3e-3)
    for ids in Text().sequences.split(ROWS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def adapted(kind: str, backbone: LlamaForCausalLM) -> nn.Module:
    """A model that starts from a copy of the backbone, with the same weights on every rank."""
    model = copy.deepcopy(backbone)
    torch.manual_seed(0)
    if kind == "full":
        return model
    return (with_lora(model) if kind == "lora" else SideNetwork(model, kind)).to(model.dtype)


def shard(model: nn.Module, kind: str, engine: str | None) -> tuple[Any, GWTAdamW]:
    """The model under an engine, and its optimizer; None: one process."""
    if engine == "zero3":
        zero = {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # a tiny model's weights would all stay gathered
            "stage3_max_reuse_distance": 0,
        }
        config = {
            "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "optimizer": {"type": "GWTAdamW", "params": OPTIONS[kind]},
        }
        wrapped = gwt_dist.initialize(model=model, config=config)[0]
        return wrapped, wrapped.basic_optimizer
    if engine == "fsdp2":
        side = isinstance(model, SideNetwork)
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
        for block in model.blocks if side else model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for layer in model.early if side else ():
            # In the backward pass FSDP2 gathers ahead what came before in the forward pass, and nobody needs it here.
            layer.set_unshard_in_backward(False)
    return model, GWTAdamW(param_groups(model, **OPTIONS[kind]))


def bytes_of(tensors: Any) -> int:
    """Of what this rank has of tensors; None counts nothing."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor))
    return sum(t.nbytes for t in local)


def gradient_of(parameter: Tensor, engine: str | None) -> Tensor | None:
    """What this rank has of it after a backward pass."""
    if engine == "zero3":
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter)
    return parameter.grad


def run(kind: str, engine: str | None, backbone: LlamaForCausalLM, steps: int = STEPS) -> tuple[Any, Any, Measured]:
    """Adapt the backbone to a text with another rule: model, optimizer, and what was measured in the last step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if engine else (0, 1)
    text = Text(factor=7, shift=1).sequences.to(device)
    plain = adapted(kind, backbone).to(device)
    number = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    model, optimizer = shard(plain, kind, engine)
    trained = [p for p in plain.parameters() if p.requires_grad]  # FSDP2 has made others

    def loss_of(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    @torch.no_grad()
    def validation() -> float:
        return loss_of(text[HELD_OUT:]).item()

    before = validation()
    for step in range(steps):
        passes, saved = Traffic(), Saved(plain)
        with passes, saved:
            loss = loss_of(text[step * ROWS :][rank:ROWS:world_size])
        with passes:
            model.backward(loss) if engine == "zero3" else loss.backward()
        gradients = bytes_of(gradient_of(p, engine) for p in trained)
        with Traffic() as its_step:
            model.step() if engine == "zero3" else optimizer.step()
        optimizer.zero_grad()
    state = bytes_of(value for state in optimizer.state.values() for value in state.values())
    moved = [count.bytes / bytes_of(backbone.parameters()) for count in (passes, its_step)]
    return model, optimizer, Measured(number, gradients, state, saved.bytes, *moved, before, validation())


def table(rows: dict[str, Measured]) -> str:
    """A line for each run; see `Measured`."""
    title = "KiB of one rank; what passes and optimizer move, in sizes of the backbone; loss before and after"
    head = ["", "trained", "gradients", "state", "saved", "sum", "of full", "passes", "optimizer", "before", "after"]
    lines = [title, "".join(f"{name:>10}" for name in head)]
    for name, m in rows.items():
        kib = [f"{count / 1024:.1f}" for count in (m.gradients, m.state, m.saved, m.beside)]
        share = f"{m.beside / rows['full'].beside:.0%}"
        cells = [name, f"{m.trained:,}", *kib, share, f"{m.passes:.2f}", f"{m.optimizer:.2f}"]
        lines.append("".join(f"{cell:>10}" for cell in [*cells, f"{m.before:.2f}", f"{m.after:.2f}"]))
    return "\n".join(lines)


def main(side: str, engine: str | None, folder: str | None = None) -> dict[str, Measured]:
    """Full fine-tuning, LoRA and a side network, one after the other; the first rank prints what they cost."""
    backbone = pretrained(folder)
    rows = {}
    for kind in ("full", "lora", side):
        model, _, rows[kind] = run(kind, engine, backbone)
        if engine == "zero3":
            model.destroy()
    if not engine or dist.get_rank() == 0:
        print(table(rows))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["sherl", "losa"], default="sherl")
    parser.add_argument("--engine", choices=["fsdp2", "zero3"], default="fsdp2", help="with torchrun")
    parser.add_argument("--backbone", help="folder of `gwt-dist export`; default: a tiny LLaMA, trained here first")
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group()
        main(options.side, options.engine, options.backbone)
        dist.destroy_process_group()
    else:
        main(options.side, None, options.backbone)

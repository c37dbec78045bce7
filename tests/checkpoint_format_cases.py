"""What the ranks of `test_checkpoint_formats.py` run: state in 8 and 16 bits, between engines, ranks and formats."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import gwt_dist
from checkpoint_cases import Trained, steps
from fsdp1_cases import refusal
from gwt_dist import GWTAdamW

Digests = dict[str, str]
SEED = 7


def digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()[:16]}"


def digests(trained: Trained) -> Digests:
    """Of all weights that are trained and all that is kept of them, whole, whichever ranks hold it."""
    found, weights = {}, trained.weights()
    for name in steps()[0]:
        found[name] = digest(weights[name])
        state = gwt_dist.full_state(trained.model, trained.optimizer, name)
        found |= {f"{field} of {name}": digest(value) for field, value in state.items()}
    return found


def gradient(number: int) -> dict[str, Tensor]:
    """Those of a step; what the first ones are is known to every engine exactly."""
    return steps()[number % len(steps())]


def road_case(
    folder: str,
    kinds: Sequence[str],
    recipe: str,
    saved: str,
    first: int,
    last: int,
    save: str = "",
    convert: bool = False,
) -> list[Digests]:
    """Steps `first` to `last` under each engine, from the checkpoint `saved` if there is one: what all is then."""
    found = []
    for kind in kinds:
        trained = Trained(kind, recipe=recipe)
        if saved:
            trained.spoil()
            trained.load(str(Path(folder, saved)), convert_state=convert)
        trained.train([gradient(number) for number in range(first, last)])
        if save:
            trained.save(str(Path(folder, f"{save} {kind}")), last, random_states=False)
        found.append(digests(trained))
        trained.close()
    return found


# ------------------------------------------------------------------------------------------------------- torch's roads


def net() -> nn.Sequential:
    """Matrices of whole and short cells, and vectors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 12), nn.Linear(12, 10))


def optimizer_of(model: nn.Module, apart: bool) -> GWTAdamW:
    """With vectors in a group of their own, in fp32, if they are to be kept `apart`."""
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors}]
    if apart:
        groups[1]["state_dtype"] = "fp32"
    return GWTAdamW(groups, lr=0.01, level=1, state_dtype="int8", rounding_seed=SEED, recipe="energy")


def train(model: nn.Module, optimizer: GWTAdamW, first: int, last: int) -> None:
    for number in range(first, last):
        for i, parameter in enumerate(model.parameters()):
            whole = torch.randn(tuple(parameter.shape), generator=torch.Generator().manual_seed(100 * number + i))
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.grad = whole
        optimizer.step()


def dcp_case(folder: str, load: bool, first: int, last: int) -> list[str]:
    """Steps under FSDP2 from one torch.distributed.checkpoint, or to it: the weights."""
    model = net()
    for child in model:
        fully_shard(child)
    fully_shard(model)
    optimizer = optimizer_of(model, apart=True)
    if load:
        weights, state = get_state_dict(model, optimizer)
        content = {"model": weights, "optimizer": state}
        dcp.load(content, checkpoint_id=Path(folder))
        set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    train(model, optimizer, first, last)
    if not load:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=Path(folder))
    return [digest(p.full_tensor()) for p in model.parameters()]


def cut_vector_case() -> str:
    """What `state_dict` says of vectors whose only cell ranks share."""
    model = net()
    fully_shard(model)
    optimizer = optimizer_of(model, apart=False)
    train(model, optimizer, 0, 1)
    return refusal(optimizer.state_dict)


def alone() -> list[str]:
    """The weights of one process after four steps."""
    model = net()
    optimizer = optimizer_of(model, apart=True)
    train(model, optimizer, 0, 4)
    return [digest(p) for p in model.parameters()]


def through_torch(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same_layout_case(kind: str, recipe: str, folder: str) -> tuple[Digests, Digests]:
    """Steps that go on, and those of a new optimizer from the state of the first, by the engine's own checkpoint."""
    first, second = Trained(kind, recipe=recipe), Trained(kind, recipe=recipe)
    first.train([gradient(0), gradient(1)])
    if kind.startswith("zero"):
        first.model.save_checkpoint(folder)
        second.model.load_checkpoint(folder)
    else:
        second.optimizer.load_state_dict(through_torch(first.optimizer.state_dict()))
        with torch.no_grad():
            for mine, other in zip(second.model.parameters(), first.model.parameters(), strict=True):
                mine.copy_(other)
    for trained in (first, second):
        trained.train([gradient(2), gradient(3)])
    found = digests(first), digests(second)
    first.close()
    second.close()
    return found

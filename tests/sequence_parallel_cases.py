"""What the ranks of `test_sequence_parallel.py` run: Ulysses groups of DeepSpeed, a part of a sequence a rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

import gwt_dist
from gwt_dist import GWTAdamW, param_groups
from zero_cases import Net, gradients, load, settings, shapes_of
from zero_engine_cases import backward, difference, groups_of, initial, masters, reference


@contextmanager
def split_over(size: int) -> Iterator[Any]:
    """DeepSpeed's mpu for sequences that are split over `size` ranks; its globals are put back."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups

    deepspeed.init_distributed("gloo")
    parallel_state_sp.initialize_sequence_parallel(size)
    try:
        yield parallel_state_sp
    finally:
        parallel_state_sp._release_sequence_parallel_groups()
        groups.mpu = groups.mesh_device = None


def chosen_gradients_case(stage: int, bf16: bool, size: int, folder: str = "") -> dict[str, Any]:
    """Seven steps with gradients whose sum over the ranks of a sequence is chosen, and a checkpoint after three."""
    model = Net()
    load(model, initial(shapes_of(model)))
    steps = [step for step in gradients(shapes_of(model), 5)]
    rank, sequences = dist.get_rank(), dist.get_world_size() // size
    # The first rank of the first sequence brings a third, its last the rest; all others nothing.
    share = {0: 0.25, size - 1: 0.75}.get(rank, 0.0) * sequences
    # At stage 3 DeepSpeed takes the mean over the ranks of a sequence too, where it sums otherwise.
    share *= size if stage == 3 else 1
    with split_over(size) as mpu:
        optimizer = GWTAdamW(groups_of(model, "by name", 2, "paper"))
        engine = gwt_dist.initialize(model=model, optimizer=optimizer, config=settings(stage, bf16), mpu=mpu)[0]
        for i, step in enumerate(steps):
            backward(engine, model, step, share)
            if folder and i == 2:
                gwt_dist.save(folder, engine, engine.optimizer, step=3)
        found, split = masters(engine, model), engine.sequence_parallel_size
        engine.destroy()
    expected = reference("by name", 2, "paper", steps)
    return {"error": difference(found, expected, initial(shapes_of(model))), "split": split}


def resumed_case(folder: str) -> float:
    """The checkpoint of `chosen_gradients_case` in one process without DeepSpeed, and its last two steps."""
    model = Net()
    optimizer = GWTAdamW(groups_of(model, "by name", 2, "paper"))
    gwt_dist.load(folder, model, optimizer)
    steps = list(gradients(shapes_of(model), 5))
    for step in steps[3:]:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = step[name].clone()
        optimizer.step()
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return difference(found, reference("by name", 2, "paper", steps), initial(shapes_of(model)))


class Attention(nn.Module):
    """One head over a sequence of which this rank has a part; keys and values come from all ranks of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 13)
        self.attn = nn.Linear(13, 3 * 13, bias=False)  # that of the keys would have no gradient but rounding
        self.mlp = nn.Linear(13, 13)
        self.head = nn.Linear(13, 11)

    def forward(self, ids: Tensor, after: Tensor, group: Any = None) -> Tensor:
        """The sum of the losses of the tokens here."""
        x = self.embed(ids)
        query, key, value = self.attn(x).chunk(3, dim=-1)
        if group is not None:
            before, behind = (n * ids.shape[1] for n in (dist.get_rank(group), dist.get_world_size(group) - 1))
            room = (0, 0, before, behind - before)
            key, value = (all_reduce(nn.functional.pad(t, room), group=group) for t in (key, value))
        x = x + self.mlp(torch.softmax(query @ key.transpose(1, 2), dim=-1) @ value)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), after.flatten(), reduction="sum")


def attention_case(stage: int) -> float:
    """Four steps of a model whose sequences are split over two ranks, beside one process with whole sequences."""
    generator = torch.Generator().manual_seed(4)
    batches = torch.randint(11, (4, 2, 2, 10), generator=generator)  # steps, inputs and labels, sequences, tokens
    options: dict[str, Any] = {
        **{"lr": 0.01, "level": 2, "recipe": "energy"},
        **{"targets": ["attn", "mlp"], "weight_decay": 0.1},
    }
    model = Attention()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    here = slice(5 * dist.get_rank(), 5 * dist.get_rank() + 5)
    with split_over(2) as mpu:
        config = settings(stage) | {"optimizer": {"type": "GWTAdamW", "params": options}}
        engine = gwt_dist.initialize(model=model, config=config, mpu=mpu)[0]
        for ids, after in batches:
            loss = engine(ids[:, here], after[:, here], mpu.get_sequence_parallel_group()) / after.numel()
            engine.backward(loss * (2 if stage == 3 else 1))
            engine.step()
        found = masters(engine, model)
        engine.destroy()
    whole = Attention()
    optimizer = GWTAdamW(param_groups(whole, **options))
    for ids, after in batches:
        optimizer.zero_grad()
        (whole(ids, after) / after.numel()).backward()
        optimizer.step()
    return difference(found, {n: p.detach() for n, p in whole.named_parameters()}, start)


def mesh_case(stage: int) -> str:
    """The message where a device mesh splits the sequences, over which DeepSpeed sums no gradient."""
    from deepspeed.utils import groups

    config = settings(stage) | {"sequence_parallel_size": 2, "data_parallel_size": 1}
    try:
        gwt_dist.initialize(model=Net(), optimizer=None, config=config | {"optimizer": SECTION})
    except ValueError as error:
        return str(error)
    finally:
        groups.mesh_device = None
    return "no error"


SECTION = {"type": "GWTAdamW", "params": {"lr": 0.01, "level": 2, "recipe": "energy"}}

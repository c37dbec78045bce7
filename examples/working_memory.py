"""A decision transformer with a working memory, after DT-Mem (arXiv 2305.16338), under FSDP2, then LoRA on the memory.

A key is seen in the first segment of an episode, a door stands in the last one, and attention does not leave a segment.
The same model without memory can but guess the door. For other doors only adapters on the memory are trained.

torchrun --standalone --nproc-per-node 2 examples/working_memory.py
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from gwt_dist import GWTAdamW, param_groups

COLOURS, SEGMENTS, LENGTH = 4, 4, 4  # LENGTH is the steps of a segment
CLUTTER, DOOR = COLOURS, 2 * COLOURS  # observations: a key of each colour, clutter of each colour, the door
WIDTH, SLOTS, RANK = 32, 4, 4  # RANK is that of the adapters
BATCH, STEPS, LORA_STEPS, LR = 32, 100, 80, 4e-3
Targets = tuple[str, ...]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Episodes(NamedTuple):
    """Steps of episodes, each field [episodes, SEGMENTS, LENGTH]."""

    returns: Tensor  # still to come: 1 if the right door is opened in the end
    observations: Tensor
    actions: Tensor  # 0 walks on, 1 + c opens door c


def episodes(count: int, seed: int, shift: int = 0, good: float = 0.75) -> Episodes:
    """Recorded episodes; a key of colour c opens door c + shift, and a share `good` of them opens it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=generator)

    everyone, key = torch.arange(count), draw(COLOURS)
    success = torch.rand(count, generator=generator) < good
    observations = CLUTTER + draw(COLOURS, SEGMENTS, LENGTH)
    observations[everyone, 0, draw(LENGTH)] = key
    observations[:, -1, -1] = DOOR
    miss = torch.where(success, 0, 1 + draw(COLOURS - 1))
    actions = torch.zeros_like(observations)
    actions[:, -1, -1] = 1 + (key + shift + miss) % COLOURS
    return Episodes(success.float()[:, None, None].expand(observations.shape), observations, actions)


class Attention(nn.Module):
    """One head of attention."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What x [batch, n, WIDTH] reads from y [batch, m, WIDTH], in the shape of x."""
        read = F.scaled_dot_product_attention(self.q(x), self.k(y), self.v(y), is_causal=self.causal)
        return self.out(read)


def mlp() -> nn.Sequential:
    """[..., WIDTH] to the same shape."""
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


class Block(nn.Module):
    """A layer of a causal transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(causal=True), mlp()
        self.norm_attn, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] to the same shape."""
        y = self.norm_attn(x)
        x = x + self.attn(y, y)
        return x + self.mlp(self.norm_mlp(x))


class Memory(nn.Module):
    """Slots that are carried from segment to segment."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.read, self.mlp = Attention(), Attention(), mlp()
        self.norm, self.norm_write, self.norm_mlp = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.gates = nn.Linear(2 * WIDTH, 2 * WIDTH)  # input and forget gates from what is new and what was there
        with torch.no_grad():
            self.gates.bias.copy_(torch.tensor([0.0, 1.0]).repeat_interleave(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, SEGMENTS, tokens, WIDTH] to the same shape."""
        memory = torch.eye(SLOTS, WIDTH, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        outputs = []
        for segment in self.norm(x).unbind(1):
            # Read before written, so that no token sees what comes after it.
            outputs.append(self.read(segment, memory))
            memory = self.update(memory, segment)
        return x + torch.stack(outputs, dim=1)

    def update(self, memory: Tensor, segment: Tensor) -> Tensor:
        """The slots [batch, SLOTS, WIDTH] once a segment [batch, tokens, WIDTH] is over."""
        new = self.norm_write(memory + self.write(memory, segment))
        new = self.norm_mlp(new + self.mlp(new))
        enter, keep = self.gates(torch.cat([new, memory], dim=-1)).sigmoid().chunk(2, dim=-1)
        return enter * new.tanh() + keep * memory


class Agent(nn.Module):
    """A decision transformer of two layers, with or without the memory between them."""

    def __init__(self, remembers: bool = True) -> None:
        super().__init__()
        self.returns = nn.Linear(1, WIDTH)
        self.observations = nn.Embedding(2 * COLOURS + 1, WIDTH)
        self.actions = nn.Embedding(1 + COLOURS, WIDTH)
        self.places = nn.Embedding(3 * LENGTH, WIDTH)
        self.first, self.last = Block(), Block()
        self.memory = Memory() if remembers else nn.Identity()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1 + COLOURS)

    def forward(self, batch: Episodes) -> Tensor:
        """Log probabilities of the actions, [episodes, SEGMENTS, LENGTH, 1 + COLOURS]."""
        returns = self.returns(batch.returns[..., None].to(self.head.weight.dtype))
        tokens = torch.stack([returns, self.observations(batch.observations), self.actions(batch.actions)], dim=3)
        x = tokens.flatten(2, 3) + self.places.weight  # [episodes, SEGMENTS, 3 * LENGTH, WIDTH]
        # Blocks take each segment for a sequence of its own; the memory alone goes from one to the next.
        x = self.first(x.flatten(0, 1)).view_as(x)
        x = self.last(self.memory(x).flatten(0, 1)).view_as(x)
        x = self.norm(x[:, :, 1::3])  # an action is told where its observation is
        return self.head(x).log_softmax(dim=-1)


class LoRA(nn.Module):
    """A frozen Linear and beside it a trained product of rank RANK, which starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self.base(x) + self.up(self.down(x))


def with_lora(model: Agent) -> Agent:
    """Adapters on each Linear of the memory; all that was there is frozen."""
    model.requires_grad_(False)
    for parent in list(model.memory.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRA(child))
    return model


def sharded(model: Agent) -> FSDPModule:
    """The model under FSDP2 over all ranks."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for block in (model.first, model.last):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights, gathered."""
    named = model.state_dict().items()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}


def part_of(batch: Episodes, rank: int, world: int) -> Episodes:
    """Every `world`-th episode, on the device."""
    return Episodes(*(field[rank::world].to(DEVICE) for field in batch))


def train(model: nn.Module, targets: Targets, steps: int, seed: int, shift: int, rank: int, world: int) -> None:
    """Train on BATCH new episodes a step, of which this rank takes its part; FSDP2 averages the gradients."""
    # The default. It is named because adapters are as narrow as embeddings, of which `GWTAdamW` warns otherwise.
    optimizer = GWTAdamW(param_groups(model, targets=targets, recipe="orthogonal"), lr=LR)
    for step in range(steps):
        batch = part_of(episodes(BATCH, seed=1000 * seed + step, shift=shift), rank, world)
        loss = F.nll_loss(model(batch).flatten(0, -2), batch.actions.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: FSDPModule, shift: int, rank: int, world: int) -> float:
    """Share of right doors over 512 episodes that no seed of training has, asked for the return of a success."""
    batch = part_of(episodes(512, seed=-1, shift=shift, good=1.0), rank, world)
    right = (model(batch)[:, -1, -1].argmax(-1) == batch.actions[:, -1, -1]).sum()
    model.reshard()  # without a backward pass FSDP2 leaves the root gathered, and an optimizer would see copies
    dist.all_reduce(right)
    return right.item() / 512


class Row(NamedTuple):
    """A phase: weights that were trained, share of right doors, seconds."""

    phase: str
    trained: int
    accuracy: float
    seconds: float


def phase(name: str, model: FSDPModule, targets: Targets, steps: int, seed: int, shift: int = 0) -> Row:
    """Train a sharded model and count the doors that it opens."""
    ranks = dist.get_rank(), dist.get_world_size()
    start = time.perf_counter()
    train(model, targets, steps, seed, shift, *ranks)
    seconds = time.perf_counter() - start
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Row(name, trained if steps else 0, accuracy(model, shift, *ranks), seconds)


def main(seed: int) -> list[Row]:
    """Four phases; rank 0 prints them as a table."""
    torch.manual_seed(seed)  # the same weights on every rank
    plain, agent, adapted = Agent(remembers=False), Agent(), Agent()
    rows = [
        phase("without memory", sharded(plain), ("attn", "mlp"), STEPS, seed),
        phase("with memory", sharded(agent), ("memory", "attn", "mlp"), STEPS, seed),
    ]
    adapted.load_state_dict(whole(agent))
    sharded(with_lora(adapted))
    rows += [
        phase(f"other doors, {told}", adapted, ("memory",), steps, seed, shift=1)
        for told, steps in (("before", 0), ("LoRA on the memory", LORA_STEPS))
    ]
    if dist.get_rank() == 0:
        print(f"{'':<33}{'trained':>8}{'accuracy':>10}{'seconds':>9}")
        for row in rows:
            print(f"{row.phase:<33}{row.trained:>8,}{row.accuracy:>10.3f}{row.seconds:>9.1f}")
        print(f"{'chance':<33}{'':>8}{1 / COLOURS:>10.3f}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    dist.init_process_group()
    main(parser.parse_args().seed)
    dist.destroy_process_group()

"""A whole training step in a CUDA graph, and models that torch compiled, beside plain steps: bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpu_parts.setting import NO_TIME, Row, Setting, attempt
from gwt_dist import GWTAdamW, param_groups

RECIPES = {"energy": 2, "paper": 2, "orthogonal": 1}  # and their levels
BEFORE, STEPS = 3, 8  # steps of the warm-up, and all


class Chain(nn.Module):
    """Matrices with rows of odd lengths, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_in = nn.Linear(64, 97)
        self.mlp = nn.ModuleList(nn.Linear(97, 97, bias=False) for _ in range(3))
        self.attn_out = nn.Linear(97, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Of inputs (B, 64)."""
        x = self.attn_in(x)
        for layer in self.mlp:
            x = x + torch.tanh(layer(x))
        return self.attn_out(x)


class Training:
    """A model, its optimizer, and the tensors that a batch and the learning rate are written into."""

    def __init__(self, setting: Setting, recipe: str, backend: str = "") -> None:
        torch.manual_seed(0)
        self.model = Chain().to(setting.device)
        self.start = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.run: Callable[[Tensor], Tensor] = torch.compile(self.model, backend=backend) if backend else self.model
        self.rate = torch.tensor(0.01, device=setting.device)
        groups = param_groups(self.model, level=RECIPES[recipe], targets=("attn", "mlp"), recipe=recipe)
        self.optimizer = GWTAdamW(groups, lr=self.rate, weight_decay=0.1)
        self.x, self.y = torch.zeros(32, 64, device=setting.device), torch.zeros(32, 5, device=setting.device)

    def feed(self, t: int) -> None:
        """Batch and learning rate of step t."""
        generator = torch.Generator().manual_seed(t)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.y.copy_(torch.randn(self.y.shape, generator=generator))
        self.rate.fill_(0.01 / t)

    def step(self) -> None:
        """Forward, backward and update."""
        self.optimizer.zero_grad(set_to_none=True)
        (self.run(self.x) - self.y).square().mean().backward()
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        """Weights and state."""
        parameters = list(self.model.parameters())
        return [*parameters, *(value for p in parameters for value in self.optimizer.state[p].values())]


def rows(setting: Setting) -> Iterator[Row]:
    """Graphs, then compiled models."""
    # Graph and plain steps run on other streams, which have workspaces of their own: with these the sums are the same.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Inductor's own kernels make gradients of other bits than torch's, so the twin of such a model is given these.
    cases: list[tuple[str, Callable[[str], Row]]] = [
        ("a whole step in a CUDA graph", lambda recipe: graphed(setting, recipe)),
        ("torch.compile, aot_eager", lambda recipe: compiled(setting, recipe, "aot_eager")),
        ("torch.compile, inductor", lambda recipe: given(setting, recipe, "eager" if setting.smoke else "inductor")),
    ]
    for place, (name, measure) in enumerate(cases):
        for recipe in list(RECIPES)[: 1 if setting.smoke and place else None]:
            case: Row = {"case": name, "recipe": recipe}
            if setting.left() < (0 if setting.smoke else 4):
                yield case | {"note": NO_TIME}
            else:
                yield attempt(case, lambda r=recipe, m=measure: m(r))


def captured(train_step: Callable[[], object], feed: Callable[[int], object]) -> torch.cuda.CUDAGraph:
    """A graph of `train_step`, after some of its steps on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # state and kernels are made, and libraries are set up
        for t in (1, 2, 3):
            feed(t)
            train_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # nothing runs: `train_step` is recorded
        train_step()
    return graph


def graphed(setting: Setting, recipe: str) -> Row:
    """Replays beside plain steps; on a CPU, which has no graphs, plain steps beside plain steps."""
    training, plain = Training(setting, recipe), Training(setting, recipe)
    replay: Callable[[], object] = training.step
    note: Row = {"note": "no graphs on a CPU: plain steps in their place"}
    if setting.on_gpu:
        replay, note = captured(training.step, training.feed).replay, {}
    for t in range(1, STEPS + 1):
        plain.feed(t)
        plain.step()
        if t > BEFORE or not setting.on_gpu:
            training.feed(t)
            replay()
    found = _compared(training, plain) | note
    if setting.on_gpu:
        found |= {"ms": setting.timed(replay)[0], "plain ms": setting.timed(plain.step)[0]}
    return found


def compiled(setting: Setting, recipe: str, backend: str) -> Row:
    """A compiled model beside the model."""
    torch._dynamo.reset()
    training, plain = Training(setting, recipe, backend), Training(setting, recipe)
    for t in range(1, STEPS + 1):
        for one in (training, plain):
            one.feed(t)
            one.step()
    return _compared(training, plain)


def given(setting: Setting, recipe: str, backend: str) -> Row:
    """A compiled model beside the model with the gradients of the compiled one."""
    torch._dynamo.reset()
    training, plain = Training(setting, recipe, backend), Training(setting, recipe)
    for t in range(1, STEPS + 1):
        training.feed(t)
        plain.feed(t)
        training.step()
        for ours, its in zip(plain.model.parameters(), training.model.parameters(), strict=True):
            assert its.grad is not None
            ours.grad = its.grad.clone()
        plain.optimizer.step()
    return _compared(training, plain)


def _compared(a: Training, b: Training) -> Row:
    pairs: list[tuple[Any, Any]] = list(zip(a.tensors(), b.tensors(), strict=True))
    moved = all(not torch.equal(p, q) for p, q in zip(a.model.parameters(), a.start, strict=True))
    different = [(x.double() - y.double()).norm() / y.double().norm() for x, y in pairs if not torch.equal(x, y)]
    return {
        "ok": moved and not different,
        "tensors": len(pairs),
        "with other bits": len(different),
        "largest relative difference": max(map(float, different), default=0.0),
    }

"""What docs/faq.md says of ordinary loops: compiled models, scalers, clipping, accumulation, adapters, experts."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from documents import ROOT
from gwt_dist import GWTAdamW, param_groups
from gwt_dist.cli.app import main

RECIPES = ("paper", "energy", "orthogonal")


class Net(nn.Module):
    """Embedding and head of one weight, and Linear layers of 13 and 48 columns between them."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 48)
        self.attn = nn.Linear(48, 13)
        self.mlp = nn.Linear(13, 48)
        self.head = nn.Linear(48, 32, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.head(hidden + self.mlp(torch.tanh(self.attn(hidden))))


Loss = Callable[[nn.Module, Tensor], Tensor]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batches(steps: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(32, (4, 9), generator=generator) for _ in range(steps)]


def optimizer_of(model: nn.Module, recipe: str) -> GWTAdamW:
    return GWTAdamW(param_groups(model, level=2, recipe=recipe), lr=1e-2)


def trained(recipe: str, step: Callable[[Net, GWTAdamW, Tensor], None]) -> list[Tensor]:
    """The weights of a run in float64 whose steps are `step`."""
    model = Net()
    optimizer = optimizer_of(model, recipe)
    for tokens in batches():
        step(model, optimizer, tokens)
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def plain(model: Net, optimizer: GWTAdamW, tokens: Tensor) -> None:
    loss_of(model, tokens).backward()
    optimizer.step()


def furthest(a: list[Tensor], b: list[Tensor]) -> float:
    start = [p.detach() for p in Net().parameters()]
    assert min(float((x - y).abs().max()) for x, y in zip(b, start, strict=True)) > 1e-3, "nothing moved"
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_as_it_does_uncompiled(recipe: str, backend: str) -> None:
    torch._dynamo.reset()

    def step(model: Net, optimizer: GWTAdamW, tokens: Tensor) -> None:
        loss_of(torch.compile(model, backend=backend), tokens).backward()
        optimizer.step()

    assert furthest(trained(recipe, step), trained(recipe, plain)) == 0


def test_a_compiled_model_has_the_names_of_its_targets() -> None:
    groups = param_groups(torch.compile(Net(), backend="eager"), level=2)
    assert [(group["level"], len(group["params"])) for group in groups] == [(2, 2), (0, 3)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_scaler_changes_nothing_and_skips_what_is_not_finite(recipe: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)

    def scaled(model: Net, optimizer: GWTAdamW, tokens: Tensor) -> None:
        scaler.scale(loss_of(model, tokens)).backward()
        scaler.step(optimizer)
        scaler.update()

    # Powers of two: not a bit.
    assert furthest(trained(recipe, scaled), trained(recipe, plain)) == 0

    model = Net()
    optimizer = optimizer_of(model, recipe)
    scaled(model, optimizer, batches()[0])
    before = [t.clone() for t in [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]]
    scale = scaler.get_scale()
    (scaler.scale(loss_of(model, batches()[1])) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    after = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert scaler.get_scale() == scale / 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_clipping_is_that_of_the_raw_gradient(recipe: str) -> None:
    def clipped(model: Net, optimizer: GWTAdamW, tokens: Tensor) -> None:
        loss_of(model, tokens).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.2
        optimizer.step()

    def by_hand(model: Net, optimizer: GWTAdamW, tokens: Tensor) -> None:
        loss = loss_of(model, tokens)
        norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])
        (loss * (0.1 / norm.norm())).backward()
        optimizer.step()

    assert furthest(trained(recipe, clipped), trained(recipe, by_hand)) < 1e-5  # clip_grad_norm_ adds 1e-6 to the norm
    assert furthest(trained(recipe, clipped), trained(recipe, plain)) > 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_accumulated_batches_are_one_batch(recipe: str) -> None:
    def accumulated(model: Net, optimizer: GWTAdamW, tokens: Tensor) -> None:
        for part in tokens.split(1):
            (loss_of(model, part) / len(tokens)).backward()
        optimizer.step()

    assert furthest(trained(recipe, accumulated), trained(recipe, plain)) < 1e-12


def test_a_tied_weight_has_one_state_and_one_update() -> None:
    model = Net()
    optimizer = optimizer_of(model, "paper")
    plain(model, optimizer, batches()[0])
    assert model.head.weight is model.embed.weight
    assert optimizer.state[model.embed.weight]["exp_avg"].shape == (32, 48)
    assert len(optimizer.state) == len(list(model.parameters())) == 5


def test_autocast_leaves_moments_and_weights_in_fp32() -> None:
    model = Net(torch.float32)
    optimizer = optimizer_of(model, "paper")
    first = None
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batches()[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or loss.item()
    assert loss.item() < first - 0.5
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert {t.dtype for t in [*model.parameters(), *held]} == {torch.float32}


class Adapted(nn.Module):
    """A frozen Linear layer with the two matrices of a low-rank adapter."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(columns, rows).requires_grad_(False)
        self.lora_A = nn.Linear(columns, rank, bias=False)
        self.lora_B = nn.Linear(rank, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def test_adapters_have_a_level_and_what_is_frozen_no_state() -> None:
    model = nn.ModuleDict({"attn": Adapted(96, 64, 8)})
    with pytest.raises(ValueError, match="target 'mlp' matches no weight matrix to be trained"):
        param_groups(model, level=2, targets=["attn", "mlp"])
    optimizer = GWTAdamW(param_groups(model, level=2, targets="lora_"), lr=1e-2, recipe="energy")
    model["attn"](torch.randn(5, 64)).square().sum().backward()
    optimizer.step()
    moments = sum(s[kind].numel() for s in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq"))
    assert len(optimizer.state) == 2
    assert moments == 2 * (8 * 64 + 96 * 8) // 4


def test_experts_in_one_tensor_are_a_matrix_each() -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8)})
    model.experts_proj = nn.Parameter(torch.randn(4, 6, 10))
    groups = param_groups(model, targets=["mlp", "experts"], level=2, recipe="energy")
    assert [(group["level"], group.get("stacked")) for group in groups] == [(2, None), (2, True), (0, None)]
    optimizer = GWTAdamW(groups, lr=1e-2)
    model.experts_proj.square().sum().backward()
    optimizer.step()
    assert optimizer.state[model.experts_proj]["exp_avg"].shape == (4, 6, 3)


def test_the_state_of_adamw_is_refused() -> None:
    model = Net()
    adamw = torch.optim.AdamW(param_groups(model, level=2))
    loss_of(model, batches()[0]).backward()
    adamw.step()
    optimizer = optimizer_of(model, "paper")
    with pytest.raises(ValueError):
        optimizer.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


@pytest.mark.parametrize(("name", "share"), [("60m", 0.56), ("7b", 0.039)])
def test_embeddings_are_most_of_a_small_model(name: str, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = json.loads((ROOT / "configs" / "models" / f"{name}.json").read_text(encoding="utf-8"))
    assert main(["plan", name, "--engine", "single", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    embeddings = 2 * shapes["vocab_size"] * shapes["hidden_size"]
    assert embeddings / plan["model"]["weights"] == pytest.approx(share, abs=0.005)


def test_every_answer_names_tests_and_measurements_that_there_are() -> None:
    page = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    answers = page.split("\n## ")[1:]
    assert len(answers) > 12
    for answer in answers:
        assert re.search(r"\]\(\.\./(tests|benchmarks|README|configs)|\]\(\w+\.md", answer), answer.splitlines()[0]
    for name, file in re.findall(r"\[`(test_\w+)`\]\(\.\./tests/(\w+\.py)\)", page):
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (name, file)

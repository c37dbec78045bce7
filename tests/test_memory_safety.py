"""Parameters, gradients, state and groups that change between steps: the right step or an error, never other memory."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gwt_dist import GWTAdamW
from gwt_dist.kernels.choice import VARIABLE

SHAPES = [(48, 20), (7, 33), (5,), (16, 16)]
KERNELS = ["", "eager"]  # the fastest that there is, and the reference
RECIPES = ["energy", "paper", "foam", "orthogonal"]


def built(recipe: str = "energy", dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], GWTAdamW]:
    """Parameters and an optimizer that has taken a step."""
    torch.manual_seed(3)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    optimizer = GWTAdamW(parameters, lr=0.1, level=2, recipe=recipe, weight_decay=0.1)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return parameters, optimizer


def everything(parameters: list[nn.Parameter], optimizer: GWTAdamW) -> list[Tensor]:
    """All that a step may change."""
    found = [p.detach() for p in parameters]
    for p in parameters:
        found += [value for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    return [tensor.clone() for tensor in found if tensor.device.type == "cpu" and not tensor.is_sparse]


def refused(parameters: list[nn.Parameter], optimizer: GWTAdamW, match: str) -> None:
    """The step raises and has changed nothing."""
    before = everything(parameters, optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    after = everything(parameters, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.fixture(params=KERNELS, ids=["default", "eager"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test once with every kernel."""
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_parameter_that_was_cut_is_refused_with_both_shapes(recipe: str) -> None:
    """Pruning, a smaller embedding, another LoRA rank: ``p.data`` of another shape."""
    parameters, optimizer = built(recipe)
    parameters[0].data = parameters[0].data[:6].clone()
    parameters[0].grad = torch.randn(6, 20)
    refused(parameters, optimizer, r"has the shape \(6, 20\) here and had \(48, 20\)")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "shape",
    [(49, 20), (20, 48), (960,), (48, 20, 1), (0, 20)],
)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    """Of as many elements, of more and of none."""
    parameters, optimizer = built()
    parameters[0].data = torch.randn(shape)
    parameters[0].grad = torch.randn(shape)
    refused(parameters, optimizer, r"had \(48, 20\)")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", [(20, 48), (960,)])
def test_a_gradient_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """Of as many elements, in another order: torch compares shapes when ``p.grad`` is set, not when its data are."""
    parameters, optimizer = built()
    parameters[0].grad.data = torch.randn(shape)  # type: ignore[union-attr]
    refused(parameters, optimizer, r"a gradient of 960 elements .* of shape .* and not \(48, 20\)")


@pytest.mark.usefixtures("kernel")
def test_weights_that_share_memory_among_themselves_are_refused() -> None:
    parameters, optimizer = built()
    parameters[0].data = parameters[0].data[:1].expand(48, 20)
    refused(parameters, optimizer, "elements of it share memory")


def test_options_that_change_in_place_are_taken() -> None:
    """A list, as a JSON has it."""
    (p, *_), (q, *_) = (its := built())[0], (other := built())[0]
    for optimizer in (its[1], other[1]):
        optimizer.param_groups[0]["betas"] = [0.9, 0.999]
        optimizer.step()
    its[1].param_groups[0]["betas"][0] = 0.5
    other[1].param_groups[0]["betas"] = (0.5, 0.999)
    for optimizer in (its[1], other[1]):
        optimizer.step()
    assert torch.equal(p, q)


def test_parameters_that_to_empty_replaced_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    optimizer = GWTAdamW(model.parameters(), level=1)
    model.to_empty(device="cpu")
    model.reset_parameters()
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"2 of 2 .* on the meta device"):
        optimizer.step()


def narrower(tensor: Tensor) -> Tensor:
    """One element short."""
    return tensor.reshape(-1)[:-1]


BROKEN: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "short": (narrower, "elements, and needs|elements for the"),
    "long": (lambda t: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]), "elements, and needs|elements for the"),
    "fp64": (Tensor.double, r"is torch.float64 and must be"),
    "int": (Tensor.int, r"is torch.int32 and must be"),
    "meta": (lambda t: t.to("meta"), "is on meta and the weight on cpu"),
    "sparse": (lambda t: t.reshape(1, -1).to_sparse(), "layout torch.sparse_coo"),
    "a number": (lambda t: 1.0, "is a float and no tensor"),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("recipe", ["energy", "paper"])
@pytest.mark.parametrize("how", BROKEN)
def test_state_of_another_kind_is_refused(how: str, recipe: str) -> None:
    """State tensors that were replaced, resized, moved or cast."""
    change, match = BROKEN[how]
    for name in ["exp_avg", "exp_avg_sq", *(["limited_norm"] if recipe == "paper" else [])]:
        parameters, optimizer = built(recipe)
        state = optimizer.state[parameters[1]]
        state[name] = change(state[name])
        refused(parameters, optimizer, match)


@pytest.mark.usefixtures("kernel")
def test_state_that_shrank_in_place_is_refused() -> None:
    """The tensor is the same object, at the same place in memory."""
    parameters, optimizer = built()
    optimizer.state[parameters[0]]["exp_avg"].resize_(3)
    refused(parameters, optimizer, "3 elements, and needs 240")


@pytest.mark.usefixtures("kernel")
def test_state_without_a_field_is_refused() -> None:
    """A key that was deleted."""
    parameters, optimizer = built()
    del optimizer.state[parameters[0]]["exp_avg_sq"]
    refused(parameters, optimizer, "has no exp_avg_sq")


@pytest.mark.usefixtures("kernel")
def test_weights_and_state_that_are_not_contiguous() -> None:
    """Weights may lie in memory as they like, and are stepped as they are; state may not."""
    parameters, optimizer = built()
    alike, its = built()
    with torch.no_grad():
        parameters[0].data = parameters[0].data.t().contiguous().t()
        parameters[0].grad = parameters[0].grad.t().contiguous().t()  # type: ignore[union-attr]
    optimizer.step(), its.step()
    assert not parameters[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(parameters, alike, strict=True))
    state = optimizer.state[parameters[0]]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    refused(parameters, optimizer, "must be dense")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("lr", [torch.ones(2), "0.1", None])
def test_rates_that_are_no_numbers_are_refused(lr: Any) -> None:
    """Between steps, where nothing has looked at them since the optimizer was built."""
    parameters, optimizer = built()
    optimizer.param_groups[0].update(lr=lr)
    refused(parameters, optimizer, "lr=.* in parameter group 0 must be a finite number")


@pytest.mark.usefixtures("kernel")
def test_a_gradient_that_torch_negates_when_it_is_read() -> None:
    """A part of a conjugated tensor: its memory has the other sign."""
    found = []
    for gradient in (torch.randn(1, dtype=torch.complex64).conj().imag, None):
        p = nn.Parameter(torch.ones(1))
        p.grad = gradient if gradient is not None else found[0].clone().resolve_neg()
        found.append(p.grad)
        optimizer = GWTAdamW([p], lr=0.1, level=1)
        optimizer.step()
        found.append(p.detach())
    assert found[0].is_neg() and not found[2].is_neg()
    assert torch.equal(found[1], found[3])


def test_weights_that_change_precision_keep_their_state() -> None:
    """bf16 weights go on with the fp32 moments that they had in fp32."""
    parameters, optimizer = built()
    for p in parameters:
        p.data = p.data.bfloat16()
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(p.dtype == torch.bfloat16 for p in parameters)
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in parameters)


def _change(draw: random.Random, p: nn.Parameter, optimizer: GWTAdamW) -> None:
    """Something that a script might do to a parameter between two steps, right or wrong."""
    state = optimizer.state[p]
    name = draw.choice(sorted(state)) if state else ""
    group = draw.choice(optimizer.param_groups)
    how = draw.choice(["short", "long", "fp64", "int", "meta", "sparse", "a number"])
    broken = BROKEN[how][0]

    def data(value: Any) -> None:
        p.data = value

    def gradient(value: Any) -> None:
        p.grad = value

    def of_state(value: Any) -> None:
        state[name] = value

    rows = draw.randint(0, p.shape[0] + 3)
    kinds: list[Callable[[], Any]] = [
        lambda: data(torch.randn(rows, *p.shape[1:])),
        lambda: data(p.data[: max(1, rows // 2)]),
        lambda: data(p.data.reshape(-1)),
        lambda: data(p.data.t()),
        lambda: data(p.data.bfloat16()),
        lambda: data(p.data.double()),
        lambda: data(p.data[:1].expand(p.shape)),
        lambda: data(broken(p.data)),
        lambda: p.data.resize_(rows, *p.shape[1:]),
        lambda: gradient(None),
        lambda: gradient(torch.randn(p.shape, dtype=p.dtype).t().contiguous().t()),
        lambda: setattr(p.grad, "data", broken(p.grad.data)),  # type: ignore[union-attr]
        lambda: p.grad.resize_(rows, *p.shape[1:]),  # type: ignore[union-attr]
        lambda: of_state(broken(state[name])),
        lambda: setattr(state[name], "data", broken(state[name].data)),
        lambda: state[name].resize_(max(0, state[name].numel() - rows)),
        lambda: state.pop(name),
        lambda: state.clear(),
        lambda: group.update(level=draw.choice([0, 1, 2, 3, -1, 99, "2"])),
        lambda: group.update(recipe=draw.choice([*RECIPES, "none", 3])),
        lambda: group.update(lr=draw.choice([float("nan"), torch.tensor(0.1), "0.1", None, torch.ones(2)])),
        lambda: group.update(betas=draw.choice([(0.9,), "ab", (0.5, 0.5), None])),
        lambda: group.update(wavelet=draw.choice(["db2", "haar", "nothing", None])),
        lambda: group["params"].pop(),
        lambda: group["params"].append(draw.choice(group["params"])),
        lambda: p.requires_grad_(draw.random() < 0.5),
    ]
    draw.choice(kinds)()


def _run(seed: int) -> tuple[list[list[Tensor]], str]:
    """What was there after each step of a run with random changes, and the error that it ended in, if any."""
    draw, found = random.Random(seed), []
    parameters, optimizer = built(draw.choice(RECIPES))
    torch.manual_seed(seed)
    for _ in range(3):
        for p in parameters:
            try:
                p.grad = torch.randn(p.shape).to(p.dtype)
            except (RuntimeError, TypeError):
                p.grad = None
        try:
            _change(draw, draw.choice(parameters), optimizer)
        except (RuntimeError, TypeError, AttributeError, IndexError, NotImplementedError):
            continue  # torch does not let it happen
        shapes = [(tuple(p.shape), p.dtype) for p in parameters]
        try:
            optimizer.step()
        except (ValueError, TypeError, RuntimeError) as error:
            return found, type(error).__name__
        assert shapes == [(tuple(p.shape), p.dtype) for p in parameters]
        found.append(everything(parameters, optimizer))
    return found, ""


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_between_steps_end_in_the_right_step_or_an_error(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled kernel steps as the reference does, whatever was changed, or either raises."""
    stepped, raised = 0, {"": 0, "ValueError": 0, "TypeError": 0, "RuntimeError": 0}
    for i in range(150):
        monkeypatch.setenv(VARIABLE, "")
        compiled, error = _run(1000 * seed + i)
        monkeypatch.setenv(VARIABLE, "eager")
        reference, _ = _run(1000 * seed + i)
        for mine, its in zip(compiled, reference, strict=False):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6, equal_nan=True)
        stepped += min(len(compiled), len(reference))
        raised[error] += 1
    assert stepped > 50 and raised["ValueError"] > 50, (stepped, raised)


def test_a_copy_of_state_is_checked_too() -> None:
    """A deep copy whose state was cut: its own plan says how much there must be."""
    _, optimizer = built()
    another = copy.deepcopy(optimizer)
    p = another.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    another.state[p]["exp_avg"] = narrower(another.state[p]["exp_avg"])
    with pytest.raises(ValueError, match="239 elements, and needs 240"):
        another.step()
    optimizer.step()

"""`GWTAdamW` as a `torch.optim.Optimizer`: schedulers, closures, groups, state, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gwt_dist import Fragment, GWTAdamW, LayoutError, param_groups
from gwt_dist.comm import Shard
from gwt_dist.engines.section import from_section
from gwt_dist.exchange import Whole


class Model(nn.Module):
    """Two matrices of odd widths, a bias, a frozen matrix, and one that the forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp_a = nn.Linear(13, 10)
        self.mlp_b = nn.Linear(10, 7, bias=False)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.mlp_b(self.mlp_a(x).tanh())).square().mean()


def make(dtype: torch.dtype = torch.float64, **options: object) -> tuple[Model, GWTAdamW]:
    torch.manual_seed(0)
    model = Model().to(dtype)
    return model, GWTAdamW(param_groups(model, targets="mlp", **{"lr": 0.01, "level": 2, "recipe": "paper", **options}))  # type: ignore[arg-type]


def batches(steps: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(steps, 4, 13, generator=torch.Generator().manual_seed(7), dtype=dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor) -> list[float]:
    losses = []
    for x in data:
        optimizer.zero_grad()
        loss = model(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters()])


def test_it_trains_and_leaves_frozen_and_unused_parameters_alone() -> None:
    model, optimizer = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(model, optimizer, batches(1).expand(60, -1, -1))
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.named_parameters():
        trained = name.startswith("mlp")
        assert torch.equal(parameter, before[name]) != trained, name
        assert bool(optimizer.state.get(parameter)) == trained, name


def test_nothing_is_allocated_before_the_first_step() -> None:
    _, optimizer = make()
    assert not optimizer.state


def test_state_has_tensors_of_the_promised_shapes() -> None:
    model, optimizer = make(dtype=torch.bfloat16)
    train(model, optimizer, batches(2, torch.bfloat16))
    state = optimizer.state[model.mlp_a.weight]
    assert {k: (tuple(v.shape), v.dtype) for k, v in state.items()} == {
        "step": ((), torch.float32),
        "exp_avg": ((10, 4), torch.float32),
        "exp_avg_sq": ((10, 4), torch.float32),
        "limited_norm": ((), torch.float32),
    }
    assert float(state["step"]) == 2
    assert tuple(optimizer.state[model.mlp_a.bias]["exp_avg"].shape) == (10,)


def test_a_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    model, optimizer = make()
    x = batches(1)[0]
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(x)
        loss.backward()
        calls.append(loss)
        return loss

    before = weights(model)
    returned = optimizer.step(closure)
    assert len(calls) == 1 and returned is calls[0]
    assert not torch.equal(weights(model), before)


def test_a_scheduler_and_groups_with_their_own_rates() -> None:
    """A group at rate 0 does not move; a scheduler scales each group's own rate."""
    model, optimizer = make()
    optimizer.param_groups[1]["lr"] = 0.0
    bias = model.mlp_a.bias.detach().clone()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    a = model.mlp_a.weight.detach().clone()
    train(model, optimizer, batches(1))
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.005, 0.0]
    assert torch.equal(model.mlp_a.bias, bias) and not torch.equal(model.mlp_a.weight, a)


def test_a_tensor_learning_rate_is_the_same_step() -> None:
    (one, first), (two, second) = (
        make(weight_decay=0.1),
        make(weight_decay=0.1, lr=torch.tensor(0.01, dtype=torch.float64)),
    )
    train(one, first, batches(3))
    train(two, second, batches(3))
    assert torch.equal(weights(one), weights(two))


@pytest.mark.parametrize("recipe", ["energy", "paper", "orthogonal"])
def test_a_learning_rate_of_one_dimension_is_the_same_step(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a factor in the reference it would bring its dtype along, which a 0-d tensor does not."""
    monkeypatch.setenv("GWT_DIST_KERNEL", "eager")
    (one, first), (two, second) = (make(recipe=recipe, lr=torch.tensor(lr)) for lr in (0.0123, [0.0123]))
    train(one, first, batches(3))
    train(two, second, batches(3))
    assert torch.equal(weights(one), weights(two))


def test_weights_that_are_not_contiguous_move_as_contiguous_ones() -> None:
    torch.manual_seed(0)
    dense = nn.Parameter(torch.randn(6, 10))
    transposed = nn.Parameter(dense.detach().t().contiguous().t())
    assert not transposed.is_contiguous()
    gradient = torch.randn(6, 10)
    for parameter in (dense, transposed):
        parameter.grad = gradient.clone()
        GWTAdamW([parameter], lr=0.1, level=2, recipe="energy").step()
    assert torch.equal(dense, transposed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["paper", "energy"])
def test_state_dict_round_trip_continues_bit_for_bit(recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    data = batches(6, dtype)
    whole, optimizer = make(dtype, recipe=recipe)
    train(whole, optimizer, data)
    first, half = make(dtype, recipe=recipe)
    train(first, half, data[:3])
    torch.save({"model": first.state_dict(), "optimizer": half.state_dict()}, tmp_path / "checkpoint")
    second, resumed = make(dtype, recipe=recipe)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    state, original = resumed.state[second.mlp_a.weight], half.state[first.mlp_a.weight]
    for key in original:
        assert state[key].dtype == original[key].dtype and torch.equal(state[key], original[key])
        assert state[key].data_ptr() != saved["optimizer"]["state"][0][key].data_ptr(), "loaded state is shared"
    train(second, resumed, data[3:])
    assert torch.equal(weights(second), weights(whole))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_pickles_step_alike(copied) -> None:
    model, optimizer = make()
    train(model, optimizer, batches(2))
    twin = copied({"model": model, "optimizer": optimizer})
    train(model, optimizer, batches(2))
    train(twin["model"], twin["optimizer"], batches(2))
    assert torch.equal(weights(model), weights(twin["model"]))


@pytest.mark.parametrize(("key", "value"), [("level", 3), ("wavelet", "db2")])
def test_loading_another_level_or_wavelet_is_refused_and_changes_nothing(key: str, value: object) -> None:
    model, optimizer = make()
    train(model, optimizer, batches(2))
    other_model, other = make(**{key: value} if key == "wavelet" else {})
    if key == "level":
        other = GWTAdamW(param_groups(other_model, level=3, targets="mlp"), recipe="energy")
    train(other_model, other, batches(1))
    before = pickle.dumps(other.state_dict())
    with pytest.raises(ValueError, match=rf"{key} of parameter group 0 is .* in the state to load and .* in this"):
        other.load_state_dict(optimizer.state_dict())
    assert pickle.dumps(other.state_dict()) == before


def test_loading_moments_of_another_size_is_refused() -> None:
    model, optimizer = make()
    train(model, optimizer, batches(1))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:, 1:]
    with pytest.raises(ValueError, match=r"exp_avg of a parameter in group 0 has shape \(10, 3\).* needs \(10, 4\)"):
        optimizer.load_state_dict(state)


def test_a_level_changed_after_the_first_step_is_refused() -> None:
    model, optimizer = make()
    train(model, optimizer, batches(1))
    optimizer.param_groups[0]["level"] = 3
    with pytest.raises(
        ValueError, match=r"level=3, wavelet='haar' with .* of parameter 0 of group 0 differ from level=2"
    ):
        train(model, optimizer, batches(1))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"betas": (0.9, 1.0)},
        {"betas": 0.9},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"level": 17},
        {"level": 2.0},
        {"scale": float("inf")},
        {"wavelet": "harr"},
        {"recipe": "papper"},
        {"second_moment": "energie"},
        {"detail_gain": 1.5},
        {"detail_gain": "coherent"},
        {"limiter": 0.5},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(options: dict) -> None:
    key, value = next(iter(options.items()))
    parameter = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=f"{key}={value!r}".replace("(", r"\(").replace(")", r"\)")):
        GWTAdamW([parameter], **options)
    with pytest.raises(ValueError, match=key):
        GWTAdamW([{"params": [parameter], **options}])


@pytest.mark.parametrize(
    "parameter",
    [torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(2, 2)],
    ids=["complex", "sparse gradient"],
)
def test_complex_and_sparse_are_refused(parameter: torch.Tensor) -> None:
    weight = nn.Parameter(parameter)
    weight.grad = torch.ones_like(weight) if weight.is_complex() else torch.ones(2, 2).to_sparse()
    with pytest.raises(ValueError, match="is complex or has a sparse gradient"):
        GWTAdamW([weight], level=2, recipe="energy").step()


def test_a_flat_buffer_that_was_never_attached_is_refused_on_its_first_real_step() -> None:
    """Engines put buffers of their own in the place of the parameters; a zero-gradient dry run must pass."""
    _, optimizer = make()
    flat = torch.zeros(200, requires_grad=True)
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.zeros(200)
    optimizer.step()
    assert not optimizer.state
    flat.grad[7] = 1.0
    with pytest.raises(ValueError, match=r"flat buffer of 200 elements.*gwt_dist\.attach\(optimizer, engine\)"):
        optimizer.step()
    assert not optimizer.state and not flat.detach().any()


def test_attaching_after_the_first_step_is_refused() -> None:
    model, optimizer = make()
    train(model, optimizer, batches(1))
    weight = model.mlp_a.weight
    with pytest.raises(ValueError, match="already has optimizer state; attach before the first step"):
        optimizer.attach({weight: Shard.whole("mlp_a.weight", (10, 13))})


def ddp_case(recipe: str) -> tuple[float, float]:
    """Weights under DDP after five steps, and how far they are from one process on the whole batch."""
    data = batches(5)
    model, optimizer = make(recipe=recipe)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    share = data.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    train(wrapped, optimizer, share)
    whole, reference = make(recipe=recipe)
    start = weights(whole)
    train(whole, reference, data)
    change = (weights(whole) - start).abs().max()
    return float((weights(model) - weights(whole)).abs().max() / change), float(weights(model).sum())


@pytest.mark.support("DDP", "unused parameters, fp64, 2 ranks")
@pytest.mark.parametrize("recipe", ["paper", "energy"])
def test_under_ddp_the_update_is_that_of_one_process(ranks, recipe: str) -> None:
    results = ranks(2, ddp_case, recipe)
    assert max(error for error, _ in results) < 1e-10
    assert results[0][1] == results[1][1]


def test_layout_errors_are_value_errors_and_fragments_are_public() -> None:
    assert issubclass(LayoutError, ValueError)
    assert Fragment("w", (2, 3), 0, 6).numel == 6
    assert Whole("w", (2, 3), ()).cuts == ()
    # DeepSpeed finds the type by name in torch.optim.
    assert torch.optim.GWTAdamW is from_section  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"rank": 1, "proj": "random", "scale_type": "tensor", "scale_front": False}, ["scale_type='tensor'", "proj="]),
        ({"wave_type": "db2", "boundary": "periodic"}, ["wave_type='db2' -> wavelet", "boundary"]),
        ({"disable_nl": True}, ["disable_nl=True -> limiter: 0"]),
    ],
    ids=["apollo-torch", "published GWT", "disable_nl"],
)
def test_group_keys_of_other_optimizers_are_told_by_their_names_here(keys, told) -> None:
    plain = {"params": [nn.Parameter(torch.zeros(3))]}
    with pytest.raises(ValueError, match="in parameter group 1: keys of another optimizer") as raised:
        GWTAdamW([plain, {"params": [nn.Parameter(torch.zeros(4, 8))], **keys}])
    for part in told:
        assert part in str(raised.value)


def test_arguments_of_adamw_that_change_nothing_are_taken() -> None:
    weight = nn.Parameter(torch.ones(4, 8))
    GWTAdamW([weight], level=0, foreach=True, fused=True, capturable=True, amsgrad=False, maximize=False)
    GWTAdamW([{"params": [weight], "fused": True, "amsgrad": False}], level=0, foreach=None, differentiable=False)
    for key in ("amsgrad", "maximize", "differentiable"):
        with pytest.raises(ValueError, match=f"{key}=True in the arguments of GWTAdamW, which GWTAdamW has not"):
            GWTAdamW([weight], **{key: True})
        with pytest.raises(ValueError, match=f"{key}=True in parameter group 0, which GWTAdamW has not"):
            GWTAdamW([{"params": [weight], key: True}])


def test_a_group_by_hand_with_a_misspelt_key_is_refused() -> None:
    weight = nn.Parameter(torch.ones(4, 8))
    with pytest.raises(ValueError, match=r"parameter group 0 has the unknown key 'weigth_decay'.*'weight_decay'"):
        GWTAdamW([{"params": [weight], "weigth_decay": 0.1}])
    own = {"initial_lr": 0.1, "name": "body", "lr_scale": 2.0}
    assert GWTAdamW([{"params": [weight], **own}], level=0).param_groups[0].items() >= own.items()


def test_numbers_of_numpy_are_numbers() -> None:
    weight = nn.Parameter(torch.ones(4, 8))
    optimizer = GWTAdamW(
        [{"params": [weight], "weight_decay": np.float32(0.5)}], lr=np.float32(0.25), level=np.int64(1)
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["level"]) == (0.25, 0.5, 1)
    assert [type(group[key]) for key in ("lr", "weight_decay", "level")] == [float, float, int]

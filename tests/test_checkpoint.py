"""Checkpoints of one process: the format, what goes on from one, and what does not fit."""

from __future__ import annotations

import hashlib
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gwt_dist
from checkpoint_runs import Run, built, content, same, saved_run, steps, train
from gwt_dist import CheckpointError, GWTAdamW, param_groups
from gwt_dist.checkpoint import checkpoints, files, read_index
from zero_cases import Net, options


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return saved_run(tmp_path / "run")


@pytest.mark.parametrize("recipe", ["paper", "energy", "orthogonal"])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_the_run_goes_on_to_the_bit(tmp_path, recipe, wavelet) -> None:
    run = built(3, recipe, wavelet)
    train(run, steps()[:2])
    gwt_dist.save(tmp_path, *run, step=2, extra={"text": "ä", "list": [1, 2.5, None]})
    again = built(3, recipe, wavelet)
    loaded = gwt_dist.load(tmp_path, *again)
    assert (loaded.step, loaded.extra) == (2, {"text": "ä", "list": [1, 2.5, None]})
    assert same(content(run), content(again))
    train(run, steps()[2:])
    train(again, steps()[2:])
    assert same(content(run), content(again))


def test_before_the_first_step(tmp_path) -> None:
    run = built()
    gwt_dist.save(tmp_path, *run, step=0)
    again = built()
    train(again, steps()[:1])
    gwt_dist.load(tmp_path, *again)
    assert not again[1].state
    assert same(content(again), content(run))


def test_small_chunks(saved, tmp_path, monkeypatch) -> None:
    """Tensors in many chunks are the tensors in one."""
    run = built()
    gwt_dist.load(saved, *run)
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    gwt_dist.save(tmp_path / "small", *run, step=2)
    again = built()
    folder = gwt_dist.load(tmp_path / "small", *again).folder
    assert len(read_index(folder).tensors["mlp_down.weight"].parts["weight"].chunks) == -(-16 * 5461 // 250)
    assert same(content(run), content(again))


def test_buffers_frozen_and_wrapped(tmp_path) -> None:
    """Buffers of any dtype, frozen weights, and names without what torch.compile puts into them."""

    def model() -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        net[2].weight.requires_grad_(False)
        net.register_buffer("left_out", torch.zeros(3), persistent=False)
        return net

    torch.manual_seed(1)
    first = model()
    optimizer = GWTAdamW([p for p in first.parameters() if p.requires_grad], level=2, recipe="energy")
    first(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    folder = gwt_dist.save(tmp_path, torch.compile(first, backend="eager"), optimizer, step=1)
    index = read_index(folder)
    assert index.tensors["1.num_batches_tracked"].dtype == "I64"
    assert "left_out" not in index.tensors
    second = model()
    again = GWTAdamW([p for p in second.parameters() if p.requires_grad], level=2, recipe="energy")
    gwt_dist.load(tmp_path, second, again)
    assert same(content((first, optimizer)), content((second, again)))
    assert int(second[1].num_batches_tracked) == 1


def test_options_and_schedule(tmp_path) -> None:
    run = built()
    run[1].param_groups[0]["weight_decay"] = 0.125
    schedule = torch.optim.lr_scheduler.ExponentialLR(run[1], 0.5)
    train(run, steps()[:1])
    schedule.step()
    gwt_dist.save(tmp_path, *run, step=1, scheduler=schedule)
    again = built()
    other = torch.optim.lr_scheduler.ExponentialLR(again[1], 0.9)
    gwt_dist.load(tmp_path, *again, scheduler=other)
    assert [g["lr"] for g in again[1].param_groups] == [0.005, 0.005]
    assert again[1].param_groups[0]["weight_decay"] == 0.125
    assert again[1].param_groups[0]["betas"] == (0.9, 0.999)
    train(again, steps()[1:2])
    other.step()
    assert [g["lr"] for g in again[1].param_groups] == [0.0025, 0.0025]


def test_a_tensor_learning_rate_stays_a_tensor(saved) -> None:
    model = Net()
    rate = torch.tensor(0.7)
    optimizer = GWTAdamW(param_groups(model, targets=["attn", "mlp"], **{**options(2, "paper"), "lr": rate}))
    gwt_dist.load(saved, model, optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.01)


def test_bf16_weights_without_masters(saved) -> None:
    """Masters are rounded into bf16 weights; moments stay in fp32."""
    run, low = built(), built(model=Net().bfloat16())
    gwt_dist.load(saved, *run)
    gwt_dist.load(saved, *low)
    for (name, weight), rounded in zip(run[0].named_parameters(), low[0].parameters(), strict=True):
        assert torch.equal(weight.bfloat16(), rounded), name
    states = [value for state in run[1].state.values() for value in state.values()]
    assert same(states, [value for state in low[1].state.values() for value in state.values()])


def test_the_files_are_safetensors_with_checksums(saved) -> None:
    folder = saved / "step-00000002"
    for line, root in (((saved / "latest").read_text(), saved), ((folder / "index.json.sha256").read_text(), folder)):
        sha256, name = line.split()
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == sha256
    index, tensors = read_index(folder), load_file(folder / "rank-00000.safetensors")
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", "index.json.sha256", "rank-00000.safetensors"]
    run = built()
    gwt_dist.load(saved, *run)
    for name, weight in run[0].named_parameters():
        assert torch.equal(tensors.pop(f"{name}:weight:0").view(weight.shape), weight)
        for kind in ("exp_avg", "exp_avg_sq") if weight.requires_grad else ():
            assert torch.equal(tensors.pop(f"{name}:{kind}:0"), run[1].state[weight][kind].view(-1))
    assert sorted(tensors) == ["random:0:python:0", "random:0:torch:0"]
    stored = sum(part.bytes for _, part in index.stored())
    assert stored + index.files["rank-00000.safetensors"].header_bytes == index.files["rank-00000.safetensors"].bytes


# --- folders


def test_latest_keep_and_what_is_never_overwritten(tmp_path) -> None:
    run = built()
    for step in (1, 2, 3, 4):
        train(run, steps()[:1])
        gwt_dist.save(tmp_path, *run, step=step, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert gwt_dist.load(tmp_path, *built()).step == 4
    assert gwt_dist.load(tmp_path, *built(), which=3).step == 3
    assert gwt_dist.load(tmp_path, *built(), which="step-00000003").step == 3
    with pytest.raises(CheckpointError, match="step-00000004 exists, and nothing in it is overwritten"):
        gwt_dist.save(tmp_path, *run, step=4)
    with pytest.raises(CheckpointError, match=r"step-00000001.*checkpoints there: step-00000003, step-00000004"):
        gwt_dist.load(tmp_path, *built(), which=1)
    with pytest.raises(CheckpointError, match="neither 'latest', a step, nor"):
        gwt_dist.load(tmp_path, *built(), which="../step-00000003")
    with pytest.raises(CheckpointError, match="there is no checkpoint that was saved to the end"):
        gwt_dist.load(tmp_path / "elsewhere", *built())


def test_what_dead_saves_leave(saved) -> None:
    """Files half written are never read and then cleared; a checkpoint without `latest` is replaced."""
    run = built()
    gwt_dist.load(saved, *run)
    (saved / ".step-00000003.saving").mkdir()
    (saved / ".step-00000003.saving" / "rank-00000.safetensors").write_bytes(b"half")
    shutil.copytree(saved / "step-00000002", saved / "step-00000004")  # killed before `latest` was moved
    assert gwt_dist.load(saved, *built()).step == 2
    gwt_dist.save(saved, *run, step=3)
    gwt_dist.save(saved, *run, step=4)
    assert sorted(p.name for p in saved.iterdir()) == ["latest", *(f"step-0000000{i}" for i in (2, 3, 4))]
    assert gwt_dist.load(saved, *built()).step == 4


def test_nothing_is_left_of_a_save_that_fails(saved) -> None:
    run = built()
    with pytest.raises(CheckpointError, match=r"extra\['data'\]\[1\] is a builtins.object, and a checkpoint could not"):
        gwt_dist.save(saved, *run, step=3, extra={"data": (1, object())})
    run[1].param_groups[1]["mine"] = object()
    with pytest.raises(CheckpointError, match="option 'mine' of parameter group 1 cannot be written as JSON"):
        gwt_dist.save(saved, *run, step=3)
    assert sorted(p.name for p in saved.iterdir()) == ["latest", "step-00000002"]


# --- what does not fit


def wider(model: nn.Module) -> nn.Module:
    model.extra = nn.Linear(3, 3)
    return model


def reshaped() -> nn.Module:
    model = Net()
    model.mlp_thin = type(model.mlp_thin)(3, 9)
    return model


MISFITS: dict[str, tuple[Callable[[], Run], str]] = {
    "level": (lambda: built(3), r"'attn_q.weight' has level=2, wavelet='haar' in .* and level=3"),
    "wavelet": (lambda: built(wavelet="db2"), r"wavelet='haar' in .* and level=2, wavelet='db2' in this optimizer"),
    "recipe": (lambda: built(recipe="energy"), r"second_moment='approximation' \(recipe 'paper'\)"),
    "more": (
        lambda: built(model=wider(Net())),
        r"does not have extra.bias, extra.weight: the checkpoint is of another",
    ),
    "shape": (
        lambda: built(model=reshaped()),
        r"'mlp_thin.weight' has shape \(9, 3\) in .* and \(3, 9\) in this model",
    ),
    "frozen": (
        lambda: (m := Net(), GWTAdamW([m.attn_q.weight], level=2, recipe="energy")),
        r"has moments of 'embed.weight', which this optimizer",
    ),
    "another model": (
        lambda: (Net(), GWTAdamW(Net().parameters(), level=1)),
        "is none of the model's as it is now",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused(saved, case) -> None:
    build, message = MISFITS[case]
    run = build()
    before = content(run)
    with pytest.raises(CheckpointError, match=message):
        gwt_dist.load(saved, *run)
    assert same(before, content(run))


def test_groups_that_were_apart_are_not_joined(tmp_path) -> None:
    run = built(0)
    half = list(run[0].parameters())[:3]
    apart = [{"params": half, "lr": 0.5}, {"params": [p for p in run[0].parameters() if p.requires_grad][3:]}]
    gwt_dist.save(tmp_path, run[0], GWTAdamW(apart, level=0), step=0)
    with pytest.raises(CheckpointError, match=r"had lr of their own in .*, and here they are in one parameter group"):
        gwt_dist.load(tmp_path, *built(0))


# --- memory


def test_memory_of_save_and_load(tmp_path, monkeypatch) -> None:
    """No more than a chunk beside the state itself, counted by the allocations of torch and of Python."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 18)
    model = nn.Linear(512, 4096, bias=False)
    optimizer = GWTAdamW(model.parameters(), level=1, recipe="energy")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = 4096 * 512 * (4 + 2 * 2)  # weights, and both moments of half their length
    saving = peak(lambda: gwt_dist.save(tmp_path, model, optimizer, step=1))
    again = nn.Linear(512, 4096, bias=False)
    other = GWTAdamW(again.parameters(), level=1, recipe="energy")
    loading = peak(lambda: gwt_dist.load(tmp_path, again, other))
    moments = state // 2
    assert saving <= 0.1 * state
    assert moments <= loading <= moments + 0.1 * state  # the weights were there before
    assert same(content((model, optimizer)), content((again, other)))


def peak(what: Callable[[], Any]) -> int:
    """Most bytes held at once beyond those before: of Python objects and of CPU tensors."""
    held, most = 0, 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tracemalloc.start()
        what()
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most + python

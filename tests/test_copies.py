"""Copies and pickles of optimizers: they step alike, or refuse to step until they are attached."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gwt_dist
from copies_cases import (
    COPIES,
    Named,
    copy_before_attach_case,
    copy_of_attached_case,
    copy_of_fsdp2_case,
    shallow_copy_case,
)
from gwt_dist import GWTAdamW
from roads_cases import (
    AFTER,
    BEFORE,
    alone,
    net,
    off,
    train,
    whole,
)

WAY_OUT = "gwt_dist.save and gwt_dist.load"


ATTACHED = [("fsdp1", "deepcopy", 0), ("fsdp1", "torch.save", 2), ("fsdp1 flat", "pickle", 1)]
UNDER_ZERO = [
    ("zero1 bf16", "deepcopy", 1),
    ("zero2", "deepcopy", 0),
    ("zero2", "pickle", 1),
    ("zero3", "deepcopy", 0),
    ("zero3", "torch.save", 1),
]


@pytest.mark.support("FSDP1", "copies and pickles of an attached optimizer", outcome="refused")
@pytest.mark.parametrize(("kind", "how", "steps"), ATTACHED)
def test_a_copy_of_an_attached_optimizer_does_nothing(ranks, tmp_path, kind, how, steps) -> None:
    _of_copies(ranks(2, copy_of_attached_case, str(tmp_path), kind, how, steps))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.support("DeepSpeed", "copies and pickles of an attached optimizer", outcome="refused")
@pytest.mark.parametrize(("kind", "how", "steps"), UNDER_ZERO)
def test_a_copy_of_an_optimizer_under_zero_does_nothing(ranks, tmp_path, kind, how, steps) -> None:
    _of_copies(ranks(2, copy_of_attached_case, str(tmp_path), kind, how, steps))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.parametrize(("stage", "steps"), [(2, 0), (2, 2), (3, 2)])
def test_a_copy_of_the_very_parameters_goes_on_when_it_is_attached(ranks, stage, steps) -> None:
    for message, error in ranks(2, shallow_copy_case, stage, steps):
        assert "Call gwt_dist.attach(optimizer, engine)" in message
        assert error < 1e-6


def _of_copies(results: list[dict[str, str]]) -> None:
    for found in results:
        for message in found.values():
            assert "this optimizer was copied or unpickled from one that was attached" in message, found


def test_a_copy_made_before_attach_is_refused(ranks) -> None:
    for kind in ("fsdp1", "fsdp1 flat"):
        for message in ranks(2, copy_before_attach_case, kind):
            assert "was copied or unpickled" in message


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_copy_made_before_attach_under_zero_is_refused(ranks, kind) -> None:
    for message in ranks(2, copy_before_attach_case, kind):
        assert "is a flat buffer of 90 elements" in message


@pytest.mark.support("FSDP2", "copies and pickles")
@pytest.mark.parametrize(("how", "steps"), [("deepcopy", 2), ("pickle", 0), ("torch.save", 2)])
def test_copies_of_dtensors_step_alike(ranks, how, steps) -> None:
    assert max(ranks(2, copy_of_fsdp2_case, how, steps)) == 0.0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_one_process_step_alike(how: str, fused: bool) -> None:
    """Of model and optimizer together; the copy of a fused one is stepped by `step`."""
    model = net()
    optimizer = Named(model.parameters(), lr=0.01, level=2, recipe="paper", betas=(0.8, 0.9))
    if fused:
        gwt_dist.fuse_backward(optimizer, model)
    train((model, optimizer), 0, BEFORE)
    twin = COPIES[how]({"model": model, "optimizer": optimizer})
    assert type(twin["optimizer"]) is Named
    assert twin["optimizer"].defaults == {**optimizer.defaults, "differentiable": False}  # torch's own, of any copy
    for one in ((model, optimizer), (twin["model"], twin["optimizer"])):
        train(one, BEFORE, BEFORE + AFTER)
    assert off(whole(twin["model"]), whole(model)) == 0.0
    assert {float(s["step"]) for s in twin["optimizer"].state.values()} == {5.0}


def test_pickles_from_before_they_said_what_was_given() -> None:
    """Whole tensors go on; what may be a flat buffer waits for its engine."""
    model, optimizer = alone()
    train((model, optimizer), 0, 1)
    old = optimizer.__getstate__()
    del old["_given"], old["_attached"]
    again = GWTAdamW.__new__(GWTAdamW)
    again.__setstate__(old)
    model(torch.ones(2, 8)).square().mean().backward()
    again.step()
    assert {float(s["step"]) for s in again.state.values()} == {2.0}
    flat = nn.Parameter(torch.zeros(20))
    flat.grad = torch.ones(20)
    moments = {"step": torch.ones(()), "exp_avg": torch.zeros(9), "limited_norm": torch.zeros(2)}
    for state, message in (({}, "flat buffer of 20"), ({flat: moments}, "was copied or unpickled")):
        again = GWTAdamW.__new__(GWTAdamW)
        again.__setstate__({**old, "state": state, "param_groups": [{**old["param_groups"][0], "params": [flat]}]})
        with pytest.raises(ValueError, match=message):
            again.step()

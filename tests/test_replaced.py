"""Optimizers that hold parameters which an engine replaced would move nothing: refused at the first step."""

from __future__ import annotations

import pytest

from replaced_cases import (
    exchanged_case,
    legitimate_case,
    replaced_case,
)

WAY_OUT = "gwt_dist.save and gwt_dist.load"


BUILT = "were replaced by fully_shard after the optimizer was built"
REPLACED = {
    "before fully_shard": f"6 of 6 parameters of the optimizer, the first of shape (8, 8), {BUILT}",
    "one block before fully_shard": f"2 of 6 parameters of the optimizer, the first of shape (8, 8), {BUILT}",
    "after a forward pass": "are whole tensors that FSDP2 gathered for a forward pass",
    "fully_shard after steps": BUILT,
    "swapped groups": "has state of 6 parameters that it does not hold any more",
    "fsdp1 after steps": "already has optimizer state; attach before the first step",
    "before fsdp1": "have no gradient and are in no module any more",
    "a block before fsdp1": "2 parameters of the optimizer have no gradient and are in no module any more",
    "fsdp1 half wrapped": "does not hold the flat parameter of '4.weight' but parameters of the shapes of its tensors",
}


@pytest.mark.support("FSDP2", "an optimizer built before `fully_shard`, after a forward pass", outcome="refused")
@pytest.mark.support("FSDP2", "`fully_shard` on the model of an optimizer that has state", outcome="refused")
@pytest.mark.parametrize("what", REPLACED)
def test_parameters_that_were_replaced_are_refused(ranks, what) -> None:
    for message in ranks(2, replaced_case, what):
        assert REPLACED[what] in message
        assert "uild" in message or WAY_OUT.split(" and ")[0] in message


@pytest.mark.support("FSDP2", "`to_empty` after the optimizer was built")
def test_torch_may_exchange_the_parameters_of_an_optimizer(ranks) -> None:
    """It does so with DTensors, and refuses tensors that have weak references."""
    assert max(ranks(2, exchanged_case)) < 1e-6


def test_what_only_looks_like_it_is_stepped(ranks) -> None:
    for messages in ranks(2, legitimate_case):
        assert messages == ["no error"]


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.support("DeepSpeed", "an optimizer that has state", outcome="refused")
@pytest.mark.parametrize(
    ("what", "message"),
    [("initialize", "has state already, 6 parameters of it"), ("deepspeed.initialize", "has state of 6 parameters")],
)
def test_an_optimizer_that_has_state_is_not_given_to_an_engine(ranks, what, message) -> None:
    for found in ranks(2, replaced_case, what):
        assert message in found and "save it with gwt_dist.save" in found

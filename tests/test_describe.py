"""The table of what got which level."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from describe_cases import alone, described_case
from gwt_dist import GWTAdamW, describe, param_groups
from gwt_dist.description import VECTORS, Row

TABLE = """\
level  update      tensors  elements    share    state  shape  name
    2  orthogonal        2       128   28.57%    144 B  8x8    layers.*.*.weight
    2  orthogonal        2       192   42.86%    208 B  12x8   layers.*.*.weight
    0  AdamW             1        80   17.86%    648 B  10x8   embed.weight
    0  AdamW             6        48   10.71%    432 B         vectors and scalars
  all                   11       448  100.00%  1.4 KiB         (71.43% not as AdamW)
1.4 KiB of state on all ranks together, where AdamW in fp32 has 3.5 KiB."""


def model() -> nn.Module:
    net = nn.Module()
    net.embed = nn.Embedding(10, 8)
    net.layers = nn.ModuleList(
        [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 12, bias=False)) for _ in "ab"]
    )
    return net


def test_the_table() -> None:
    net = model()
    optimizer = GWTAdamW(param_groups(net, level=2, recipe="orthogonal"))
    assert str(describe(optimizer, net)) == TABLE


def test_bytes_are_those_of_the_state() -> None:
    net = model()
    optimizer = GWTAdamW(param_groups(net, level=1, recipe="energy", state_dtype="int8"), weight_decay=0.1)
    before = describe(optimizer, net)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = describe(optimizer)
    held = sum(its.nbytes for state in optimizer.state.values() for its in state.values())
    assert (before.held, before.bytes, after.held, after.bytes) == (0, held, held, held)
    assert f"This rank has {held / 1024:.1f} KiB of state." in str(after)
    assert before.elements == sum(p.numel() for p in net.parameters()) and before.share() == (2 * 64 + 2 * 96) / 448


def test_names_that_nobody_knows_are_shapes() -> None:
    net = model()
    optimizer = GWTAdamW(param_groups(net, level=1, recipe="energy"))
    rows = describe(optimizer).rows
    assert [(row.name, row.shape) for row in rows] == [("", (8, 8)), ("", (12, 8)), ("", (10, 8)), (VECTORS, ())]
    named = GWTAdamW([{"params": list(net.layers.named_parameters()), "level": 0}])
    found = describe(named).rows
    assert found[0] == Row("*.*.weight", (8, 8), 0, 0, "AdamW", 2, 128, 2 * (8 * 64 + 8))


def test_what_is_around_an_optimizer_and_what_is_none() -> None:
    net = model()
    optimizer = GWTAdamW(net.parameters(), level=0)
    assert describe(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))) == describe(optimizer)
    with pytest.raises(ValueError, match="AdamW is no GWTAdamW, nor around one"):
        describe(torch.optim.AdamW(net.parameters()))
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(500))]  # as ZeRO does
    with pytest.raises(ValueError, match=r"a flat parameter of 500 elements .* Call gwt_dist.attach"):
        describe(optimizer)


def test_a_stack_is_one_tensor_of_many_matrices() -> None:
    stack = nn.Parameter(torch.ones(4, 6, 10))
    optimizer = GWTAdamW([{"params": [stack], "level": 1, "stacked": True, "recipe": "paper"}])
    stack.grad = torch.ones_like(stack)
    optimizer.step()
    found = describe(optimizer)
    assert [(row.shape, row.level, row.update, row.tensors) for row in found.rows] == [((4, 6, 10), 1, "paper", 1)]
    assert found.bytes == found.held == sum(its.nbytes for its in optimizer.state[stack].values())
    assert "  4 of 6x10" in str(found)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp1", "fsdp2"])
def test_engines_change_nothing_of_it(ranks, engine: str) -> None:
    """On each of two ranks: whole tensors, by the names of the model where the engine knows them."""
    expected = alone()
    for found, bare, refused in ranks(2, described_case, engine):
        assert found == expected
        assert ("encoder.layers.*.linear1.weight" in bare) is (engine in ("zero2", "fsdp1"))
        assert ("gwt_dist.describe(engine.optimizer)" in bare) is (engine == "zero3")
        assert ("Call gwt_dist.attach(optimizer, engine) first" in refused) is (engine != "fsdp2")

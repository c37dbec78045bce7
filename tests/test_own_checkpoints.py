"""The checkpoints of the engines themselves: right at the layout that they are made for, and loud beyond it."""

from __future__ import annotations

import pytest

from own_checkpoint_cases import dcp_case, fake_step_case, other_world_case, universal_case, weights_only_case


@pytest.mark.support("FSDP2", "torch.distributed.checkpoint, 2 to 4 to 1 ranks, and its step on a fresh optimizer")
def test_distributed_checkpoint_from_2_to_4_to_1_ranks(ranks, tmp_path) -> None:
    folder = str(tmp_path)
    ranks(2, dcp_case, folder, "", "two", 0, 2)
    ranks(4, dcp_case, folder, "two", "four", 2, 3)
    assert ranks(1, dcp_case, folder, "four", "", 3, 5)[0] < 1e-12


@pytest.mark.support("FSDP2", "torch.distributed.checkpoint, 2 to 4 to 1 ranks, and its step on a fresh optimizer")
def test_the_step_that_torch_takes_on_a_fresh_optimizer(ranks) -> None:
    """It moves nothing and remembers nothing but that it was a step, as with AdamW; loading puts that right."""
    for result in ranks(2, fake_step_case):
        assert result == {"moved": [], "largest": 0.0, "steps": {1.0}, "lr": [0.01]}


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp1 flat"])
def test_the_state_loads_with_weights_only(ranks, tmp_path, kind) -> None:
    for kinds in ranks(2, weights_only_case, str(tmp_path), kind):
        assert kinds == ["NoneType", "Tensor", "bool", "float", "int", "list", "str", "tuple"]


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.support("DeepSpeed", "its checkpoint on another number of ranks, by DeepSpeed", outcome="refused")
@pytest.mark.parametrize(
    ("stage", "message"),
    [(1, "used a DP world size of 2 but"), (2, "used a DP world size of 2 but"), (3, "The size of tensor a")],
)
def test_deepspeed_refuses_another_number_of_ranks(ranks, tmp_path, stage, message) -> None:
    ranks(2, other_world_case, str(tmp_path), stage, True)
    assert message in ranks(1, other_world_case, str(tmp_path), stage, False)[0]


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.support("DeepSpeed", "conversion to a universal checkpoint, by DeepSpeed", outcome="refused")
@pytest.mark.parametrize(
    ("stage", "inject", "message"),
    [
        (2, False, "Required universal_checkpoint_info state is missing"),
        (2, True, "exceeds dimension size"),
        (3, False, "exceeds dimension size"),
    ],
)
def test_deepspeed_cannot_convert_to_a_universal_checkpoint(ranks, tmp_path, stage, inject, message) -> None:
    """Its moments are smaller than the weights that it cuts them by, so it fails; loading one is refused at set-up."""
    assert message in ranks(2, universal_case, str(tmp_path), stage, inject)[0]

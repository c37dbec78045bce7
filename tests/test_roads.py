"""Every road of the state beside `gwt_dist.save` and `load`: exact, or refused with the way out."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

import gwt_dist
from gwt_dist import GWTAdamW
from roads_cases import (
    AFTER,
    BEFORE,
    aligned_columns_case,
    alone,
    another_meaning_case,
    between_layouts_case,
    by_name_case,
    dtensors_of_rank_0_case,
    flat_and_whole_case,
    full_state_case,
    full_state_of_case,
    fused_by_hand_case,
    fused_dcp_case,
    net,
    of_rank_0_case,
    off,
    optimizer_of,
    other_mesh_case,
    some_ranks_dcp_case,
    torchs_roads_case,
    train,
    whole,
    without_shards_case,
)

WAY_OUT = "gwt_dist.save and gwt_dist.load"


# ---------------------------------------------------------------------------------------------------------- meaning

MEANINGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"recipe": "energy"}, {"recipe": "paper"}, "second_moment='energy' (recipe 'energy')"),
    ({"recipe": "paper"}, {"recipe": "energy"}, "second_moment='approximation' (recipe 'paper')"),
    ({"recipe": "energy"}, {"recipe": "foam"}, "formula='adam_energy, weighed' (recipe 'energy')"),
    ({"recipe": "foam"}, {"recipe": "energy"}, "detail_gain=0.0 (recipe 'foam')"),
    ({"recipe": "energy"}, {"recipe": "energy", "limiter": 1.5}, "limiter=0.0 (recipe 'energy')"),
    ({"recipe": "energy", "limiter": 1.5}, {"recipe": "energy"}, "limiter=1.5 (recipe 'energy')"),
    ({"recipe": "energy", "limiter": 1.5}, {"recipe": "energy", "limiter": 1.2}, "limiter=1.5 (recipe 'energy')"),
    ({"recipe": "energy"}, {"recipe": "energy", "detail_gain": 0.5}, "detail_gain='coherence' (recipe 'energy')"),
    ({"recipe": "orthogonal"}, {"recipe": "orthogonal", "detail_gain": 0.5}, "detail_gain=1.0"),
]


@pytest.mark.parametrize(("then", "now", "message"), MEANINGS, ids=str)
@pytest.mark.parametrize("stepped", [False, True])
def test_moments_of_another_meaning_are_refused(then, now, message, stepped, tmp_path) -> None:
    """Also by an optimizer that has no state yet, which would have become the other in silence; as `load` refuses."""
    first, second = alone(**then), alone(**now)
    train(first, 0, 2)
    if stepped:
        train(second, 0, 1)
    before = pickle.dumps(second[1].state_dict())
    with pytest.raises(ValueError, match=re.escape(f"parameter group 0 was trained with {message}")) as raised:
        second[1].load_state_dict(first[1].state_dict())
    assert pickle.dumps(second[1].state_dict()) == before
    gwt_dist.save(tmp_path, *first, step=2)
    with pytest.raises(ValueError) as by_load:
        gwt_dist.load(tmp_path, *second)
    told = [re.sub("'0.weight'|parameter group 0", "it", str(e.value)) for e in (raised, by_load)]
    assert told[0] == told[1].replace(str(tmp_path / "step-00000002"), "the state to load")


def test_the_same_meaning_said_in_another_way_is_taken() -> None:
    spelled = {"recipe": "energy", "second_moment": "approximation", "detail_gain": 1.0, "limiter": 1.01}
    first, second = alone(recipe="paper"), alone(**spelled)
    train(first, 0, BEFORE)
    second[1].load_state_dict(first[1].state_dict())
    second[0].load_state_dict(first[0].state_dict())
    for one in (first, second):
        train(one, BEFORE, BEFORE + AFTER)
    assert off(whole(second[0]), whole(first[0])) == 0.0


def test_recipes_of_tensors_without_a_level_mean_the_same() -> None:
    first, second = alone(recipe="paper", level=0), alone(recipe="energy", level=0)
    first[1].param_groups[0]["second_moment"] = None
    train(first, 0, 1)
    with pytest.raises(ValueError, match="second_moment"):  # level 0 has the second moment that its group names
        GWTAdamW(second[0].parameters(), level=1, second_moment="all")
    vectors = [GWTAdamW([nn.Parameter(torch.ones(5))], recipe=r, level=2) for r in ("paper", "energy")]
    vectors[0].param_groups[0]["params"][0].grad = torch.ones(5)
    vectors[0].step()
    vectors[1].load_state_dict(vectors[0].state_dict())


def test_values_and_recipes_that_nobody_knows_are_refused_before_anything_changes() -> None:
    first, second = alone(), alone()
    train(first, 0, 1)
    for key, value, message in (
        ("recipe", "fine", "recipe='fine' in parameter group 0 of the state to load must be one of"),
        ("lr", -1.0, "lr=-1.0 in parameter group 0 of the state to load must be"),
        ("betas", (0.9, 1.0), "betas="),
    ):
        told = copy.deepcopy(first[1].state_dict())
        told["param_groups"][0][key] = value
        with pytest.raises(ValueError, match=message):
            second[1].load_state_dict(told)
    for step in (float("nan"), -1, torch.ones(2)):
        told = copy.deepcopy(first[1].state_dict())
        told["state"][3]["step"] = step
        with pytest.raises(ValueError, match=r"step of a parameter in group 0 is .*: no count"):
            second[1].load_state_dict(told)
    assert not second[1].state and second[1].param_groups[0]["lr"] == 0.01


@pytest.mark.support("FSDP2", "state of another recipe or limiter, by torch's roads", outcome="refused")
@pytest.mark.support("FSDP1", "state of another recipe or limiter, by torch's roads", outcome="refused")
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_another_meaning_under_an_engine(ranks, kind, tmp_path) -> None:
    for found in ranks(2, another_meaning_case, kind, str(tmp_path)):
        assert all("was trained with limiter=1.01 (recipe 'paper')" in message for message in found.values()), found


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.support("DeepSpeed", "`load_checkpoint` of another recipe or limiter", outcome="refused")
@pytest.mark.parametrize("kind", ["zero0 bf16", "zero1 bf16", "zero2", "zero3"])
def test_another_meaning_under_deepspeed(ranks, kind, tmp_path) -> None:
    for found in ranks(2, another_meaning_case, kind, str(tmp_path)):
        assert "was trained with limiter=1.01 (recipe 'paper')" in found["load_checkpoint"]


# ------------------------------------------------------------------------------------------------------------ layout


@pytest.mark.support("FSDP2", "`load_state_dict` of whole tensors, and of DTensors elsewhere", outcome="refused")
def test_state_of_another_layout_is_refused(ranks) -> None:
    for found in ranks(2, between_layouts_case, "energy"):
        for what in ("plain to DTensor", "plain to fresh DTensor"):
            assert "exp_avg of a parameter in group 0 is a tensor of its own on each rank" in found[what]
            assert "full_state_dict=True" in found[what] and WAY_OUT in found[what]
        assert "is a DTensor with placements (Shard(dim=0),)" in found["DTensor to plain"]
        assert not found["changed"] and not found["left"]
    for found in ranks(2, other_mesh_case):
        assert "on the ranks [1, 0], the part at" in found["mesh"]
        assert "placements (Replicate(),)" in found["placement"]


@pytest.mark.support("FSDP2", "DTensors that rank 0 saved, read by all", outcome="refused")
def test_the_dtensors_of_rank_0_are_no_other_rank_s(ranks) -> None:
    results = ranks(2, dtensors_of_rank_0_case)
    assert results[0] == ["no error", "no error"]
    own, of_rank_0 = results[1]
    assert own == "no error"
    assert "on the ranks [0, 1], the part at (0,) in the state to load" in of_rank_0 and "the part at (1,)" in of_rank_0


def test_rows_are_no_columns(ranks) -> None:
    for message in ranks(2, aligned_columns_case):
        assert (
            "placements (Shard(dim=0),)" in message and "needs to be a DTensor with placements (Shard(dim=1)" in message
        )


@pytest.mark.support("FSDP1", "`load_state_dict` of whole tensors", outcome="refused")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_whole_tensors_are_no_flat_buffers(ranks, use_orig_params) -> None:
    for found in ranks(2, flat_and_whole_case, use_orig_params):
        assert WAY_OUT in found["to flat"]
        assert WAY_OUT in found["to whole"] or "parameter group that doesn't match the size" in found["to whole"]


@pytest.mark.support("FSDP2", "state of one process by `set_optimizer_state_dict(full_state_dict=True)`")
@pytest.mark.parametrize("broadcast", [False, True])
def test_the_way_out_that_the_message_names(ranks, broadcast) -> None:
    assert max(ranks(2, full_state_case, broadcast)) < 1e-6


@pytest.mark.support("FSDP1", "the state of another rank", outcome="refused")
def test_the_state_of_rank_0_is_no_other_rank_s(ranks) -> None:
    _of_rank_0(ranks(2, of_rank_0_case, "fsdp1 flat"))


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.support("DeepSpeed", "the state of another rank", outcome="refused")
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_the_state_of_rank_0_is_no_other_rank_s_under_deepspeed(ranks, kind) -> None:
    _of_rank_0(ranks(2, of_rank_0_case, kind))


def _of_rank_0(results: list[list[str]]) -> None:
    assert results[0] == ["no error", "no error"]
    own, of_rank_0 = results[1]
    assert own == "no error"
    assert "is of other elements than this rank holds" in of_rank_0 and WAY_OUT in of_rank_0


@pytest.mark.support("FSDP1", "torch's functions that gather or cut its state", outcome="refused")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_torch_s_functions_for_the_state_of_fsdp1_are_refused(ranks, use_orig_params) -> None:
    for found in ranks(2, torchs_roads_case, use_orig_params):
        for what in ("optim_state_dict", "full_optim_state_dict", "sharded_optim_state_dict"):
            assert f"{what} of torch gathers the state of flat parameters" in found[what]
        assert "gathers the state of flat parameters" in found["get_optimizer_state_dict"]
        for what in ("set_optimizer_state_dict", "optim_state_dict_to_load"):
            # What torch cuts is refused by the optimizer; a whole unit in one parameter torch does not cut itself.
            by_torch = "must have scalar state with the same value", "state does not have same shape as its parameter"
            assert WAY_OUT in found[what] or any(message in found[what] for message in by_torch)


@pytest.mark.support("FSDP1", "torch's functions for its state under NO_SHARD, `use_orig_params`")
def test_they_are_exact_where_tensors_are_whole(ranks) -> None:
    assert max(ranks(2, without_shards_case)) < 1e-6


# -------------------------------------------------------------------------------------------------- fuse_backward, DCP


@pytest.mark.support("FSDP2", "`fuse_backward` through torch.distributed.checkpoint")
@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_optimizer_goes_through_distributed_checkpoints(ranks, fused, tmp_path) -> None:
    assert max(ranks(2, fused_dcp_case, str(tmp_path), fused, "fsdp2")) < 1e-6


def test_a_fused_optimizer_of_one_process_does_too(ranks, tmp_path) -> None:
    assert max(ranks(1, fused_dcp_case, str(tmp_path), True, "one")) == 0.0


@pytest.mark.support("FSDP2", "torch.distributed.checkpoint of what some ranks alone keep, 5 to 2 to 1 ranks")
@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "came", "level": 1},  # of 4 rows some ranks of 5 have none, so they have no columns
        {"recipe": "low-rank", "level": 0, "rank": 2, "update_proj_gap": 2, "residual": True},
    ],
    ids=["columns", "owners"],
)
def test_what_some_ranks_keep_goes_through_distributed_checkpoints(ranks, options, tmp_path) -> None:
    ranks(5, some_ranks_dcp_case, str(tmp_path), options, True)
    for world_size in (2, 1):
        assert max(ranks(world_size, some_ranks_dcp_case, str(tmp_path), options, False)) < 1e-5


@pytest.mark.support("FSDP2", "`fuse_backward` and gradients set by hand")
@pytest.mark.support("FSDP1", "`fuse_backward` and gradients set by hand")
@pytest.mark.parametrize(("world_size", "kind"), [(1, "one"), (2, "fsdp2"), (2, "fsdp1")])
def test_gradients_set_by_hand_are_stepped_by_a_fused_optimizer(ranks, world_size, kind) -> None:
    for found in ranks(world_size, fused_by_hand_case, kind):
        assert found == {"differ": 0.0, "steps": 4.0}


# ------------------------------------------------------------------------------------------------------ state by name


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.support("DeepSpeed", "`deepspeed.utils.safe_get_full_optimizer_state` and its like", outcome="refused")
@pytest.mark.support("DeepSpeed", "`gwt_dist.full_state`, `safe_get_full_fp32_param`, `safe_get_full_grad`")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("zero1", {}), ("zero2", {"level": 0}), ("zero2", {}), ("zero3", {})),
        # Of which one rank keeps several in a buffer.
        ("zero3", {"recipe": "low-rank", "level": 0, "rank": 2, "residual": True}),
    ],
    ids=str,
)
def test_states_by_name_under_deepspeed(ranks, kind, options) -> None:
    for found in ranks(2, by_name_case, kind, options):
        assert {found["weights"], found["gradients"]} == {0.0}
        assert found["states"] < 1e-6
        assert len(found["messages"]) == 3
        assert all(re.search("DeepSpeed cuts .* gwt_dist.full_state", message) for message in found["messages"])


@pytest.mark.support("FSDP2", "`gwt_dist.full_state`")
@pytest.mark.support("FSDP1", "`gwt_dist.full_state`")
@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("ddp", "paper"),
        ("fsdp2", "orthogonal"),
        ("fsdp1", "energy"),
        ("fsdp1 flat", "orthogonal"),
    ],
)
def test_states_by_name(ranks, kind, recipe) -> None:
    for found in ranks(3, full_state_of_case, kind, recipe):
        assert found["empty"] == {}
        assert found["differ"] < 1e-5
        assert "steps no tensor '2.wieght' of this model; did you mean '2.weight'?" in found["unknown"]


def test_a_state_by_name_is_a_copy() -> None:
    model, optimizer = alone()
    train((model, optimizer), 0, 1)
    state = gwt_dist.full_state(model, optimizer, "0.weight")
    state["exp_avg"].zero_()
    assert optimizer.state[model[0].weight]["exp_avg"].any()
    assert optimizer_of(net()).state == {}

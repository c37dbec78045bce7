"""`fuse_backward`: the update of `step()`, bit for bit, with the gradients of one group at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fuse_cases import LAYERS, STEPS, fairscale_case, fsdp1_case, fuse_case, refused_case, trained

RECIPES = ["paper", "energy", "orthogonal"]
IN_BYTES = "energy in int8"  # whose vectors have cut cells, so that a step completes them


@pytest.mark.support("FSDP2", "`fuse_backward`, accumulation 1 and 4")
@pytest.mark.parametrize("recipe", [*RECIPES, IN_BYTES, "came", "adalomo", "low-rank", "critical"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_it_is_step_with_one_group_of_gradients_at_a_time(ranks, accumulation, recipe) -> None:
    for result in ranks(2, fuse_case, recipe, accumulation):
        assert result["moved"]
        assert result["equal"] and result["states"]
        if accumulation == 1:
            assert result["groups"] == (LAYERS, 1)
        plain, fused = result["collectives"]
        sums = {"paper": 1, IN_BYTES: 1, "critical": 1, "came": 2, "adalomo": 2}.get(recipe, 0)
        assert plain == [sums] * STEPS
        assert fused == [LAYERS * sums] * STEPS


@pytest.mark.parametrize("recipe", [*RECIPES, IN_BYTES])
def test_on_more_ranks_it_differs_by_the_order_of_the_norm_at_most(ranks, recipe) -> None:
    """With three ranks and more a collective's order of summation depends on the length of its buffer."""
    for result in ranks(3, fuse_case, recipe, 1):
        assert result["equal"] if recipe.startswith("energy") else result["difference"] < 1e-6
        assert result["groups"] == (LAYERS, 1)


@pytest.mark.parametrize("recipe", [*RECIPES, IN_BYTES])
def test_in_one_process_it_frees_each_gradient_at_once(recipe: str) -> None:
    plain, _, most, _ = trained(False, recipe, 1)
    fused, _, most_fused, _ = trained(True, recipe, 1)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (most, most_fused) == (LAYERS, 1)


FSDP1_ROW = "`fuse_backward` with CPU offload or another hook"
TWICE_ROW = "`fuse_backward`: a second gradient before `step()`, a step on accumulated ones"
REFUSED = {
    "ddp": ("DDP", "`fuse_backward`", "sees the gradient of this rank before it is averaged"),
    "swapped": ("FSDP2", "`fuse_backward` before `fully_shard`", "build the optimizer after fully_shard"),
    "scaler": ("FSDP2", "`fuse_backward` with a GradScaler", "a GradScaler drives an optimizer whose update was fused"),
    "twice": ("FSDP2", TWICE_ROW, "a second gradient since the last step() for 3 parameters"),
    "accumulated": ("FSDP2", TWICE_ROW, "have gradients that were only accumulated: this step would leave them out"),
    "fsdp1 offload": ("FSDP1", FSDP1_ROW, "keeps its weights on CPU (cpu_offload)"),
    "fsdp1 hook": ("FSDP1", FSDP1_ROW, "has a communication hook already"),
    "fsdp1 alone": ("FSDP1", "a forgotten `attach`", "Call gwt_dist.attach(optimizer, model) first"),
    "fsdp1 twice": ("FSDP1", TWICE_ROW, "a second gradient since the last step() for 3 parameters"),
    "fsdp1 reentrant": ("FSDP1", TWICE_ROW, "a second gradient since the last step() for 3 parameters"),
    "fsdp1 accumulated": ("FSDP1", TWICE_ROW, "have gradients that were only accumulated: this step would leave"),
}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        pytest.param(what, message, marks=pytest.mark.support(engine, feature, outcome="refused"), id=what)
        for what, (engine, feature, message) in REFUSED.items()
    ],
)
def test_where_it_cannot_be_right_it_refuses(ranks, what, message) -> None:
    for found in ranks(2, refused_case, what):
        assert message in found


@pytest.mark.support("FSDP1", "`fuse_backward`, FULL_SHARD and SHARD_GRAD_OP, accumulation 1 and 4")
@pytest.mark.parametrize(
    ("strategy", "use_orig_params", "accumulation", "recipe"),
    [
        *product(["FULL_SHARD", "SHARD_GRAD_OP"], [True, False], [1, 4], ["paper", "energy"]),
        ("FULL_SHARD", False, 4, "orthogonal"),
        ("FULL_SHARD", True, 4, IN_BYTES),
        ("SHARD_GRAD_OP", False, 1, IN_BYTES),
    ],
)
def test_under_fsdp1_it_is_step_with_one_shard_at_a_time(
    ranks, strategy, use_orig_params, accumulation, recipe
) -> None:
    for result in ranks(2, fsdp1_case, strategy, use_orig_params, recipe, accumulation):
        assert result["moved"]
        assert result["equal"] and result["states"]
        if accumulation == 1:
            assert result["most"] == (LAYERS, 1)
        plain, fused = result["collectives"]
        assert max(plain) <= 1 + (recipe != "energy")
        assert max(fused) <= LAYERS * (1 + (recipe != "energy"))


@pytest.mark.support("FSDP1", "`fuse_backward`, HYBRID_SHARD, bf16 mixed precision, accumulation with `no_sync`")
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize(
    ("world_size", "strategy", "accumulation", "what"),
    [
        (4, "HYBRID_SHARD", 2, ""),
        (2, "FULL_SHARD", 2, "bf16"),
        (2, "SHARD_GRAD_OP", 2, "no_sync"),
        (2, "FULL_SHARD", 2, "reentrant"),
    ],
)
def test_under_fsdp1_further_settings(ranks, world_size, strategy, accumulation, what, use_orig_params) -> None:
    for result in ranks(world_size, fsdp1_case, strategy, use_orig_params, "paper", accumulation, what):
        assert result["moved"]
        assert result["equal"] and result["states"]


@pytest.mark.support("FSDP1", "`fuse_backward` where nothing is cut: one rank, NO_SHARD")
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize(
    ("world_size", "strategy"), [(1, "FULL_SHARD"), (1, "SHARD_GRAD_OP"), (1, "HYBRID_SHARD"), (2, "NO_SHARD")]
)
def test_under_fsdp1_where_nothing_is_cut(ranks, world_size, strategy, use_orig_params) -> None:
    """FSDP1 gives the hook no shard then, and the gradient accumulates in place."""
    for recipe, accumulation, what in (
        ("energy", 1, ""),
        ("paper", 4, ""),
        ("orthogonal", 1, ""),
        ("energy", 2, "bf16"),
        ("paper", 2, "no_sync"),
        ("energy", 2, "reentrant"),
    ):
        for result in ranks(world_size, fsdp1_case, strategy, use_orig_params, recipe, accumulation, what):
            assert result["moved"], (recipe, what)
            assert result["equal"] and result["states"], (recipe, what)
            assert accumulation > 1 or result["most"] == (LAYERS, 1), recipe
            assert result["collectives"] == ([0] * STEPS, [0] * STEPS), (recipe, what)


@pytest.mark.support("FSDP2", "`fuse_backward` on one rank")
@pytest.mark.parametrize("recipe", RECIPES)
def test_under_fsdp2_on_one_rank(ranks, recipe) -> None:
    for accumulation in (1, 4):
        (result,) = ranks(1, fuse_case, recipe, accumulation)
        assert result["moved"]
        assert result["equal"] and result["states"]
        assert accumulation > 1 or result["groups"] == (LAYERS, 1)


@pytest.mark.matrix
@pytest.mark.parametrize("flatten", [True, False])
def test_under_fairscale_on_one_rank(ranks, flatten) -> None:
    """On more it is refused, as any parameter that is no DTensor."""
    for recipe in RECIPES:
        (result,) = ranks(1, fairscale_case, flatten, recipe)
        assert result["moved"] and result["equal"], recipe

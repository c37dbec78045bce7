"""The shards of fairscale's FullyShardedDataParallel on real ranks, in float64.

fairscale asks for CUDA streams whatever the device is; `fairscale_cases` lends it some that do nothing, so that its own
flattening, chunks, gathering and reduce-scatter run on CPU.
"""

from __future__ import annotations

import re

import pytest

from fairscale_cases import accumulation_case, own_state_case, refused_case, sharded_case
from zero_cases import Net, shapes_of

pytestmark = pytest.mark.matrix

KINDS = ["flat", "modules", "tensors"]


@pytest.mark.support(
    "fairscale", "FullyShardedDataParallel, `flatten_parameters` True and False, with a shim", outcome="not on CPU"
)
@pytest.mark.parametrize(("world_size", "level", "recipe"), [(2, 1, "energy"), (4, 3, "paper")])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_read_under_its_name(ranks, kind, world_size, level, recipe) -> None:
    results = ranks(world_size, sharded_case, kind, level, recipe)
    cut = any(result["cut"] for result in results)
    for result in results:
        assert result["error"] < 1e-12
        # One for the cut units of all tensors, one for the norms of all tensors.
        assert result["collectives"] == [cut + (recipe == "paper")] * 5
    assert cut == ((kind, world_size) != ("flat", 2))  # half of the elements of Net is even
    assert results[0]["names"] == sorted(shapes_of(Net()))
    if kind == "tensors" and world_size == 4:
        assert results[3]["empty"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_continues_from_its_own_state(ranks, kind) -> None:
    for result in ranks(3, own_state_case, kind):
        assert result["same"]


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_without_synchronisation_is_one_batch(ranks, kind) -> None:
    for error in ranks(2, accumulation_case, kind, True):
        assert error < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_gradients_that_were_not_synchronised_is_refused(ranks, kind) -> None:
    for message in ranks(2, accumulation_case, kind, False):
        assert re.search(r"gradient of \d+ elements for the \d+ that this rank holds", message), message


@pytest.mark.support("fairscale", "a forgotten `attach`, with a shim", outcome="refused")
@pytest.mark.parametrize("kind", KINDS)
def test_a_forgotten_attach_is_refused(ranks, kind) -> None:
    for message in ranks(2, refused_case, kind, "forgotten"):
        assert "parameter 0 of group 0 is a flat parameter of fairscale's FullyShardedDataParallel" in message
        assert "gwt_dist.attach(optimizer, model)" in message


@pytest.mark.support("fairscale", "an optimizer built before the model is flattened", outcome="refused")
@pytest.mark.parametrize("kind", ["flat", "modules"])
def test_an_optimizer_of_the_parameters_before_flattening_is_refused(ranks, kind) -> None:
    for message in ranks(2, refused_case, kind, "built before"):
        assert "holds none of the" in message
        assert "Build it after the model is wrapped" in message


def test_tensors_that_are_not_flattened_stay_the_optimizers_own(ranks) -> None:
    assert ranks(2, refused_case, "tensors", "built before") == ["no error"] * 2


@pytest.mark.support("fairscale", "a layout that is not as recorded", outcome="refused")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("gathered", "should be a chunk of .* outside of summon_full_params"),
        ("offset", "rank 2: elements .* are not those of the model's weight"),
        ("outside", "rank 2: elements .* are not those of the model's weight"),
        ("padding", "rank 2: elements .* are not those of the model's weight"),
        ("other elements", "are held by (no rank|rank 2 and another|rank 1 and another)"),
        ("gap", "are held by no rank"),
    ],
)
def test_another_layout_on_one_rank_is_refused_by_all(ranks, kind, what, expected) -> None:
    for message in ranks(3, refused_case, kind, what):
        assert re.search(expected, message), message

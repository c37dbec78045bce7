"""Weights that are frozen, thawed or trained in turn: every engine leaves them alone as one process does, or raises."""

from __future__ import annotations

import pytest

from frozen_cases import own_checkpoint_case, resumed_case, sharded_case, zero_cases
from zero_engine_cases import ENGINES

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")

FREEZE = [(3, ""), (2, "mlp")]
IN_TURN = [(2, ""), (2, "mlp"), (1, "")]
LATE = [(2, "mlp"), (2, "")]
BUFFERS = ["2 bf16", "3 tiny sub-groups", "bf16 optimizer"]


@pytest.mark.support("DeepSpeed", "weights frozen in the middle of a run")
@pytest.mark.parametrize("engine", BUFFERS)
def test_frozen_weights_stay_where_they_are_under_zero(ranks, engine) -> None:
    """They lie in buffers with others, whose gradients are zero there: momentum and decay would go on moving them."""
    runs = [("", recipe, FREEZE, "") for recipe in ("energy", "paper", "orthogonal", "energy in int8")]
    for results in ranks(2, zero_cases, ENGINES[engine], runs):
        for error, moved, message in results:
            assert (moved, message) == (0.0, "")
            assert error < 1e-6
        assert results[-1][0] == 0.0  # of other bits, codes would be rounded to others


@pytest.mark.support("DeepSpeed", "weights frozen and thawed, in a parameter group of their own")
@pytest.mark.parametrize("engine", BUFFERS)
def test_a_group_may_be_frozen_and_thawed_under_zero(ranks, engine) -> None:
    """Its buffer takes no step meanwhile, so its count of steps is that of one process."""
    for results in ranks(2, zero_cases, ENGINES[engine], [("mlp", "paper", IN_TURN, ""), ("mlp", "energy", LATE, "")]):
        for error, moved, message in results:
            assert (moved, message) == (0.0, "")
            assert error < 1e-6


@pytest.mark.support("DeepSpeed", "weights thawed that share a buffer with others, or have none", outcome="refused")
def test_what_no_step_could_train_as_one_process_does_is_refused(ranks) -> None:
    """One count of steps for what took different ones; no place for what was frozen when the engine was built."""
    runs = [("", "energy", IN_TURN, ""), ("", "energy", LATE, "mlp")]
    for first, second in ranks(2, zero_cases, ENGINES["2"], runs):
        assert first[1] == 0.0
        assert "'mlp_" in first[2] and "was frozen for 2 steps and is to be trained again" in first[2]
        assert "a parameter of shape (16, 5461) was frozen when the engine was built" in second[2]


@pytest.mark.support("DeepSpeed", "weights frozen in the middle of a run")
@pytest.mark.parametrize("engine", ["2 bf16", "3 tiny sub-groups"])
def test_a_run_with_frozen_weights_is_saved_and_goes_on(ranks, engine, tmp_path) -> None:
    """The checkpoint has the steps that each tensor took, not those of the buffer that it shares."""
    for error, counts, message in ranks(2, resumed_case, ENGINES[engine], "paper", str(tmp_path)):
        assert error < 1e-6
        assert counts == {name: 2 if name.startswith("mlp") else 5 for name in counts}
        assert "was frozen for 3 steps and is to be trained again" in message


@pytest.mark.support("DeepSpeed", "weights frozen in the middle of a run")
@pytest.mark.parametrize("engine", BUFFERS)
def test_deepspeeds_own_checkpoint_has_the_steps_that_were_missed(ranks, engine, tmp_path) -> None:
    for error, message in ranks(2, own_checkpoint_case, ENGINES[engine], "paper", str(tmp_path)):
        assert error < 1e-6
        assert "was frozen for 2 steps and is to be trained again" in message


@pytest.mark.support("FSDP2", "weights frozen, thawed, frozen from the start")
@pytest.mark.support("FSDP1", "weights frozen, thawed, frozen from the start")
@pytest.mark.parametrize("kind", ["FSDP2", "FSDP1"])
def test_frozen_and_thawed_under_fsdp(ranks, kind) -> None:
    for results in ranks(2, sharded_case, kind, "paper", [(IN_TURN, ""), (LATE, "mlp")]):
        assert [error < 1e-6 for error in results] == [True, True], results


@pytest.mark.support("DDP", "weights frozen and thawed")
def test_frozen_and_thawed_under_ddp(ranks) -> None:
    """What was frozen when DDP was built it does not reduce later: that is torch's, and `docs/engines.md` says so."""
    for results in ranks(2, sharded_case, "DDP", "paper", [(IN_TURN, "")]):
        assert results[0] < 1e-6

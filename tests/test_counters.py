"""Counters of steps and micro-batches: restored so that a run goes on, whatever ranks and accumulation took it over."""

from __future__ import annotations

import pytest

from counter_cases import (
    counted_case,
    fused_case,
    load_case,
    middle_case,
    plain_case,
    roads_case,
    save_case,
    sharded_case,
    size_of,
)

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")

# Ranks, accumulation, sequences of a micro-batch: 6, 12 and 15 sequences a step.
SAVED = [(1, 6, 2), (2, 2, 3), (3, 2, 1), (1, 5, 3)]
LOADED = [(1, 4, 3), (1, 3, 2), (2, 6, 1), (2, 3, 2), (2, 1, 3), (3, 2, 2), (3, 5, 1)]


def test_any_step_goes_on_with_any_accumulation(ranks, tmp_path) -> None:
    """Seven saved steps, under ZeRO-2 and 3, on 1 to 3 ranks with accumulations of 1 to 6."""
    for world in (1, 2, 3):
        for errors in ranks(world, save_case, str(tmp_path), [one for one in SAVED if one[0] == world], timeout=120):
            assert max(errors) < 2e-3
    tried = set()
    for world in (1, 2, 3):
        runs = [one for one in LOADED if one[0] == world]
        for results in ranks(world, load_case, str(tmp_path), SAVED, runs, timeout=120):
            for (by, sizes, step), (error, counted) in results.items():
                tried.add(step)
                assert error < 2e-3, f"{by} saved at step {step}, {sizes}: {error:.1%} of the update off"
                assert counted == [step + 1, (step + 1) * sizes[1], (step + 1) * size_of(sizes)]
    assert tried == set(range(1, 8))


@pytest.mark.parametrize(
    "stage, changes",
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (3, {}),
        # DeepSpeed counts no backward pass then, and holds the gradients elsewhere.
        (1, {"zero_optimization": {"stage": 1, "contiguous_gradients": False}}),
    ],
    ids=["0", "1", "2", "3", "1 of loose gradients"],
)
def test_no_checkpoint_in_the_middle_of_a_step(ranks, tmp_path, stage, changes) -> None:
    """On all ranks alike, whoever counts micro-batches: the engine, or the caller, as Accelerate does."""
    for said in ranks(2, middle_case, str(tmp_path), stage, changes):
        assert said[0] == ""
        for middle, (saved, loaded) in ((said[1:11], said[11:13]), (said[13:23], said[23:25])):
            assert saved == loaded == ""
            for what, message in zip(["save", "load"] * 5, middle, strict=True):
                assert f"rank 0: {what} in the middle of a step: " in message, middle
        assert "save in the middle of a step: 1 of the 3 micro-batches of a step are accumulated" in said[3]


def test_no_checkpoint_in_the_middle_of_a_step_that_the_caller_ends(ranks, tmp_path) -> None:
    for said in ranks(2, middle_case, str(tmp_path), 2, {"managed_gradient_accumulation": False}):
        assert said[0] == said[11] == said[12] == ""
        assert all("in the middle of a step: gradients of a backward pass" in one for one in said[1:11])


def test_no_checkpoint_of_gradients_that_fuse_backward_holds(ranks, tmp_path) -> None:
    for before, *middle, saved, loaded in ranks(2, fused_case, str(tmp_path)):
        assert before == saved == loaded == ""
        assert len(middle) == 3
        assert all("micro-batches that ran under optimizer.accumulating() are accumulated" in one for one in middle)


@pytest.mark.parametrize("kind", ["one", "DDP", "FSDP2"])
def test_no_checkpoint_of_gradients_that_a_loop_accumulates(ranks, tmp_path, kind) -> None:
    for said in ranks(1 if kind == "one" else 2, plain_case, kind, str(tmp_path)):
        assert [bool(one) for one in said] == [False, True, False, False, True, False, False], said
        assert "gradients since the last step (zero_grad() drops them" in said[1] and said[1] == said[4]


def test_counters_of_another_engine(ranks, tmp_path) -> None:
    for found in ranks(2, counted_case, str(tmp_path)):
        assert found["of one process"] == [5, 15, 60]
        assert found["counted otherwise"] == (106, [6, 36, 72])
        # A scale that adapts itself goes to one that does, and nowhere else.
        assert found["scales"] == [[256.0, 7], [1.0, 0], [1024.0, 0]]


LAMBDA, DECAY = [0.01 * 0.9**step for step in (6, 7, 8)], [0.01 * 0.5**step for step in (6, 7, 8)]
ROADS = {
    (("ddp", "", "LambdaLR"), ("zero2", "LambdaLR", "")): LAMBDA,
    (("zero2", "LambdaLR", ""), ("ddp", "", "LambdaLR")): LAMBDA,
    (("zero3", "LambdaLR", ""), ("zero2", "", "LambdaLR")): LAMBDA,
    (("zero2", "", "LambdaLR"), ("zero3", "LambdaLR", "the engine's")): LAMBDA,
    (("zero2", "LambdaLR", "the engine's"), ("zero3", "LambdaLR", "")): LAMBDA,
    (("zero2", "WarmupLR", ""), ("zero3", "WarmupLR", "")): [0.01] * 3,
    (("zero2", "WarmupLR", "ExponentialLR"), ("zero2", "WarmupLR", "ExponentialLR")): None,
}
REFUSED = {
    (("ddp", "", "LambdaLR"), ("ddp", "", "")): "has the state of LambdaLR (given to save), and nothing here takes it",
    (("zero2", "LambdaLR", ""), ("zero2", "", "")): "LambdaLR (stepped by the engine), and nothing here takes it",
    (
        ("zero2", "", ""),
        ("zero2", "LambdaLR", ""),
    ): "no state of a scheduler, and here is LambdaLR (the engine's lr_sch",
    (("ddp", "", ""), ("zero2", "WarmupLR", "")): "no state of a scheduler, and here is WarmupLR (the engine's lr_sch",
    (("ddp", "", "LambdaLR"), ("zero2", "WarmupLR", "")): "of a LambdaLR, and the engine's lr_scheduler is a WarmupLR",
    (
        ("zero2", "WarmupLR", "ExponentialLR"),
        ("zero2", "WarmupLR", ""),
    ): "and WarmupLR (the engine's lr_scheduler) here",
    (("ddp", "", "LambdaLR"), ("zero2", "LambdaLR", "LambdaLR")): "LambdaLR (given to save), and LambdaLR (the sched",
}


def test_a_schedule_goes_on_whoever_steps_it(ranks, tmp_path) -> None:
    """Given to save or the engine's own, it goes to the one that is here; two go to where they were."""
    for results in ranks(2, roads_case, str(tmp_path), list(ROADS), timeout=120):
        for (pair, rates), result in zip(ROADS.items(), results, strict=True):
            assert result["said"] == "", pair
            assert result["loaded"] == result["saved"]
            assert result["rates"] == result["through"]
            assert result["steps"] == 5
            if rates is not None:
                assert result["rates"] == pytest.approx(rates)


def test_a_schedule_that_nobody_takes_is_refused(ranks, tmp_path) -> None:
    for results in ranks(2, roads_case, str(tmp_path), list(REFUSED), timeout=120):
        for (pair, message), result in zip(REFUSED.items(), results, strict=True):
            assert message in result["said"], pair
            assert "scheduler=False leaves the schedules" in result["said"]
            assert not result["changed"]
            assert result["loaded"] == result["saved"]  # with scheduler=False


@pytest.mark.parametrize("library", ["torch", "fairscale"])
def test_rates_of_a_sharded_optimizer(ranks, tmp_path, library) -> None:
    """`ZeroRedundancyOptimizer` and OSS pass their own groups on at each step: these are saved and loaded."""
    for expected, found, alone in ranks(1, sharded_case, str(tmp_path), library):
        assert expected == found == [0.0125, 0.00625, 0.003125]
        assert alone == 0.0125

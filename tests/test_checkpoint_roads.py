"""Checkpoints on real ranks: from every engine and number of ranks to every other, and errors that all ranks raise."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from checkpoint_cases import (
    BEFORE,
    ENGINES,
    ZERO,
    load_case,
    one_rank_fails_case,
    random_case,
    save_case,
    unused_case,
)

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
IN_FP64 = ("ddp", "fsdp2", "fsdp1", "fsdp1 flat")
WITH_MASTERS = ("zero1", "zero2", "zero3", "zero3 persistent")
BOUND = {FP64: 1e-12, FP32: 1e-6, BF16: 1e-6}
LIMIT = 240


def saved_and_resumed(ranks, folder, world, kinds, dtype, recipe="paper") -> None:
    """Save under each engine; started anew at the same layout it comes to the same bits."""
    for result in ranks(world, save_case, str(folder), kinds, dtype, recipe, timeout=LIMIT):
        for kind in kinds:
            assert result[kind]["differ"] == [], kind
            assert result[kind]["loaded"] == (BEFORE, {"by": kind})
            assert result[kind]["error"] < BOUND[dtype], kind


def loaded(ranks, folder, world, saved, kinds, dtype, recipe="paper") -> None:
    """Load what was saved under other engines and numbers of ranks, and go on as one process does."""
    for errors in ranks(world, load_case, str(folder), saved, kinds, dtype, recipe, timeout=LIMIT):
        assert len(errors) == len(saved) * len(kinds)
        for road, (error, stale) in errors.items():
            assert error < BOUND[dtype], road
            assert stale == 0, road


@pytest.mark.support("checkpoints", "ZeRO-1, 2, 3, FSDP2, FSDP1, DDP: each to each, 1 to 4 ranks")
def test_every_engine_to_others(ranks, tmp_path) -> None:
    saved_and_resumed(ranks, tmp_path, 2, ENGINES, FP32)
    for i, kind in enumerate(ENGINES):
        # A third of the pairs, in diagonals: each engine saves for two others or more, and loads from as many. All
        # pairs are in `make matrix`.
        saved = [(by, FP32, 2) for j, by in enumerate(ENGINES) if (i + j) % 3 == 0]
        loaded(ranks, tmp_path, 3, saved, (kind,), FP32)
    loaded(ranks, tmp_path, 1, [(kind, FP32, 2) for kind in ENGINES], ("one", "zero3"), FP32)


@pytest.mark.support("checkpoints", "ZeRO-1, 2, 3, FSDP2, FSDP1, DDP: each to each, 1 to 4 ranks")
def test_in_float64(ranks, tmp_path) -> None:
    saved_and_resumed(ranks, tmp_path, 3, IN_FP64, FP64)
    loaded(ranks, tmp_path, 2, [(kind, FP64, 3) for kind in IN_FP64], IN_FP64, FP64)


@pytest.mark.support("checkpoints", "momentum without a second moment")
def test_without_a_second_moment(ranks, tmp_path) -> None:
    """Flat buffers keep a second moment of what has no level alone, and it moves with the rest."""
    saved_and_resumed(ranks, tmp_path, 3, ("fsdp1 flat", "fsdp2", "zero2", "zero3"), FP32, "orthogonal")
    saved = [(kind, FP32, 3) for kind in ("fsdp1 flat", "fsdp2", "zero2", "zero3")]
    loaded(ranks, tmp_path, 2, saved, ("ddp", "fsdp1 flat", "zero3"), FP32, "orthogonal")


@pytest.mark.support("checkpoints", "bf16 with fp32 masters, and engines without")
def test_masters(ranks, tmp_path) -> None:
    """Masters move between ZeRO stages, become the weights of fp32 engines, and come from them."""
    saved_and_resumed(ranks, tmp_path, 3, WITH_MASTERS, BF16)
    saved_and_resumed(ranks, tmp_path, 2, ("ddp",), FP32)
    masters = [(kind, BF16, 3) for kind in WITH_MASTERS]
    loaded(ranks, tmp_path, 2, [*masters, ("ddp", FP32, 2)], WITH_MASTERS, BF16)
    loaded(ranks, tmp_path, 2, masters, ("ddp", "fsdp1 flat", "zero2", "zero3 persistent"), FP32)


@pytest.mark.support("checkpoints", "HSDP, column and tensor parallelism, columns cut within a unit")
def test_rectangles(ranks, tmp_path) -> None:
    kinds = ("hsdp", "columns", "tensor parallel")
    saved_and_resumed(ranks, tmp_path, 4, kinds, FP64)
    saved_and_resumed(ranks, tmp_path, 3, ("fsdp1 flat", "columns"), FP64)
    others = [("fsdp1 flat", FP64, 3), ("columns", FP64, 3)]
    loaded(ranks, tmp_path, 4, [*others, *((kind, FP64, 4) for kind in kinds)], kinds, FP64)
    loaded(ranks, tmp_path, 3, [(kind, FP64, 4) for kind in kinds], ("fsdp1 flat", "columns"), FP64)


@pytest.mark.matrix
@pytest.mark.support("checkpoints", "ZeRO-1, 2, 3, FSDP2, FSDP1, DDP: each to each, 1 to 4 ranks")
def test_all_roads(ranks, tmp_path) -> None:
    worlds = (1, 2, 3, 4)
    for world in worlds:
        saved_and_resumed(ranks, tmp_path, world, ENGINES, FP32)
        saved_and_resumed(ranks, tmp_path, world, IN_FP64, FP64)
    for world in worlds:
        for dtype, kinds in ((FP32, ENGINES), (FP64, IN_FP64)):
            for i, kind in enumerate(kinds):
                # As many as there are engines in one: every pair of engines, of ranks, of engine and ranks, and every
                # engine on each pair of ranks.
                saved = [
                    (by, dtype, w)
                    for (j, by), w in product(enumerate(kinds), worlds)
                    if (i + j + w + 2 * world) % len(kinds) == 0
                ]
                loaded(ranks, tmp_path, world, saved, (kind,), dtype)


@pytest.mark.matrix
@pytest.mark.support("checkpoints", "DeepSpeed's settings: round robin, alignment, sub-groups, offload, stage 0")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_settings_of_deepspeed(ranks, tmp_path, dtype) -> None:
    kinds = (*(kind for kind in ZERO if kind not in ENGINES), "zero0")
    kinds += ("zero1 fp32 accumulation",) if dtype == BF16 else ()
    saved_and_resumed(ranks, tmp_path, 4, kinds, dtype)
    saved = [(kind, dtype, 4) for kind in kinds]
    loaded(ranks, tmp_path, 3, saved, ("zero1", "zero3"), dtype)
    loaded(ranks, tmp_path, 3, saved[:1], kinds, dtype)


def test_one_rank_finds_damage_and_all_raise(ranks, tmp_path) -> None:
    for result in ranks(3, one_rank_fails_case, str(tmp_path), "load"):
        assert result["message"].startswith("rank 1: rank-0000")
        assert "is damaged, says rank 1" in result["message"]
        assert result["changed"] == []
        assert result["error"] < 1e-6


def test_the_disk_of_one_rank_is_full_and_all_raise(ranks, tmp_path) -> None:
    for result in ranks(3, one_rank_fails_case, str(tmp_path), "save"):
        file = tmp_path / "save-float32-3" / ".step-00000005.saving" / "rank-00001.safetensors"
        assert result["message"] == f"rank 1: {file}: No space left on device"
        assert result["folder"] == ["latest", "step-00000002"]
        assert result["changed"] == []
        assert result["error"] < 1e-6


def test_parameters_without_gradients(ranks, tmp_path) -> None:
    for result in ranks(2, unused_case, str(tmp_path)):
        assert result["differ"] == []
        assert not result["left"]
        assert (
            "'mlp_row.weight' no" in result["flat"]
            and "Load under an engine that keeps tensors apart" in result["flat"]
        )


def test_random_states_go_to_the_rank_of_the_same_number(ranks, tmp_path) -> None:
    saved = ranks(2, random_case, str(tmp_path), True)
    resumed = ranks(3, random_case, str(tmp_path), False)
    assert resumed[:2] == saved
    assert saved[0] != saved[1]
    assert resumed[2][0] is False
    assert resumed[2][1] not in (saved[0][1], saved[1][1])

"""The toy recipe on every road: one process, FSDP2, ZeRO-2 and 3, saved and loaded on other ranks, planned, shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import toy_recipe
from checkpoint_cases import ENGINES, KEYS, Trained, load_case, place, save_case, steps
from gwt_dist.cli.app import main
from gwt_dist.memory import GroupSpec, plan_zero

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")
KINDS, FP32 = ("fsdp2", "zero2", "zero3"), torch.float32


def save(folder: str) -> dict[str, dict[str, Any]]:
    return save_case(folder, KINDS, FP32, "toy")


def load(folder: str, kinds: tuple[str, ...]) -> dict[tuple[str, int, str], tuple[float, float]]:
    return load_case(folder, [(kind, FP32, 3) for kind in KINDS], kinds, FP32, "toy")


def planned_and_allocated(kind: str, rank: int, world_size: int) -> tuple[int, int]:
    trained = Trained(kind, recipe="toy")
    trained.train(steps()[:1])
    tensors = tuple((n, tuple(p.shape)) for n, p in trained.module.named_parameters() if p.requires_grad)
    if kind.startswith("zero"):
        tensors = tuple((t.fqn, t.shape) for s in trained.optimizer.shards.values() for t in s.tensors)
    group = GroupSpec.of({"level": 2, "recipe": "toy"}, tensors)
    plan = plan_zero([group], stage=int(kind[-1]), world_size=world_size, rank=rank)
    state = [value for its in trained.optimizer.state.values() for value in its.values()]
    trained.close()
    return plan.total, sum(value.nbytes for value in state)


def rank_of(kind: str) -> tuple[int, int]:
    return planned_and_allocated(kind, torch.distributed.get_rank(), torch.distributed.get_world_size())


def test_saved_by_three_and_gone_on_with_by_two_and_one(ranks, tmp_path: Path, capsys: Any) -> None:
    for result in ranks(3, save, str(tmp_path), timeout=120):
        assert all(its["error"] < 1e-5 and not its["differ"] for its in result.values()), result
    errors = [*ranks(2, load, str(tmp_path), KINDS, timeout=120), load(str(tmp_path), ("one",))]
    assert sum(map(len, errors)) == 2 * 9 + 3
    assert max(error for its in errors for error, _ in its.values()) < 1e-5
    for kind in ("zero2", "zero3"):
        for planned, allocated in ranks(3, rank_of, kind):
            assert planned == allocated > 0
    assert main(["inspect", "--json", place(str(tmp_path), "zero2", FP32, 3)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"velocity", "row_sq", "place_sq"} <= told["state_bytes"].keys()
    assert "toy" in {one["recipe"] for one in told["tensors"]}


def test_it_is_sixty_lines_and_named_nowhere_else() -> None:
    assert len(Path(toy_recipe.__file__).read_text().splitlines()) < 60
    assert "toy" not in KEYS and set(KINDS) < set(ENGINES)

"""State of rows, columns and owners, of a toy recipe and real ones: saved, planned and shown, in FSDP2 and ZeRO."""

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
FIELDS = {
    "toy": {"velocity", "row_sq", "place_sq"},
    "came": {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col"},
    "low-rank": {"projector", "exp_avg_low", "exp_avg_sq_low", "residual_norm"},
}


def save(folder: str, recipe: str) -> dict[str, dict[str, Any]]:
    return save_case(folder, KINDS, FP32, recipe)


def load(folder: str, kinds: tuple[str, ...], recipe: str) -> dict[tuple[str, int, str], tuple[float, float]]:
    return load_case(folder, [(kind, FP32, 3) for kind in KINDS], kinds, FP32, recipe)


def planned_and_allocated(kind: str, recipe: str, rank: int, world_size: int) -> tuple[int, int]:
    trained = Trained(kind, recipe=recipe)
    trained.train(steps()[:1])
    tensors = tuple((n, tuple(p.shape)) for n, p in trained.module.named_parameters() if p.requires_grad)
    if kind.startswith("zero"):
        tensors = tuple((t.fqn, t.shape) for s in trained.optimizer.shards.values() for t in s.tensors)
    group = GroupSpec.of({"level": 2, "recipe": recipe, **KEYS.get(recipe, {})}, tensors)
    plan = plan_zero([group], stage=int(kind[-1]), world_size=world_size, rank=rank)
    state = [value for its in trained.optimizer.state.values() for value in its.values()]
    trained.close()
    return plan.total, sum(value.nbytes for value in state)


def rank_of(kind: str, recipe: str) -> tuple[int, int]:
    return planned_and_allocated(kind, recipe, torch.distributed.get_rank(), torch.distributed.get_world_size())


@pytest.mark.parametrize("recipe", FIELDS)
def test_saved_by_three_and_gone_on_with_by_two_and_one(ranks, tmp_path: Path, capsys: Any, recipe: str) -> None:
    for result in ranks(3, save, str(tmp_path), recipe, timeout=120):
        assert all(its["error"] < 1e-5 and not its["differ"] for its in result.values()), result
    errors = [*ranks(2, load, str(tmp_path), KINDS, recipe, timeout=120), load(str(tmp_path), ("one",), recipe)]
    assert sum(map(len, errors)) == 2 * 9 + 3
    assert max(error for its in errors for error, _ in its.values()) < 1e-5
    for kind in ("zero2", "zero3"):
        for planned, allocated in ranks(3, rank_of, kind, recipe):
            assert planned == allocated > 0
    assert main(["inspect", "--json", place(str(tmp_path), "zero2", FP32, 3)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert FIELDS[recipe] <= told["state_bytes"].keys()
    assert recipe in {one["recipe"] for one in told["tensors"]}


def test_it_is_sixty_lines_and_named_nowhere_else() -> None:
    assert len(Path(toy_recipe.__file__).read_text().splitlines()) < 60
    assert "toy" not in KEYS and set(KINDS) < set(ENGINES)

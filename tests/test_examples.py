"""Each example on two ranks: the engine is on, the loss falls, the update is that of one process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from forks import Forks
from integration_cases import example_case, own_loop_case
from memory_example_cases import example, table_case, update_case
from ranks import run_ranks

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
FSDP2 = TESTS.parent / "configs" / "fsdp2.yaml"


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
Run = Callable[[str, Path], list[dict[str, Any]]]


def launched(launcher: list[str]) -> Run:
    """Runs a case as a launcher starts it."""

    def run(case: str, folder: Path) -> list[dict[str, Any]]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        done = subprocess.run(
            [*launcher, str(TESTS / "integration_cases.py"), case, str(folder)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=240,
        )
        results = sorted(folder.glob("result-*.json"))
        assert len(results) == 2, f"{case}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return [json.loads(path.read_text()) for path in results]

    return run


@pytest.fixture(scope="module")
def forked(nothing_left_over: None) -> Iterator[Run]:
    """Runs a case on fresh ranks, in a fraction of the time that a launcher takes."""
    forks = Forks("deepspeed", "lightning.pytorch.strategies", "transformers.trainer")

    def run(case: str, folder: Path) -> list[dict[str, Any]]:
        return run_ranks(example_case, 2, case, str(folder), forks=forks)

    yield run
    forks.close()


def state_of_one_process() -> int:
    """Bytes of the moments of the tiny model where nothing is sharded."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from tiny import tiny_llama  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(EXAMPLES))
    total = 0
    for name, parameter in tiny_llama().named_parameters():
        *rows, columns = parameter.shape
        unit = 4 if ("attn" in name or "mlp" in name) else 1
        total += 2 * 4 * (rows[0] if rows else 1) * -(-columns // unit)
    return total


def check(run: Run, case: str, folder: Path, engaged: str, sharded: bool, steps: int = 20) -> list[dict[str, Any]]:
    results = run(case, folder)
    bytes_of_one = state_of_one_process()
    for result in results:
        assert result["engaged"] == engaged
        assert result["dtensors"] == ("fsdp2" in case or "torchtitan" in case)
        assert result["steps"] == steps
        assert result["different"], "ranks saw the same batches, so that gradients need not be summed"
        assert result["levels"] == [0, 2]
        # No silent DDP: half the state, but for padding and units that are cut.
        share = result["state_bytes"] / bytes_of_one
        assert (0.45 < share < 0.55) if sharded else share == 1
    first, *_, last = results[0]["losses"]
    assert last < first - 0.5
    assert results[0]["error"] < 1e-6
    return results


@pytest.mark.matrix
@pytest.mark.support("FSDP2", "a loop of one's own with `GaLoreAdamW`, and with `adalomo` and `fuse_backward`")
@pytest.mark.parametrize("name", ["galore", "adalomo"])
def test_own_loop(forked: Run, tmp_path: Path, name: str) -> None:
    """Without frameworks: the loss falls, each matrix has one keeper, and what is fused leaves no gradient."""
    results = run_ranks(own_loop_case, 2, name)
    for result in results:
        first, *_, last = result["losses"]
        assert last < first - 2
        assert result["gradients"] == 0
    kept = [result["kept"] for result in results]
    assert kept == ([7, 7] if name == "galore" else [0, 0])


def test_working_memory_reaches_back_and_never_ahead() -> None:
    memory = example()
    torch.manual_seed(0)
    batch = memory.episodes(8, seed=0)
    early, late = (batch._replace(observations=batch.observations.clone()) for _ in range(2))
    early.observations[:, 0] = (early.observations[:, 0] + 1) % memory.DOOR
    late.observations[:, 2] = (late.observations[:, 2] + 1) % memory.DOOR
    for remembers in (True, False):
        model = memory.Agent(remembers)
        before, with_early, with_late = model(batch), model(early), model(late)
        assert torch.equal(before[:, -1], with_early[:, -1]) != remembers
        assert torch.equal(before[:, :2], with_late[:, :2])
        assert not torch.equal(before[:, 2], with_late[:, 2])


@pytest.mark.parametrize("lora", [False, True])
def test_working_memory_update(ranks: Callable[..., list[Any]], lora: bool) -> None:
    for result in ranks(2, update_case, lora):
        assert result["sharded"]
        assert result["only what is trained moved"]
        assert result["error"] < 1e-10
        assert result["error of a part"] > 1e-2


@pytest.mark.matrix
def test_working_memory() -> None:
    """The door of the right colour is found with memory alone; adapters on the memory learn other doors."""
    rows, others = run_ranks(table_case, 2, 0)
    plain, remembering, before, after = rows
    assert [row["accuracy"] for row in others] == [row["accuracy"] for row in rows]
    assert plain["accuracy"] < 0.35
    assert remembering["accuracy"] > 0.9
    assert before["accuracy"] < 0.1
    assert after["accuracy"] > 0.9
    assert before["trained"] == 0 < 10 * after["trained"] < remembering["trained"]


@pytest.mark.support("DeepSpeed", "transformers' Trainer, ZeRO-2")
@pytest.mark.usefixtures("torch_extensions_dir")
def test_trainer_deepspeed(tmp_path: Path) -> None:
    check(launched(TORCHRUN), "trainer-deepspeed", tmp_path, "flat shards DeepSpeedEngine", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("DeepSpeed", "transformers' Trainer, ZeRO-2, resumed from its checkpoint")
@pytest.mark.usefixtures("torch_extensions_dir")
def test_trainer_resumed(forked: Run, tmp_path: Path) -> None:
    check(forked, "resumed-deepspeed", tmp_path, "flat shards DeepSpeedEngine", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("FSDP2", "transformers' Trainer")
def test_trainer_fsdp2(forked: Run, tmp_path: Path) -> None:
    check(forked, "trainer-fsdp2", tmp_path, "DTensors FSDPLlamaForCausalLM", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("DDP", "transformers' Trainer")
def test_trainer_ddp(forked: Run, tmp_path: Path) -> None:
    check(forked, "trainer-ddp", tmp_path, "whole tensors DistributedDataParallel", sharded=False)


@pytest.mark.support("FSDP2", "Accelerate, by `accelerate launch` and `configs/fsdp2.yaml`")
def test_accelerate_launched_by_the_file(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2)]
    results = check(launched(launcher), "accelerate-fsdp2", tmp_path, "FSDPLlamaForCausalLM", sharded=True)
    # The file says so; the example's own settings are not taken then.
    assert [result["sharded_layers"] for result in results] == [2, 2]


@pytest.mark.matrix
@pytest.mark.support("FSDP2", "Accelerate")
def test_accelerate_fsdp2(forked: Run, tmp_path: Path) -> None:
    check(forked, "accelerate-fsdp2", tmp_path, "FSDPLlamaForCausalLM", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("DeepSpeed", "Accelerate, ZeRO-2")
@pytest.mark.usefixtures("torch_extensions_dir")
def test_accelerate_deepspeed(forked: Run, tmp_path: Path) -> None:
    check(forked, "accelerate-deepspeed", tmp_path, "DeepSpeedEngine", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("FSDP2", "Lightning's ModelParallelStrategy")
def test_lightning_fsdp2(forked: Run, tmp_path: Path) -> None:
    check(forked, "lightning-fsdp2", tmp_path, "DTensors ModelParallelStrategy", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("DDP", "Lightning's DDPStrategy")
def test_lightning_ddp(forked: Run, tmp_path: Path) -> None:
    check(forked, "lightning-ddp", tmp_path, "whole tensors DDPStrategy", sharded=False)


@pytest.mark.matrix
@pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason="torchtitan pins older datasets than this project: pip install --no-deps torchtitan (docs/switching.md)",
)
@pytest.mark.support("FSDP2", "torchtitan's optimizer container")
def test_torchtitan(forked: Run, tmp_path: Path) -> None:
    check(forked, "torchtitan-fsdp2", tmp_path, "GWTOptimizersContainer", sharded=True)

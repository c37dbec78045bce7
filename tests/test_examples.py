"""Each example on two ranks of torchrun: the engine is on, the loss falls, the update is that of one process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
FSDP2 = TESTS.parent / "configs" / "fsdp2.yaml"


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(case: str, folder: Path, launcher: list[str] = TORCHRUN) -> list[dict[str, Any]]:
    """What the two ranks report of a case."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if case in ("trainer-deepspeed", "resumed-deepspeed", "accelerate-deepspeed"):
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` does
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


def check(
    case: str, folder: Path, engaged: str, sharded: bool, steps: int = 20, launcher: list[str] = TORCHRUN
) -> list[dict[str, Any]]:
    results = run(case, folder, launcher)
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


@pytest.mark.support("DeepSpeed", "transformers' Trainer, ZeRO-2")
@pytest.mark.usefixtures("torch_extensions_dir")
def test_trainer_deepspeed(tmp_path: Path) -> None:
    check("trainer-deepspeed", tmp_path, "flat shards DeepSpeedEngine", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("DeepSpeed", "transformers' Trainer, ZeRO-2, resumed from its checkpoint")
@pytest.mark.usefixtures("torch_extensions_dir")
def test_trainer_resumed(tmp_path: Path) -> None:
    check("resumed-deepspeed", tmp_path, "flat shards DeepSpeedEngine", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("FSDP2", "transformers' Trainer")
def test_trainer_fsdp2(tmp_path: Path) -> None:
    check("trainer-fsdp2", tmp_path, "DTensors FSDPLlamaForCausalLM", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("DDP", "transformers' Trainer")
def test_trainer_ddp(tmp_path: Path) -> None:
    check("trainer-ddp", tmp_path, "whole tensors DistributedDataParallel", sharded=False)


@pytest.mark.support("FSDP2", "Accelerate, by `accelerate launch` and `configs/fsdp2.yaml`")
def test_accelerate_launched_by_the_file(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2)]
    results = check("accelerate-fsdp2", tmp_path, "FSDPLlamaForCausalLM", sharded=True, launcher=launcher)
    # The file says so; the example's own settings are not taken then.
    assert [result["sharded_layers"] for result in results] == [2, 2]


@pytest.mark.matrix
@pytest.mark.support("FSDP2", "Accelerate")
def test_accelerate_fsdp2(tmp_path: Path) -> None:
    check("accelerate-fsdp2", tmp_path, "FSDPLlamaForCausalLM", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("DeepSpeed", "Accelerate, ZeRO-2")
@pytest.mark.usefixtures("torch_extensions_dir")
def test_accelerate_deepspeed(tmp_path: Path) -> None:
    check("accelerate-deepspeed", tmp_path, "DeepSpeedEngine", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("FSDP2", "Lightning's ModelParallelStrategy")
def test_lightning_fsdp2(tmp_path: Path) -> None:
    check("lightning-fsdp2", tmp_path, "DTensors ModelParallelStrategy", sharded=True)


@pytest.mark.matrix
@pytest.mark.support("DDP", "Lightning's DDPStrategy")
def test_lightning_ddp(tmp_path: Path) -> None:
    check("lightning-ddp", tmp_path, "whole tensors DDPStrategy", sharded=False)


@pytest.mark.matrix
@pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason="torchtitan pins older datasets than this project: pip install --no-deps torchtitan (docs/switching.md)",
)
@pytest.mark.support("FSDP2", "torchtitan's optimizer container")
def test_torchtitan(tmp_path: Path) -> None:
    check("torchtitan-fsdp2", tmp_path, "GWTOptimizersContainer", sharded=True)

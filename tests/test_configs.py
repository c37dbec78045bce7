"""Every file in configs/ loads, is documented, and says what its name says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gwt_dist.train import ds_config
from gwt_dist.train.config import config_from, find_file, read_mapping
from gwt_dist.train.model import model_config
from pretrain_cases import Ranks, arguments, run_session

CONFIGS = Path(__file__).parents[1] / "configs"
DOCUMENTED = set(re.findall(r"`([\w.]+)`", (CONFIGS / "README.md").read_text(encoding="utf-8")))
WEIGHTS = {"study-4m": 4.27e6, "60m": 58e6, "130m": 134e6, "350m": 368e6, "1b": 1.34e9, "3b": 2.7e9, "7b": 6.74e9}


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict) and key != "params":
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize("path", sorted((CONFIGS / "pretrain").glob("*")), ids=lambda p: p.name)
def test_run(path: Path) -> None:
    config = config_from(read_mapping(path), str(path))
    assert find_file(config.model, "configs/models").is_file()
    assert find_file(config.deepspeed_config).is_file()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all("#" in line for line in lines), "each key has a comment"


def test_fsdp2() -> None:
    """`tests/test_examples.py` starts two ranks with it."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = CONFIGS / "fsdp2.yaml"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type.value, config.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    # Accelerate takes any key of fsdp_config, and leaves those alone that it does not know.
    assert set(config.fsdp_config) <= vars(launch_command_parser().parse_args(["script"])).keys()
    written = read_mapping(path)
    assert {*written, *written["fsdp_config"]} <= DOCUMENTED
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line != "fsdp_config:"]
    assert all("#" in line for line in lines), "each key has a comment"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda p: p.name)
def test_deepspeed(path: Path, world_size: int) -> None:
    content, sizes = ds_config.load(path, world_size)
    assert sizes.train == sizes.micro * sizes.accumulation * world_size
    assert ds_config.zero_stage(content) == int(path.stem[4])
    assert ds_config.precision(content) == ("bf16" if "bf16" in path.stem or "offload" in path.stem else "fp32")
    zero = content["zero_optimization"]
    assert ("offload_optimizer" in zero) == ("offload" in path.stem)
    assert ("offload_param" in zero) == (path.stem == "zero3-offload")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert set(leaves(written)) <= DOCUMENTED
    assert set(written["optimizer"]["params"]) <= DOCUMENTED
    assert "gradient_clipping" in written, "DeepSpeed clips at 1.0 where nothing is said"


@pytest.mark.matrix
def test_offload_settings_train_as_without(
    inputs: Path, ranks: Ranks, torch_extensions_dir: Path, tmp_path: Path
) -> None:
    losses = {}
    for name in ("zero2-bf16", "zero2-offload", "zero3-offload"):
        changes = {"deepspeed_config": CONFIGS / f"{name}.json", "steps": 3, "save_every": 0}
        results = ranks(2, run_session, arguments(inputs, tmp_path / name, **changes), timeout=120)
        losses[name] = results[0]["validation_loss"]
        for result in results:
            assert result["bytes"]["wavelet_moments"] == result["planned"]["wavelet"]
    assert losses == pytest.approx(dict.fromkeys(losses, losses["zero2-bf16"]), rel=1e-3), losses


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*")), ids=lambda p: p.stem)
def test_model(path: Path) -> None:
    from transformers import LlamaForCausalLM

    shapes = read_mapping(path)
    assert set(shapes) <= DOCUMENTED
    config = model_config(path, shapes["vocab_size"], 256)
    with torch.device("meta"):
        weights = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    if path.stem in ("tiny", "study"):
        assert 1e6 < weights < 2e6
    else:
        assert weights == pytest.approx(WEIGHTS[path.stem], rel=0.03)


def test_model_of_one_billion_has_an_odd_width() -> None:
    assert read_mapping(CONFIGS / "models" / "1b.json")["intermediate_size"] == 5461


def test_every_file_is_loaded_here() -> None:
    known = {*CONFIGS.glob("pretrain/*"), *CONFIGS.glob("models/*"), *CONFIGS.glob("*.json")}
    known |= set(CONFIGS.glob("studies/*"))  # test_study_options.py
    known |= set(CONFIGS.glob("shapes/*"))  # test_plan_models.py
    known |= {CONFIGS / "fsdp2.yaml", CONFIGS / "README.md"}
    assert {path for path in CONFIGS.rglob("*") if path.is_file()} - known == set()

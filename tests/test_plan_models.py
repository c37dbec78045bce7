"""Models by arithmetic from a config.json are those that transformers builds: names, shapes, order, matrices, units."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gwt_dist import memory, param_groups
from gwt_dist.cli.models import read_model
from gwt_dist.memory.configs import KNOWN, of_config
from gwt_dist.memory.model import groups_of, of_module
from test_plan_command import SHAPES

ROOT = Path(__file__).parents[1]
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 33,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "no type": {},
    "grouped heads, tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "head_dim": {"model_type": "llama", "head_dim": 24},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2},
    "mistral, grouped by default": {"model_type": "mistral", "num_attention_heads": 16},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2, heads by default": {"model_type": "qwen2", "num_attention_heads": 64},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24},
    "qwen3, heads by default": {"model_type": "qwen3", "num_attention_heads": 32, "tie_word_embeddings": True},
    "qwen3, biases": {"model_type": "qwen3", "num_key_value_heads": 4, "attention_bias": True},
    "mixtral": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 3},
    "mixtral, tied": {"model_type": "mixtral", "num_attention_heads": 8, "num_experts": 2, "tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt2, apart": {**GPT2, "n_inner": 100, "tie_word_embeddings": False},
    "gpt2, other names": {
        "model_type": "gpt2",
        **SHAPES,
        "max_position_embeddings": 33,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "architectures": ["GPT2LMHeadModel"],
    },
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS.keys())
def test_shapes_by_arithmetic_are_those_of_transformers(change: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = change if "n_embd" in change else {**SHAPES, **change}
    found = of_config(config, "it")
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.get("model_type", "llama"), **settings))
    assert found is not None
    # In the same order, which decides where ZeRO's boundaries fall, and in the groups that a run makes.
    assert list(found.tensors) == list(of_module(model, "it").tensors)
    for targets in ({"attn": 1, r".*mlp\..+": 3}, "blocks", "all-linear"):
        expected = memory.specs(model.named_parameters(), param_groups(model, 2, targets, recipe="energy"))
        assert groups_of(found, 2, targets, recipe="energy") == expected


# As their authors count them.
PUBLISHED = {
    "gpt2": 124_439_808,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs/shapes").iterdir()))
def test_models_by_name_have_the_weights_that_were_published(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_model(name).numel == PUBLISHED[name]


def test_every_kind_is_compared() -> None:
    assert {config.get("model_type", "llama") for config in CONFIGS.values()} == set(KNOWN)


def test_what_is_not_written_down_is_left_to_transformers() -> None:
    assert of_config({"model_type": "gpt_neox", **SHAPES}, "") is None
    assert of_config({**GPT2, "add_cross_attention": True}, "") is None
    assert of_config({**SHAPES, "architectures": ["LlamaForSequenceClassification"]}, "") is None
    for config, message in (
        ({**GPT2, "n_layer": 0}, "n_layer in here is 0 and must be"),
        ({"model_type": "mixtral", **SHAPES}, "num_local_experts in here is None and must be"),
        ({**SHAPES, "num_hidden_layers": 100_001}, "num_hidden_layers=100001 in here is more than 100,000"),
    ):
        with pytest.raises(ValueError, match=message):
            of_config(config, "here")


def test_plans_of_known_kinds_import_neither_torch_nor_transformers(tmp_path: Path) -> None:
    mixtral = {**SHAPES, **CONFIGS["mixtral"]}
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    command = [str(Path(sys.executable).parent / "gwt-dist"), "plan", str(tmp_path), "--engine", "fsdp2", "--json"]
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| +gwt_dist.memory.configs$", done.stderr, re.M)
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.M)
    found = json.loads(done.stdout)["levels"]
    experts, attention, router = 3 * 3 * 64 * 171, 64 * 64 * 3, 3 * 64
    assert found[0]["elements"] == 2 * (experts + attention + router)

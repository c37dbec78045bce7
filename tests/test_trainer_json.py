"""An optimizer section of type GWTAdamW in the JSON of a trainer: honoured, or refused with what to write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forks import Forks
from ranks import run_ranks
from trainer_json_cases import accelerate_case, refused_cases, section_case

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")


@pytest.fixture(scope="module")
def forks(nothing_left_over: None) -> Iterator[Forks]:
    started = Forks("deepspeed", "transformers.trainer", "accelerate")
    yield started
    started.close()


def check_levels(levels: dict[str, int], attn: int, mlp: int) -> None:
    assert any("embed_tokens" in name for name in levels) and any("lm_head" in name for name in levels)
    for name, level in levels.items():
        assert level == (attn if "attn" in name else mlp if "mlp" in name else 0), name


@pytest.mark.support("DeepSpeed", "an `optimizer` section in the JSON of transformers' Trainer")
@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_steps_with_the_section(forks: Forks, stage: int, tmp_path: Path) -> None:
    for result in run_ranks(section_case, 2, stage, str(tmp_path), forks=forks):
        assert result["error"] < 1e-5
        assert result["options"] == {
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.1,
            "scale": None,
            "recipe": "energy",
        }
        assert len(result["rates"]) == 7 and result["rates"][-1] == 1e-2
        assert result["rates"] == sorted(result["rates"]) and 0 < result["rates"][2] < 1e-2  # the section's warm-up
        if stage == 2:
            check_levels(result["levels"], 2, 2)


TOLD: dict[str, list[str]] = {
    "callback too late": ["level 2 would act on every one of them, embeddings and lm_head too", "callbacks=[Attach"],
    "callback too late, allowed": ["level 2 would act on every one of them"],
    "callback too late, targets": [
        "targets=['attn', 'mlp'] and rest=None could not be looked up",
        "callbacks=[AttachCallback()]",
    ],
    "another type": ["an optimizer section of type 'AdamW'", "Write 'GWTAdamW', or remove the section"],
    "given twice": ["optim_args='level=3' is given, and an optimizer section", "remove one of them"],
    "given twice, callback alone": ["optim_target_modules=['mlp'] is given, and an optimizer section"],
    "another type, callback alone": ["an optimizer section of type 'AdamW'"],
    "decay left out": ["weight_decay=0.1 is given", 'Write "weight_decay": "auto" into optimizer.params'],
    "level auto": ["`optimizer.params.level` without `auto`"],  # in Accelerate's words
    "in quotes": ["optimizer.params.scale is the text '0.5'", "without quotes"],
    "unknown": ["optimizer.params has the unknown key 'levle' (did you mean 'level'?)"],
    "target": ["target 'mpl' matches no weight matrix"],
    "stands twice": ["twice-", "has the key zero_optimization more than once"],
}


@pytest.mark.support("DeepSpeed", "an `optimizer` section that DeepSpeed itself would build", outcome="refused")
def test_what_cannot_be_honoured_says_what_to_write(forks: Forks, tmp_path: Path) -> None:
    for messages in run_ranks(refused_cases, 2, str(tmp_path), forks=forks):
        assert set(messages) == set(TOLD)
        for name, parts in TOLD.items():
            assert messages[name].startswith("ValueError: "), (name, messages[name])
            for part in parts:
                assert part in messages[name], (name, messages[name])


@pytest.mark.support("DeepSpeed", "an `optimizer` section through Accelerate's `DummyOptim`")
@pytest.mark.parametrize("callable_scheduler", [False, True])
def test_accelerate_steps_with_the_section(forks: Forks, callable_scheduler: bool) -> None:
    results: list[dict[str, Any]] = run_ranks(accelerate_case, 2, callable_scheduler, forks=forks)
    for result in results:
        check_levels(result["levels"], 1, 3)
        assert result["decays"] == {0.3}
        if callable_scheduler:
            assert result["rates"] == [0.0035, 0.00175, 0.000875]
        else:
            assert result["rates"][-1] == 0.007  # WarmupLR up to the rate of the DummyOptim

"""The code of docs/trainers.md, run: with TRL where it is installed, with stand-ins for Axolotl and LLaMA-Factory."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import Trainer, TrainingArguments

from documents import ROOT, blocks
from forks import Forks
from gwt_dist import ds_json
from gwt_dist.cli.app import main
from gwt_dist.engines.attach import find_optimizer
from gwt_dist.integrations.transformers import AttachCallback, trainer_kwargs
from ranks import run_ranks
from trainer_json_cases import page_case

PAGE = "docs/trainers.md"
NO_GPU = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    import tiny

    return tiny


@pytest.fixture(scope="module")
def forks(nothing_left_over: None) -> Iterator[Forks]:
    started = Forks("deepspeed", "transformers.trainer", "accelerate")
    yield started
    started.close()


def texts(language: str) -> list[str]:
    """The blocks of the page in this language, in order."""
    found = [block.text for block in blocks(PAGE) if block.language == language]
    assert found
    return found


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_kwargs(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", learning_rate=0.003, optim_args="level=3")
    mine = AttachCallback()
    with pytest.raises(ValueError, match="optim='adamw_torch_8bit' is given"):
        trainer_kwargs(TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch_8bit"))
    found = trainer_kwargs(args, targets=["attn"], callbacks=[mine], scale=0.5)
    assert list(found) == ["optimizer_cls_and_kwargs", "callbacks"]
    first, second = found["callbacks"]
    assert type(first) is AttachCallback and first is not mine is second
    _, keywords = found["optimizer_cls_and_kwargs"]
    expected = {"lr": 0.003, "level": 3, "targets": ["attn"], "scale": 0.5}
    assert {key: keywords[key] for key in expected} == expected


@NO_GPU
def test_code_of_the_page(tiny: Any, tmp_path: Path) -> None:
    start, save, resume = texts("python")
    names: dict[str, Any] = {"model": tiny.tiny_llama(), "dataset": tiny.Text()}
    exec(start, names)
    exec(save, names)
    weights = {name: weight.clone() for name, weight in names["model"].state_dict().items()}
    names["model"] = tiny.tiny_llama()
    exec(resume, names)
    assert names["trainer"].state.global_step == 4
    for name, weight in names["model"].state_dict().items():
        assert weight.equal(weights[name]), name
    assert main(["export", "output/checkpoint-2/gwt_dist", "model"]) == 0
    assert (tmp_path / "model" / "config.json").exists()


@NO_GPU
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # TRL's own use of arguments
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is no dependency: pip install --no-deps trl")
def test_code_of_the_page_with_trl(tiny: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(40))]
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names: dict[str, Any] = {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words_only, pad_token="<pad>", eos_token="<eos>"),
        "texts": Dataset.from_dict({"text": [" ".join(f"w{(3 * i + j) % 40}" for j in range(20)) for i in range(64)]}),
        "model": tiny.tiny_llama(),
    }
    (code,) = texts("python trl")
    code = code.replace("SFTConfig(", "SFTConfig(use_cpu=True, bf16=False, ")  # or it asks for a GPU
    exec(code, names)
    assert {group["level"] for group in find_optimizer(names["trainer"].optimizer).param_groups} == {0, 1}
    weights = {name: weight.clone() for name, weight in names["model"].state_dict().items()}
    names["model"] = tiny.tiny_llama()
    exec(code.replace("trainer.train()", "trainer.train(resume_from_checkpoint='sft/checkpoint-2')"), names)
    for name, weight in names["model"].state_dict().items():
        assert weight.equal(weights[name]), name


class AxolotlTrainer(Trainer):
    """As Axolotl 0.19 builds an optimizer of a factory: with its arguments as the second one."""

    def create_optimizer(self, model: Any = None) -> Any:
        """Raises `TypeError` for a factory that does not take them."""
        factory, keywords = self.optimizer_cls_and_kwargs
        self.optimizer = self.optimizer or factory()(model or self.model, self.args, **keywords)
        return self.optimizer


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of this name with these members, and the packages that it is in."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
    vars(sys.modules[name]).update(members)


def test_plugin_for_axolotl(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    names: dict[str, Any] = {}
    exec(*texts("python axolotl"), names)
    (text,) = texts("yaml")
    said = yaml.safe_load(text)
    assert said.pop("plugins") == ["gwt_plugin.GWTPlugin"]
    args = TrainingArguments(
        "output", max_steps=3, logging_steps=1, use_cpu=True, report_to="none", optim=said.pop("optimizer"), **said
    )
    trainer = AxolotlTrainer(model=tiny.tiny_llama(), args=args, train_dataset=tiny.Text())
    names["GWTPlugin"]().post_trainer_create(None, trainer)
    trainer.train()
    optimizer = find_optimizer(trainer.optimizer)
    chosen = {(group["level"], group["recipe"]) for group in optimizer.param_groups}
    assert chosen == {(1, "orthogonal"), (0, "orthogonal")}
    assert optimizer.defaults["lr"] == 0.001
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert Path("output/checkpoint-3/gwt_dist/latest").exists()


def test_script_for_llama_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=lambda args=None, callbacks=None: given.extend(callbacks))
    exec(*texts("python llamafactory"), {})
    assert [type(callback) for callback in given] == [AttachCallback]
    (text,) = texts("json")
    ds_json.parse(text, PAGE)


@pytest.mark.matrix
@pytest.mark.usefixtures("torch_extensions_dir")
def test_json_for_llama_factory(forks: Forks, tmp_path: Path) -> None:
    """The JSON and the callback alone, in a Trainer on two ranks."""
    (text,) = texts("json")
    for levels in run_ranks(page_case, 2, json.loads(text), str(tmp_path), forks=forks):
        assert {level for name, level in levels.items() if "attn" in name or "mlp" in name} == {1}
        assert {level for name, level in levels.items() if not ("attn" in name or "mlp" in name)} == {0}

"""`gwt_dist.integrations` in one process: arguments, groups, and what is refused. With ranks: `test_examples.py`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import check_target_module_exists

from fsdp1_cases import through_a_trainer_case
from gwt_dist import GWTAdamW
from gwt_dist.integrations.engaged import engage, how_held, warn_of_one_process
from gwt_dist.integrations.transformers import AttachCallback, optimizer_cls_and_kwargs, parse_optim_args

ROOT = Path(__file__).parents[1]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=13, num_hidden_layers=2, num_attention_heads=2)
    )


def built(model: nn.Module, folder: Path, targets: object = None, **options: object) -> GWTAdamW:
    """What the Trainer builds of these arguments, `options` being those of `TrainingArguments`."""
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **options)  # type: ignore[arg-type]
    extra = {} if targets is None else {"targets": targets}
    optimizer = Trainer(
        model=model, args=args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, **extra)
    ).create_optimizer()
    assert isinstance(optimizer, GWTAdamW)
    return optimizer


def levels(model: nn.Module, optimizer: GWTAdamW) -> dict[str, tuple[int, float]]:
    """Level and weight decay of each parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["level"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_trainer_gives_its_arguments_and_its_weight_decay(llama, tmp_path) -> None:
    optimizer = built(
        llama,
        tmp_path,
        learning_rate=0.003,
        weight_decay=0.1,
        adam_beta2=0.95,
        optim_args="level=3, scale=0.5, recipe=energy",
        optim_target_modules=["attn", "mlp"],
    )
    assert optimizer.defaults["lr"] == 0.003
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["eps"] == 1e-6  # GWTAdamW's, as adam_epsilon is not set
    assert (optimizer.defaults["scale"], optimizer.defaults["recipe"]) == (0.5, "energy")
    found = levels(llama, optimizer)
    assert set(found) == {name for name, _ in llama.named_parameters()}
    decaying = set(Trainer.get_decay_parameter_names(None, llama))
    for name, (level, decay) in found.items():
        assert level == (3 if "attn" in name or "mlp" in name else 0), name
        assert decay == (0.1 if name in decaying else 0.0), name
    assert {name for name, (_, decay) in found.items() if not decay} == {n for n in found if "norm" in n}


@pytest.mark.parametrize("targets", [["q_proj"], [r".*layers\.1\..*up_proj", "o_proj"], r".*mlp\.[ug].*", "all-linear"])
def test_targets_are_those_of_transformers(llama, tmp_path, targets) -> None:
    found = levels(llama, built(llama, tmp_path, optim_target_modules=targets, optim_args="level=2"))
    for name, module in llama.named_modules():
        if isinstance(module, nn.Linear):
            theirs = targets == "all-linear" or bool(check_target_module_exists(targets, name))
            assert found[f"{name}.weight"][0] == (2 if theirs else 0), name


def test_a_part_of_a_name_alone_is_no_regular_expression(llama, tmp_path) -> None:
    with pytest.raises(ValueError, match="matches no weight matrix"):
        built(llama, tmp_path, optim_target_modules="mlp")
    assert levels(llama, built(llama, tmp_path, targets="mlp"))["model.layers.0.mlp.up_proj.weight"][0] == 1


def test_epsilon_and_keywords(tmp_path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, adam_epsilon=1e-7, optim_args="lr=0.5")
    _, keywords = optimizer_cls_and_kwargs(args, level=4)
    assert (keywords["eps"], keywords["lr"], keywords["level"]) == (1e-7, 0.5, 4)
    with pytest.raises(ValueError, match="no keyword 'proj'; it has lr"):
        optimizer_cls_and_kwargs(args, proj=4)
    args.optim_target_modules = ["mlp"]
    with pytest.raises(ValueError, match="are both given"):
        optimizer_cls_and_kwargs(args, targets="attn")


def test_optim_args() -> None:
    text = "level=2, scale=.25,recipe=energy, betas=(0.9, 0.95), limiter=None, wavelet=db2"
    assert parse_optim_args(text) == {
        "level": 2,
        "scale": 0.25,
        "recipe": "energy",
        "betas": (0.9, 0.95),
        "limiter": None,
        "wavelet": "db2",
    }
    text = "level=2, rest={'level': 1, 'recipe': 'energy'}, scale=1"
    assert parse_optim_args(text) == {"level": 2, "rest": {"level": 1, "recipe": "energy"}, "scale": 1}
    assert parse_optim_args(None) == parse_optim_args(" ") == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("level", "'level' is not key=value"),
        ("level=", "'level=' is not key=value"),
        ("level=2,=3", "'=3' is not key=value"),
        ("level=2,level=3", "gives 'level' twice"),
        ("proj=64, update_proj_gap=100", "no keyword 'proj'"),
    ],
)
def test_wrong_optim_args(text, told) -> None:
    with pytest.raises(ValueError, match="optim_args=") as raised:
        parse_optim_args(text)
    assert told in str(raised.value)


@pytest.mark.parametrize("asked", ["DeepSpeed", "FSDP"])
@pytest.mark.support("DeepSpeed", "a trainer that is DDP where DeepSpeed or FSDP was asked for", outcome="refused")
def test_ddp_in_silence_is_refused(asked, monkeypatch, llama) -> None:
    optimizer = GWTAdamW(llama.parameters(), level=1)
    assert (engage(optimizer, llama, None), how_held(optimizer)) == ("whole tensors", "whole tensors")
    with pytest.raises(ValueError, match=f"{asked} was asked for and is not on"):
        engage(optimizer, llama, asked)
    with pytest.raises(ValueError, match=f"{asked} was asked for"):
        AttachCallback().on_train_begin(
            SimpleNamespace(**{asked.lower(): {"version": 2}}), None, None, optimizer=optimizer, model=llama
        )
    monkeypatch.setenv(f"ACCELERATE_USE_{asked.upper()}", "true")
    with pytest.raises(ValueError, match="would be DDP in silence"):
        AttachCallback().on_train_begin(None, None, None, optimizer=optimizer, model=llama)
    monkeypatch.setenv(f"ACCELERATE_USE_{asked.upper()}", "false")
    callback = AttachCallback()
    callback.on_train_begin(None, None, None, optimizer=optimizer, model=llama)
    assert callback.held == "whole tensors"


def test_another_optimizer_is_refused(llama) -> None:
    with pytest.raises(ValueError, match="AdamW holds no GWTAdamW"):
        engage(torch.optim.AdamW(llama.parameters()), llama, None)


def test_accelerate_takes_one_model_with_its_optimizer(llama) -> None:
    from accelerate import Accelerator

    from gwt_dist.integrations.accelerate import prepare

    with pytest.raises(ValueError, match="1 models and 0 optimizers"):
        prepare(Accelerator(cpu=True), llama)
    _, optimizer = prepare(Accelerator(cpu=True), llama, GWTAdamW(llama.parameters(), level=1))
    assert type(optimizer.optimizer) is GWTAdamW


def test_batches_that_are_not_split_are_told(monkeypatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_one_process()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: PartialState().num_processes + 1)
    with pytest.warns(
        UserWarning, match="counts 1 process and torch.distributed 2: every rank would train on the same"
    ):
        warn_of_one_process()


def test_lightning_refuses_what_is_not_tested(llama) -> None:
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

    from gwt_dist.integrations.lightning import CheckCallback

    def start(strategy: type, number: int = 1) -> None:
        optimizers = [GWTAdamW(llama.parameters(), level=1) for _ in range(number)]
        trainer = SimpleNamespace(strategy=strategy.__new__(strategy), optimizers=optimizers)
        CheckCallback().on_train_start(trainer, llama)

    start(DDPStrategy)
    with pytest.raises(ValueError, match="FSDPStrategy with 1 optimizers is not tested"):
        start(FSDPStrategy)
    with pytest.raises(ValueError, match="DDPStrategy with 2 optimizers"):
        start(DDPStrategy, 2)
    with pytest.raises(ValueError, match="no parameter of the optimizer is a DTensor"):
        start(ModelParallelStrategy)


@pytest.mark.support("FSDP1", "through a trainer", outcome="refused")
def test_fsdp1_through_a_trainer_is_refused(ranks) -> None:
    for message in ranks(2, through_a_trainer_case):
        assert message.startswith("the trainer wrapped the model in FSDP1, where the names of weights no longer say")
        assert message.endswith("Set the version of FSDP to 2 (fsdp_version or fsdp_config.version)")


def test_commands_of_the_examples_exist() -> None:
    commands = [
        line
        for document in (ROOT / "examples" / "README.md", *sorted((ROOT / "examples").glob("*_*.py")))
        for line in document.read_text().splitlines()
        if line.startswith("torchrun")
    ]
    assert len(commands) == 19
    for command in commands:
        script, flag, choice = re.search(r"(examples/\w+\.py) ?(\S*) ?(\S*)", command).groups()  # type: ignore[union-attr]
        text = (ROOT / script).read_text()
        assert not flag or (f'"{flag}"' in text and f'"{choice}"' in text), command

"""What the ranks of `test_trainer_json.py` run: a DeepSpeed JSON with an optimizer section, in a trainer of others."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from gwt_dist import GWTAdamW, param_groups
from integration_cases import watched, whole

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

SECTION = {
    "type": "GWTAdamW",
    "params": {
        "lr": "auto",
        "betas": "auto",
        "eps": "auto",
        "weight_decay": "auto",
        "level": 2,
        "recipe": "energy",
        "targets": ["attn", "mlp"],
    },
}
WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}


def documented(stage: int) -> dict[str, Any]:
    """A JSON as transformers documents it, everything that its Trainer fills in left to it."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    zero["reduce_bucket_size"] = "auto"
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
        zero |= {"sub_group_size": 1e9, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9}
    return {
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": copy.deepcopy(SECTION),
        "scheduler": copy.deepcopy(WARMUP),
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 2000,
    }


def trainer_of(settings: Any, folder: str, ours: bool = False, late: bool = False, **changed: Any) -> Any:
    """A Trainer of the example's model under this JSON, with `optimizer_cls_and_kwargs` or the callback alone."""
    from accelerate.state import AcceleratorState
    from tiny import BATCH, Text, tiny_llama
    from transformers import TrainingArguments
    from transformers_trainer import CPUTrainer

    from gwt_dist.integrations.transformers import AttachCallback, optimizer_cls_and_kwargs

    AcceleratorState._reset_state()
    if isinstance(settings, dict):
        # On CPUs transformers counts one process when it fills this in.
        settings = {key: value for key, value in settings.items() if key != "train_batch_size"}
    args = TrainingArguments(
        output_dir=folder,
        max_steps=7,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_beta2=0.95,
        warmup_steps=3,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        deepspeed=settings,
        **changed,
    )
    trainer = CPUTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=Text(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args) if ours else None,
        callbacks=[] if late else [AttachCallback()],
    )
    if late:
        trainer.add_callback(AttachCallback())
    return trainer


def one_process(batches: list[list[torch.Tensor]], rates: list[float], options: dict[str, Any]) -> dict[str, Any]:
    """The weights of one process on the mean of the ranks' gradients, at these rates."""
    from tiny import tiny_llama

    model = tiny_llama()
    optimizer = GWTAdamW(param_groups(model, 2, ["attn", "mlp"], **options))
    for step, rate in zip(batches, rates, strict=True):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = torch.tensor(sum(ids[:, 1:].numel() for ids in step))
        for ids in step:
            model(input_ids=ids, labels=ids, num_items_in_batch=tokens).loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def levels_of(optimizer: GWTAdamW) -> dict[str, int]:
    """The level of each tensor of the flat buffers."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            shard = optimizer.shards.get(parameter)
            found |= {fragment.fqn: group["level"] for fragment in (shard.fragments if shard else ())}
    return found


def section_case(stage: int, folder: str) -> dict[str, Any]:
    """A run of the Trainer whose optimizer is a section of the JSON: its groups, and the update of one process."""
    from transformers import TrainerCallback

    from gwt_dist.engines.attach import find_optimizer

    rates: list[float] = []

    class Rates(TrainerCallback):
        def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    with watched() as seen:
        trainer = trainer_of(documented(stage), folder, stage == 3)
        trainer.add_callback(Rates())
        trainer.train()
    optimizer = find_optimizer(trainer.optimizer)
    keys = ("betas", "eps", "weight_decay", "scale", "recipe")
    options = {key: optimizer.param_groups[0][key] for key in keys}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    levels = levels_of(optimizer) if stage < 3 else {}
    from deepspeed import zero
    from tiny import tiny_llama

    with zero.GatheredParameters(list(trainer.model.parameters()), enabled=stage == 3):
        final = whole(trainer.model)
    expected = one_process([list(step) for step in zip(*everyone, strict=True)], rates, options)
    start = dict(tiny_llama().named_parameters())
    return {
        "error": max(
            float((final[n] - expected[n]).abs().max() / (expected[n] - start[n]).abs().max()) for n in expected
        ),
        "levels": levels,
        "options": options,
        "rates": rates,
    }


def page_case(settings: dict[str, Any], folder: str) -> dict[str, int]:
    """The levels of a run whose optimizer is a section of this JSON, by name."""
    from gwt_dist.engines.attach import find_optimizer

    trainer = trainer_of(settings, folder)
    trainer.train()
    return levels_of(find_optimizer(trainer.optimizer))


def refused_cases(folder: str) -> dict[str, str]:
    """What is told of sections that cannot be honoured."""
    path = Path(folder, f"twice-{dist.get_rank()}.json")
    path.write_text('{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 1}}')

    def train(change: dict[str, Any] | None = None, late: bool = False, **params: Any) -> None:
        settings = {**documented(2), **(change or {})}
        settings["optimizer"]["params"] |= params
        trainer_of(settings, folder, late=late).train()

    untargeted = {"optimizer": {"type": "GWTAdamW", "params": {"lr": "auto", "level": 2}}}
    allowed = {**untargeted, "zero_allow_untested_optimizer": True}
    adamw = {**documented(2), "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    cases: dict[str, Callable[[], Any]] = {
        "callback too late": lambda: train(untargeted, late=True),
        "callback too late, allowed": lambda: train(allowed, late=True),
        "callback too late, targets": lambda: train(late=True),
        "another type": lambda: trainer_of(adamw, folder, ours=True),
        "given twice": lambda: trainer_of(documented(2), folder, ours=True, optim_args="level=3"),
        "given twice, callback alone": lambda: trainer_of(documented(2), folder, optim_target_modules=["mlp"]),
        "another type, callback alone": lambda: trainer_of(adamw, folder),
        "decay left out": lambda: trainer_of({**documented(2), **untargeted}, folder),
        "level auto": lambda: train(level="auto"),
        "in quotes": lambda: train(scale="0.5"),
        "unknown": lambda: train(levle=2),
        "target": lambda: train(targets=["mpl"]),
        "stands twice": lambda: trainer_of(str(path), folder),
    }
    return {name: _told(case) for name, case in cases.items()}


def _told(case: Callable[[], Any]) -> str:
    try:
        case()
    except (ValueError, TypeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def accelerate_case(callable_scheduler: bool) -> dict[str, Any]:
    """`prepare` with a `DummyOptim` for the section of the JSON."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DummyOptim, DummyScheduler
    from tiny import spread_on_cpus, tiny_llama

    from gwt_dist.integrations.accelerate import prepare

    settings = documented(2) | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    settings["optimizer"]["params"] = {
        "lr": "auto",
        "weight_decay": "auto",
        "level": 3,
        "recipe": "energy",
        "targets": {"attn": 1, "mlp": 3},
    }
    if callable_scheduler:
        del settings["scheduler"]
    model = tiny_llama()
    with patch.dict(os.environ, ACCELERATE_USE_DEEPSPEED="true"):
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
        spread_on_cpus()
        dummy = DummyOptim(model.parameters(), lr=0.007, weight_decay=0.3)
        make = (lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)) if callable_scheduler else None
        scheduler = DummyScheduler(dummy, warmup_num_steps=2, lr_scheduler_callable=make)
        engine, wrapper, scheduler = prepare(accelerator, model, dummy, scheduler)
    optimizer = wrapper.optimizer.optimizer
    rates = []
    for _ in range(3):
        ids = torch.arange(8).reshape(1, 8)
        accelerator.backward(engine(input_ids=ids, labels=ids).loss)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    AcceleratorState._reset_state(reset_partial_state=True)
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    return {"levels": levels_of(optimizer), "rates": rates, "decays": decays}

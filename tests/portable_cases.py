"""What the ranks of `test_portable.py` run: a Trainer that saves, and others that go on from its checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

STEPS, SAVED, SEQUENCES = 12, 5, 8  # an epoch has 8 steps: saved within the first, and the second is shuffled anew


def zero(stage: int) -> dict[str, Any]:
    """A DeepSpeed JSON of a stage, as short as it can be."""
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage},
        }
    }


def portable_trainer(
    engine: str, folder: str, batch: int, exclude: str | None = None, convert_state: bool = False, **changed: Any
) -> Any:
    """A Trainer whose checkpoints are portable, `batch` sequences a rank and backward pass; some are dropped out."""
    from accelerate.state import AcceleratorState
    from tiny import Text, tiny_llama
    from transformers import Trainer, TrainingArguments
    from transformers_trainer import ENGINES, CPUTrainer

    from gwt_dist.integrations.transformers import portable, trainer_kwargs

    AcceleratorState._reset_state()
    stage = int(engine[4:]) if engine.startswith("zero") else 0
    if stage:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` does
    dropout, state_dtype = changed.pop("dropout", 0.0), changed.pop("state_dtype", None)
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "learning_rate": 4e-3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "save_steps": SAVED,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": not stage,
        **(zero(stage) if stage else ENGINES.get(engine, {})),
        **changed,
    }
    args = TrainingArguments(**options)
    model = tiny_llama()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    if exclude:
        model.get_input_embeddings().requires_grad_(False)
    data = Text(size=8 * SEQUENCES)
    kind = CPUTrainer if dist.is_initialized() else Trainer
    said = trainer_kwargs(args, level=2, recipe="energy", state_dtype=state_dtype)
    trainer = kind(model=model, args=args, train_dataset=data, **said)
    return portable(trainer, exclude=exclude or (), convert_state=convert_state)


def losses_case(engine: str, folder: str, batch: int, resume: str | None = None, **changed: Any) -> dict[int, float]:
    """Losses by step, of those before a checkpoint that is resumed too."""
    trainer = portable_trainer(engine, folder, batch, **changed)
    trainer.train(resume_from_checkpoint=resume)
    (held,) = (callback.held for callback in trainer.callback_handler.callbacks if hasattr(callback, "held"))
    assert held == {"zero": "flat shards", "fsdp": "DTensors"}.get(engine[:4], "whole tensors")
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}

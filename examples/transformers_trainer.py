"""transformers' Trainer with DeepSpeed or FSDP2.

torchrun --standalone --nproc-per-node 2 examples/transformers_trainer.py --engine deepspeed
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from accelerate import FullyShardedDataParallelPlugin
from tiny import BATCH, STEPS, Text, spread_on_cpus, tiny_llama
from transformers import Trainer, TrainingArguments

from gwt_dist.integrations.transformers import trainer_kwargs

OPTIMIZER = {"optim_target_modules": ["attn", "mlp"], "optim_args": "level=2, recipe=energy"}
ENGINES = {
    "ddp": {},
    "deepspeed": {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": 2},
        }
    },
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
}


class CPUTrainer(Trainer):
    """Trainer that shards and splits its data on CPUs too; with GPUs use Trainer itself."""

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, and FSDP switched on."""
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args) if self.args.fsdp else None
        spread_on_cpus(plugin)
        self.is_fsdp_enabled = bool(self.args.fsdp)


def train(engine: str, output: str, resume: bool = False, steps: int = STEPS) -> Trainer:
    """Train for `steps` steps, or from the last checkpoint in `output` on."""
    args = TrainingArguments(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="steps" if engine == "deepspeed" else "no",
        save_steps=10,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=engine != "deepspeed" and not torch.cuda.is_available(),  # with DeepSpeed it would switch that off
        **OPTIMIZER,
        **ENGINES[engine],
    )
    trainer = CPUTrainer(model=tiny_llama(), args=args, train_dataset=Text(), **trainer_kwargs(args))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, default="deepspeed")
    parser.add_argument("--output", help="folder for checkpoints")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trained = train(options.engine, options.output or folder)
        losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

"""The keys of a DeepSpeed JSON, and which values they can have."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

AUTO = "auto"
TYPE = "GWTAdamW"  # of an optimizer section that is ours

# Every top-level key that DeepSpeed 0.19.8 reads, in the order of its runtime/config.py.
TOP_LEVEL_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "steps_per_print",
    "dump_state",
    "disable_python_gc",
    "disable_allgather",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "activation_checkpointing",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "fp16",
    "bf16",
    "bfloat16",
    "torch_autocast",
    "optimizer",
    "scheduler",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "autotuning",
    "use_data_before_expert_parallelism",
    "hybrid_engine",
    "pipeline",
    "data_efficiency",
    "checkpoint",
    "data_types",
    "aio",
    "dataloader_drop_last",
    "log_level",
    "datastates_ckpt",
    "weight_quantization",
    "compile",
    "timers",
    "tensor_parallel",
    "expert_parallel",
    "sequence_parallel_size",
    "data_parallel_size",
    "vocabulary_size",
)
OURS = "gwt"  # a section that DeepSpeed does not read: `gwt_dist.initialize` does, and takes it out
OURS_KEYS = ("compress_activations",)
OPTIMIZER_KEYS = ("type", "params", "legacy_fusion")

# What transformers' Trainer puts in the place of "auto"; Accelerate does for most of them.
FILLED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16.enabled",
    "bf16.enabled",
    *(f"optimizer.params.{key}" for key in ("lr", "betas", "eps", "weight_decay")),
    *(f"scheduler.params.{key}" for key in ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")),
    *(
        f"zero_optimization.{key}"
        for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    ),
)
# Where "auto" is a value of DeepSpeed's own.
OWN_AUTO = (
    "autotuning",
    "expert_parallel",
    "pipeline",
    "data_types.keep_in_fp32_modules",
    "zero_optimization.zenflow",
)

_Kind = tuple[Callable[[Any], bool], str]


def _is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _is_number(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return 0 <= float(value) and math.isfinite(value)


_FLAG: _Kind = (lambda v: v in (True, False) and not isinstance(v, str), "true or false")
_SIZE: _Kind = (lambda v: _is_number(v) and v == int(v), "a whole number, 0 or more")  # 5e8 is one
_COUNT: _Kind = (lambda v: _is_whole(v, 1), "a whole number, 1 or more")
_NUMBER: _Kind = (_is_number, "a number, 0 or more")
SECTION: _Kind = (lambda v: isinstance(v, Mapping), "an object, {...}")
_TEXT: _Kind = (lambda v: isinstance(v, str), "text")

_KINDS: dict[str, _Kind] = {
    "train_batch_size": _COUNT,
    "train_micro_batch_size_per_gpu": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "sequence_parallel_size": _COUNT,
    "data_parallel_size": _COUNT,
    "gradient_clipping": _NUMBER,
    "zero_allow_untested_optimizer": _FLAG,
    "zero_force_ds_cpu_optimizer": _FLAG,
    "prescale_gradients": _FLAG,
    **dict.fromkeys(("zero_optimization", "bf16", "bfloat16", "fp16", "torch_autocast", "optimizer"), SECTION),
    **dict.fromkeys(("scheduler", "data_types", "tensor_parallel", "checkpoint"), SECTION),
    "zero_optimization.stage": (lambda v: _is_whole(v, 0, 3), "0, 1, 2 or 3"),
    **{
        f"zero_optimization.{key}": _SIZE
        for key in (
            "reduce_bucket_size",
            "allgather_bucket_size",
            "sub_group_size",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "zero_hpz_partition_size",
        )
    },
    **{
        f"zero_optimization.{key}": _FLAG
        for key in (
            "contiguous_gradients",
            "reduce_scatter",
            "allgather_partitions",
            "overlap_comm",
            "compute_grad_norm",
            "elastic_checkpoint",
            "round_robin_gradients",
            "parameter_alignment",
            "stage3_gather_16bit_weights_on_model_save",
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
            "cpu_offload",
            "cpu_offload_param",
            "offload_optimizer.super_offload",
            "offload_optimizer.pin_memory",
            "offload_param.pin_memory",
        )
    },
    # -1, the default, is none.
    "zero_optimization.mics_shard_size": (lambda v: _is_whole(v, -1), "a whole number, -1 or more"),
    "zero_optimization.offload_optimizer": SECTION,
    "zero_optimization.offload_param": SECTION,
    "zero_optimization.offload_optimizer.device": _TEXT,
    "zero_optimization.offload_param.device": _TEXT,
    "zero_optimization.offload_optimizer.ratio": (lambda v: _is_number(v) and v <= 1, "a number from 0 to 1"),
    **{
        f"{section}.{key}": _FLAG
        for section, flags in {
            "bf16": ("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_optimizer_states"),
            "bfloat16": ("enabled",),
            "fp16": ("enabled", "auto_cast", "fp16_master_weights_and_grads"),
            "torch_autocast": ("enabled",),
            "checkpoint": ("load_universal",),
        }.items()
        for key in flags
    },
    "bf16.bf16_master_weights_and_grads": _FLAG,
    "fp16.loss_scale": _NUMBER,
    "tensor_parallel.autotp_size": (lambda v: _is_whole(v, 0), "a whole number, 0 or more"),
    "optimizer.type": _TEXT,
    "optimizer.params": SECTION,
    "scheduler.type": _TEXT,
    "scheduler.params": SECTION,
}
# DeepSpeed takes null there for what is not said.
_MAY_BE_NULL = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "bf16",
    "optimizer.params",
    "scheduler.type",
    "scheduler.params",
    *(f"zero_optimization.{key}" for key in ("overlap_comm", "offload_optimizer", "offload_param")),
    *(f"zero_optimization.{key}" for key in ("cpu_offload", "cpu_offload_param")),
)


def problem(path: str, found: Any) -> str:
    """What is wrong with the value of a key, "" for nothing."""
    if path not in _KINDS or (found is None and path in _MAY_BE_NULL):
        return ""
    legal, kind = _KINDS[path]
    return "" if legal(found) else must_be(path, found, kind)


def must_be(path: str, found: Any, kind: str) -> str:
    """The sentence for a value that is not of its kind."""
    quoted = "; write it without quotes" if isinstance(found, str) and kind != SECTION[1] else ""
    shown = "null" if found is None else repr(found)
    return f"{path}={shown} of the DeepSpeed JSON must be {kind}{quoted}"

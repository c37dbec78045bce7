"""What DeepSpeed can be asked for that `GWTAdamW` refuses: the update would be another one, in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gwt_dist import ds_json
from gwt_dist.recipes import DEFAULT, WITHOUT_PRODUCTS, program_of
from gwt_dist.steps import Group

# Section and key, the values that are refused, and why with the way out.
_REFUSED: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (
        ("zero_optimization", "elastic_checkpoint"),
        lambda value: value,
        "it cuts the end off every state tensor of a padded rank; remove it. Checkpoints of the same world size work, "
        "and gwt_dist.save and gwt_dist.load move between world sizes",
    ),
    (
        ("zero_optimization", "compute_grad_norm"),
        lambda value: value is False,
        "a gradient that is not finite would reach one rank alone and the others would wait for it; remove it",
    ),
    (
        ("bf16", "check_grad_overflow"),
        lambda value: value is False,
        "a gradient that is not finite would reach the moments of one rank alone; remove it",
    ),
    (
        ("zero_optimization", "offload_optimizer", "device"),
        lambda value: value == "nvme",
        'states on NVMe are swapped as full-size Adam moments; use "cpu" or no offload',
    ),
    (
        ("zero_optimization", "offload_optimizer", "ratio"),
        lambda value: value < 1,
        "a partial offload is made for DeepSpeedCPUAdam alone; remove it",
    ),
    (
        ("zero_optimization", "offload_optimizer", "super_offload"),
        lambda value: value,
        "SuperOffload steps with an Adam of its own; remove it",
    ),
    (
        ("zero_optimization", "offload_param", "device"),
        lambda value: value == "nvme",
        'the weights are not in memory, so their layout cannot be checked; use "cpu" or no offload',
    ),
    (
        ("zero_optimization", "zenflow"),
        lambda _: True,
        "ZenFlow steps on chosen columns with its own optimizer; remove it",
    ),
    (
        ("zero_optimization", "zero_hpz_partition_size"),
        lambda value: value > 1,
        "the second partition of the weights (hpZ) is not tested; remove it",
    ),
    (
        ("zero_optimization", "mics_shard_size"),
        lambda value: value > 0,
        "shards over a part of the ranks (MiCS) are not tested; remove it",
    ),
    *(
        (("zero_optimization", key), lambda value: value, "quantized communication is not tested; remove it")
        for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    ),
    *(
        ((section, key), lambda value: value, "the master weights must be fp32, or small steps are lost; remove it")
        for section, key in (("bf16", "bf16_master_weights_and_grads"), ("fp16", "fp16_master_weights_and_grads"))
    ),
    (
        ("bf16", "bf16_optimizer_states"),
        lambda value: value,
        "it is an option of DeepSpeedCPUAdam, and bf16 second moments cannot decay; remove it",
    ),
    (
        ("tensor_parallel", "autotp_size"),
        lambda value: value > 1,
        "each rank would transform its part of a matrix as if it were the whole; shard with ZeRO alone, or with "
        "FSDP2 and torch's tensor parallelism",
    ),
    (
        ("checkpoint", "load_universal"),
        lambda value: value,
        "universal checkpoints assume moments as large as the weights; remove it. gwt_dist.save and gwt_dist.load move "
        "between world sizes and engines",
    ),
)


def refuse(config: Mapping[str, Any] | Any | None) -> None:
    """Raise `ValueError` for the first setting under which the update could not be right.

    `config` is the JSON as a mapping, or DeepSpeed's own configuration object.
    """
    for reason in reasons(config):
        raise ValueError(reason)


def reasons(config: Mapping[str, Any] | Any | None) -> Iterator[str]:
    """Why each setting is refused that `refuse` would refuse."""
    settings = getattr(config, "_param_dict", config)
    if not isinstance(settings, Mapping):
        return
    mistaken = list(ds_json.mistakes(settings))
    yield from mistaken
    if mistaken:  # what is of another kind cannot be compared
        return
    for path, wrong, why in _REFUSED:
        value: Any = settings
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        # DeepSpeed has its own default, which is fine, for null and what a trainer left at "auto".
        if value not in (None, ds_json.AUTO) and wrong(value):
            yield f"{'.'.join(path)}={value!r} cannot be used with GWTAdamW: {why}"
    autocast = _section(settings, "torch_autocast")
    if autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16", "half"):
        yield (
            "torch_autocast with float16 cannot be used with GWTAdamW: each rank skips overflowing steps by itself, so "
            "ranks would wait for each other; use bfloat16"
        )
    if _section(settings, "fp16").get("enabled") is True and not _stage(settings):
        yield (
            "fp16 without ZeRO cannot be used with GWTAdamW: at stage 0 DeepSpeed divides the gradients by a loss "
            "scale that it never multiplied in; set zero_optimization.stage to 1, 2 or 3, or use bf16"
        )


def refuse_groups(settings: Mapping[str, Any], groups: Iterable[Group]) -> None:
    """Raise `ValueError` for parameter groups that DeepSpeed would break under these settings."""
    groups = list(groups)
    for i, group in enumerate(groups):
        if group["params"] and not any(p.requires_grad for p in group["params"]) and _stage(settings):
            raise ValueError(
                f"parameter group {i} holds {len(group['params'])} parameters and none of them is trained; ZeRO has no "
                f"flat buffer for it and would fail or skip it. Leave frozen parameters out of the groups"
            )
        if group.get("stochastic_rounding") and _has_masters(settings):
            raise ValueError(
                f"parameter group {i} says stochastic_rounding=True, which is for bf16 weights that are all there is, "
                f"and DeepSpeed steps on fp32 masters (at stage 1 and above, and with its bf16 section): they lose no "
                f"change, and the weights are made of them by DeepSpeed. Leave stochastic_rounding out of the group"
            )
    scheduler = _section(settings, "scheduler")
    highest = _section(scheduler, "params").get("warmup_max_lr")
    # These scale the rate of each group; all others, and a single maximum, overwrite it.
    keeps = scheduler.get("type") in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR") and not isinstance(
        highest, (int, float)
    )
    rates = sorted({float(group["lr"]) for group in groups})
    if scheduler and len(rates) > 1 and not keeps:
        raise ValueError(
            f"the parameter groups have the learning rates {rates}, and the scheduler section "
            f"({scheduler.get('type')!r}) would set all of them to the same rate. Leave out warmup_max_lr of a Warmup "
            f"scheduler or give one value a group, or pass lr_scheduler=, a torch scheduler that scales each rate"
        )


def offload_note(settings: Mapping[str, Any], optimizer: Any) -> str:
    """What to tell who named no recipe for a `GWTAdamW` that DeepSpeed lets step on the CPU; '' for others."""
    offload = _section(_section(settings, "zero_optimization"), "offload_optimizer")
    products = any(program_of(group, group["level"]).travels for group in optimizer.param_groups)
    if not (optimizer.is_default and products and offload.get("device") == "cpu"):
        return ""
    return (
        f"zero_optimization.offload_optimizer lets the optimizer step on the CPU, and no recipe was named: the "
        f"default, {DEFAULT!r}, multiplies whole matrices there, which may take most of a step. Write "
        f'"recipe": "{WITHOUT_PRODUCTS}" for a step that goes element by element, or "recipe": "{DEFAULT}" if this is '
        f"meant"
    )


def refuse_experts(named_parameters: Iterable[tuple[str, Any]]) -> None:
    """Raise `ValueError` for the parameters of experts."""
    for name, parameter in named_parameters:
        if not getattr(parameter, "allreduce", True):
            raise ValueError(
                f"parameter {name!r} belongs to an expert of DeepSpeed's MoE layer, whose gradients DeepSpeed may sum "
                f"over other ranks than the rest, whatever its ep_size; expert parallelism is not tested and refused. "
                f"Use a layer of plain parameters, as transformers' mixtures have, which ZeRO shards"
            )


def refuse_parallel(engine: Any) -> None:
    """Raise `ValueError` for experts, tensor and pipeline parallelism; `engine` is an engine or its optimizer.

    Sequence parallelism splits no tensor: the ranks of a sequence have the same weights, and ZeRO shards over all.
    """
    refuse_experts((name, parameter) for parameter, name in getattr(engine, "param_names", {}).items())
    mpu = getattr(engine, "mpu", None)
    stages = 1
    if mpu is not None:
        from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size

        size, stages = _tensor_parallel(mpu), bwc_pipeline_parallel_world_size(mpu)
        if size > 1:
            raise ValueError(
                f"the engine splits tensors over {size} ranks (tensor parallelism, from its mpu): each rank would "
                f"transform its part of a matrix as if it were the whole. Shard with ZeRO alone"
            )
    _refuse_apart(engine)
    if stages > 1 or getattr(engine, "pipeline_parallelism", False):
        raise ValueError("pipeline parallelism is not tested with GWTAdamW and refused. Shard with ZeRO alone")


def _refuse_apart(engine: Any) -> None:
    """Raise `ValueError` if the ranks of a sequence are not among those that gradients are summed over."""
    group = getattr(engine, "seq_data_parallel_group", None) or getattr(engine, "dp_process_group", None)
    split = getattr(engine, "sequence_parallel_size", 1)
    if split == 1 or group is None:
        return
    from deepspeed.utils import groups

    ranks = dist.get_process_group_ranks(groups._get_sequence_parallel_group())
    if not set(ranks) <= set(dist.get_process_group_ranks(group)):
        raise ValueError(
            f"each sequence is split over {split} ranks ({ranks}), and DeepSpeed does not sum gradients over them: "
            f"they would train apart in silence. So it is where a device mesh splits them (mesh_param, or "
            f"data_parallel_size beside sequence_parallel_size in the JSON). Remove it, call "
            f"initialize_sequence_parallel of deepspeed.runtime.sequence_parallel.parallel_state_sp and pass that "
            f"module as mpu"
        )


def _tensor_parallel(mpu: Any) -> int:
    """Ranks that a tensor is split over."""
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

    # DeepSpeed's own mpu for Ulysses gives its sequence parallel group under the old name of the model parallel one;
    # DeepSpeed tells it by this function too. An mpu that has tensor parallelism as well says so under the new name.
    if hasattr(mpu, "initialize_sequence_parallel") and not hasattr(mpu, "get_tensor_model_parallel_world_size"):
        return 1
    return int(bwc_tensor_model_parallel_world_size(mpu))


def refuse_swapped(optimizer: Sequence[Any], engine: Sequence[Any]) -> None:
    """Raise `ValueError` if the engine steps with another optimizer; both arguments are wrappers, outermost first."""
    if any(type(thing).__name__ == "DeepSpeedCPUAdam" for thing in (*optimizer, *engine)):
        raise ValueError(
            "the engine steps with DeepSpeedCPUAdam and not with GWTAdamW: under offload_optimizer, Accelerate and the "
            "Trainer put it in the place of your optimizer and keep the learning rate and weight decay alone, so this "
            'run would train with Adam in silence. Set "zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON'
        )
    used = engine[-1]
    if isinstance(used, torch.optim.Optimizer) and not any(thing is used for thing in optimizer):
        raise ValueError(
            f"the engine steps with a {type(used).__name__} of its own and not with the optimizer that was passed to "
            f"attach, which would never step. Pass engine.optimizer"
        )


def _stage(settings: Mapping[str, Any]) -> int:
    stage = _section(settings, "zero_optimization").get("stage")
    return 0 if stage in (None, ds_json.AUTO) else int(stage)


def _has_masters(settings: Mapping[str, Any]) -> bool:
    return _stage(settings) > 0 or any(_section(settings, name).get("enabled") is True for name in ("bf16", "fp16"))


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section, empty where there is none or it is "auto", which `ds_json.refuse` tells."""
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}

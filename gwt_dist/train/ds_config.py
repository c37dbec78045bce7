"""The DeepSpeed JSON, checked before DeepSpeed sees it.

DeepSpeed ignores unknown top-level keys in silence and asserts on batch sizes; here both are one
clear error. Nothing is filled in but the batch sizes, so the JSON stays the one place for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gwt_dist import ds_json
from gwt_dist.ds_json import OPTIMIZER_KEYS, OURS, TOP_LEVEL_KEYS
from gwt_dist.train.config import read_mapping, refuse_unknown_keys


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Sequences: `train` = `micro` (one forward of one rank) * `accumulation` * world size."""

    train: int
    micro: int
    accumulation: int


def load(
    path: Path,
    world_size: int,
    begun: Mapping[str, int] | None = None,
    params: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], BatchSizes]:
    """The JSON at `path` as a dict, with all three batch sizes filled in, and those sizes.

    Args:
        path: The DeepSpeed JSON.
        world_size: Ranks of this start.
        begun: Of a run that is resumed, `sequences` of a step and the `ranks` that it began on. A step keeps its
            sequences on any number of ranks; accumulation follows.
        params: What the run says of `optimizer.params` in the place of the JSON; None is left to it.

    Raises:
        ValueError: unknown key or optimizer parameter, a section that the recipe sets itself, batch sizes that do not
            multiply out for `world_size` ranks, or a step that they cannot share evenly.
    """
    content = read_mapping(path) if path.suffix in (".yaml", ".yml") else ds_json.read(path)
    refuse_unknown_keys(content, (*TOP_LEVEL_KEYS, OURS), str(path))
    ds_json.refuse(content, str(path))
    if (content.get("sequence_parallel_size") or 1) > 1:
        raise ValueError(
            f"sequence_parallel_size={content['sequence_parallel_size']} in {path}: the recipe gives each rank "
            f"sequences of its own and does not split one over ranks; remove it"
        )
    if "scheduler" in content:
        raise ValueError(
            f"section 'scheduler' in {path}: the learning rate would have two schedules; remove it "
            "and set warmup_steps, steps and min_lr_ratio of the run instead"
        )
    _check_sections(content, path)
    said = {key: value for key, value in (params or {}).items() if value is not None}
    _check_optimizer(content, path, said)
    sizes = batch_sizes(content, world_size if begun is None else begun["ranks"], str(path))
    if begun is not None and world_size != begun["ranks"]:
        try:
            for_these = batch_sizes(content, world_size, str(path))
        except ValueError:
            for_these = None
        fits = for_these is not None and for_these.train == begun["sequences"]
        sizes = for_these if for_these is not None and fits else shared_out(sizes, world_size, str(path))
    content["train_batch_size"] = sizes.train
    content["train_micro_batch_size_per_gpu"] = sizes.micro
    content["gradient_accumulation_steps"] = sizes.accumulation
    return content, sizes


def shared_out(sizes: BatchSizes, world_size: int, where: str) -> BatchSizes:
    """`sizes` for another number of ranks: as many sequences in a step, no more at once on a rank.

    Raises:
        ValueError: the ranks cannot share a step evenly; names the numbers of ranks that can.
    """
    if sizes.train % world_size:
        can = [str(n) for n in range(1, sizes.train + 1) if sizes.train % n == 0]
        raise ValueError(
            f"a step of this run takes {sizes.train} sequences (see {where}), which {world_size} ranks cannot share "
            f"evenly. Start it on {', '.join(can[:-1])}{' or ' if can[:-1] else ''}{can[-1]} ranks"
        )
    own = sizes.train // world_size
    micro = next(n for n in range(min(sizes.micro, own), 0, -1) if own % n == 0)
    return BatchSizes(sizes.train, micro, own // micro)


def batch_sizes(content: dict[str, Any], world_size: int, where: str) -> BatchSizes:
    """The three batch sizes of a DeepSpeed JSON; one that is absent follows from the other two.

    Raises:
        ValueError: not whole positive numbers, too few given, or the product is wrong.
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for name in names:
        value = content.get(name)
        value = 1 if value is None else value  # null is what is not said, as for DeepSpeed
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} in {where} must be a whole number, 1 or more")
    train: int | None
    train, micro, accumulation = (content.get(name) for name in names)
    if train is None:
        if micro is None:
            raise ValueError(
                f"{where} gives neither train_batch_size nor train_micro_batch_size_per_gpu; add at least one of them"
            )
        accumulation = accumulation or 1
        train = micro * accumulation * world_size
    elif micro is None:
        accumulation = accumulation or 1
        micro = max(train // (accumulation * world_size), 1)
    elif accumulation is None:
        accumulation = max(train // (micro * world_size), 1)
    product = micro * accumulation * world_size
    if train != product:
        raise ValueError(
            f"batch sizes in {where} do not multiply out: train_micro_batch_size_per_gpu {micro} * "
            f"gradient_accumulation_steps {accumulation} * {world_size} ranks = {product}, but "
            f"train_batch_size = {train}; correct one of them or leave train_batch_size out"
        )
    return BatchSizes(train=train, micro=micro, accumulation=accumulation)


def zero_stage(content: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed JSON, 0 to 3."""
    return int(ds_json.value(content, "zero_optimization.stage", 0))


def precision(content: dict[str, Any]) -> str:
    """'bf16', 'fp16' or 'fp32': the storage of the weights that the forward pass uses."""
    return ds_json.precision(content)


def _check_sections(content: dict[str, Any], path: Path) -> None:
    # Imported late: it takes seconds and --help does not need it.
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for section, model in models.items():
        value = content.get(section) or {}
        fields = model.model_fields
        known = set(fields) | {item.alias for item in fields.values() if item.alias}
        refuse_unknown_keys(value, known, f"section {section!r} of {path}")


def _check_optimizer(content: dict[str, Any], path: Path, said: Mapping[str, Any]) -> None:
    """Check the section, with the values that are `said` in the place of its own, which are put there."""
    section = content.get("optimizer")
    if not isinstance(section, dict) or "type" not in section:
        raise ValueError(
            f"{path} has no optimizer: add a section such as "
            '"optimizer": {"type": "GWTAdamW", "params": {"lr": 0.001}}'
        )
    refuse_unknown_keys(section, OPTIMIZER_KEYS, f"section 'optimizer' of {path}")
    kind, params = section["type"], {**(section.get("params") or {}), **said}
    if said:
        section["params"] = params
    where = f"{path} and {', '.join(said)} of the run" if said else str(path)
    known = _optimizer_parameters(kind, path)
    if known is not None:
        refuse_unknown_keys(params, known, f"optimizer.params of {where} ({kind})")
    if kind == ds_json.TYPE:
        ds_json.checked(params)
    lr = params.get("lr")
    if not isinstance(lr, (int, float)) or isinstance(lr, bool) or lr < 0:
        raise ValueError(f"optimizer.params.lr={lr!r} in {where}: expected a number, 0 or more")


def _optimizer_parameters(kind: str, path: Path) -> set[str] | None:
    """Names that `optimizer.params` may hold; None where DeepSpeed's own class decides."""
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    from gwt_dist import GWTAdamW, param_groups
    from gwt_dist.keys import of_recipes

    if kind == ds_json.TYPE:
        return _keywords(GWTAdamW) | _keywords(param_groups) | set(of_recipes())
    if str(kind).lower() in ("adam", "adamw"):
        return _keywords(torch.optim.AdamW) | {"torch_adam", "adam_w_mode"}
    if str(kind).lower() in DEEPSPEED_OPTIMIZERS:
        return None
    if not isinstance(getattr(torch.optim, str(kind), None), type):
        raise ValueError(
            f"optimizer.type={kind!r} in {path}: expected 'GWTAdamW', a name of torch.optim, or "
            f"one of DeepSpeed's ({', '.join(DEEPSPEED_OPTIMIZERS)})"
        )
    return _keywords(getattr(torch.optim, kind))


def _keywords(function: Any) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named - {"self", "params", "model"}

"""`initialize`: `deepspeed.initialize` for a JSON whose optimizer is GWTAdamW."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gwt_dist.engines import refusals
from gwt_dist.engines.attach import attach
from gwt_dist.groups import param_groups
from gwt_dist.keys import refuse_unknown
from gwt_dist.optimizer import GWTAdamW
from gwt_dist.replaced import refuse_stepped

TYPE = "GWTAdamW"


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | Path | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Path | Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, same arguments and return, for wavelet-space moments.

    With ``{"optimizer": {"type": "GWTAdamW", "params": {"lr": 0.01, "level": 2, "targets": ["attn", "mlp"]}}}`` in the
    JSON it builds the parameter groups by name (`param_groups`), the optimizer and the engine, and attaches them; a
    `GWTAdamW` that is passed as `optimizer` is attached too. `model_parameters` narrows the choice to these
    parameters, or keeps the options of these groups. Any other optimizer goes to DeepSpeed as it is.

    Returns:
        ``(engine, optimizer, training_dataloader, lr_scheduler)``.

    Raises:
        ValueError: For an unknown key in ``optimizer.params``, an optimizer given twice, targets that match nothing,
            or a DeepSpeed setting under which the update could not be right.
        LayoutError: If DeepSpeed lays its buffers out in a way that this version does not know.
    """
    import deepspeed

    settings = settings_of(args, config if config is not None else config_params)
    build = _builder(settings, model, optimizer, model_parameters)
    keywords: dict[str, Any] = {} if distributed_port is None else {"distributed_port": distributed_port}
    result: tuple[Any, Any, Any, Any] = deepspeed.initialize(
        args=args if settings is None else None,
        model=model,
        optimizer=optimizer if build is None else build,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=settings,
        mesh_param=mesh_param,
        **keywords,
    )
    engine = result[0]
    if isinstance(engine.basic_optimizer, GWTAdamW):
        attach(engine.basic_optimizer, engine)
    return result


def settings_of(args: Any, config: str | Path | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The JSON as a dict of our own, or None if there is none."""
    if config is None:
        config = getattr(args, "deepspeed_config", None)
    if config is None or isinstance(config, Mapping):
        return None if config is None else copy.deepcopy(dict(config))
    path = Path(config)
    if not path.is_file():
        raise ValueError(f"DeepSpeed configuration {str(path)!r} is not a file")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"DeepSpeed configuration {str(path)!r} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"DeepSpeed configuration {str(path)!r} holds {type(settings).__name__}, not an object")
    return settings


def _builder(
    settings: dict[str, Any] | None, model: nn.Module | None, optimizer: Any, model_parameters: Any
) -> Callable[[Any], GWTAdamW] | None:
    """A function that builds the optimizer of the JSON, and `settings` made ready for it; None if it is not ours."""
    section = (settings or {}).get("optimizer") or {}
    if settings is not None and section.get("type") == TYPE:
        if optimizer is not None:
            raise ValueError(
                f"the JSON has an optimizer section of type {TYPE} and an optimizer was passed too; DeepSpeed would "
                f"ignore the section in silence. Remove one of them"
            )
        if model is None:
            raise ValueError("model is None; parameter groups are built from the names of its modules")
        options = checked(section.get("params") or {})
        del settings["optimizer"]
        _prepare(settings, model)
        given = None if model_parameters is None else list(model_parameters)

        def build(_: Any) -> GWTAdamW:
            built = GWTAdamW(param_groups(model, params=given, **options))
            refusals.refuse_groups(settings, built.param_groups)
            return built

        return build
    if settings is not None and isinstance(optimizer, GWTAdamW):
        if section:
            raise ValueError(
                f"the JSON has an optimizer section of type {section.get('type')!r} and a GWTAdamW was passed too; "
                f"DeepSpeed "
                f"would ignore the section in silence. Remove one of them"
            )
        _prepare(settings, model)
        refuse_stepped(optimizer.state)
        refusals.refuse_groups(settings, optimizer.param_groups)
    return None


def _prepare(settings: dict[str, Any], model: nn.Module | None) -> None:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    refusals.refuse(settings)
    refusals.refuse_experts([] if model is None else model.named_parameters())
    if GWTAdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(GWTAdamW)
    if (settings.get("zero_optimization") or {}).get("offload_optimizer"):
        # True, the default, makes wrappers put DeepSpeedCPUAdam in the place of the optimizer.
        settings["zero_force_ds_cpu_optimizer"] = False


def checked(params: Mapping[str, Any]) -> dict[str, Any]:
    """``optimizer.params`` as keywords of `GWTAdamW` and `param_groups`; raises `ValueError` for an unknown key."""
    refuse_unknown(params, "optimizer.params", "targets")
    options = dict(params)
    if isinstance(options.get("betas"), list):
        options["betas"] = tuple(options["betas"])
    return options

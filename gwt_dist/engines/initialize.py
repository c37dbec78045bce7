"""`initialize`: `deepspeed.initialize` for a JSON whose optimizer is GWTAdamW."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gwt_dist import ds_json
from gwt_dist.activations import compress_activations
from gwt_dist.ds_json import TYPE, checked
from gwt_dist.engines import refusals
from gwt_dist.engines.attach import attach
from gwt_dist.engines.section import support
from gwt_dist.groups import param_groups
from gwt_dist.optimizer import GWTAdamW
from gwt_dist.replaced import refuse_stepped

logger = logging.getLogger(__name__)


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

    With ``{"optimizer": {"type": "GWTAdamW", "params": {"lr": 0.001, "targets": ["attn", "mlp"]}}}`` in the JSON
    it builds the parameter groups by name (`param_groups`), the optimizer and the engine, and attaches them; a
    `GWTAdamW` that is passed as `optimizer` is attached too. `model_parameters` narrows the choice to these
    parameters, or keeps the options of these groups. Any other optimizer goes to DeepSpeed as it is. A section
    ``"gwt": {"compress_activations": true}`` compresses activations, or with the arguments of `compress_activations`
    in the place of true.

    Returns:
        ``(engine, optimizer, training_dataloader, lr_scheduler)``.

    Raises:
        ValueError: For a JSON that DeepSpeed's reader would refuse, "auto" and values of a wrong kind, an unknown key
            in ``optimizer.params``, an optimizer or a JSON given twice, targets that match nothing, or a DeepSpeed
            setting under which the update could not be right.
        LayoutError: If DeepSpeed lays its buffers out in a way that this version does not know.
    """
    import deepspeed

    settings = settings_of(args, config if config is not None else config_params)
    _follow((settings or {}).pop(ds_json.OURS, None), model)
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


def _follow(ours: Any, model: nn.Module | None) -> None:
    """Do what the section of the JSON says that DeepSpeed does not read; raises `ValueError` for what it cannot say."""
    for mistake in ds_json.mistakes({} if ours is None else {ds_json.OURS: ours}):
        raise ValueError(mistake)
    wanted = (ours or {}).get("compress_activations", False)
    if wanted is not True and not isinstance(wanted, Mapping):
        if wanted is not False:
            raise ValueError(
                f"gwt.compress_activations={wanted!r} in the DeepSpeed JSON must be true, false or the arguments of "
                f"compress_activations"
            )
        return
    if model is None:
        raise ValueError("gwt.compress_activations in the DeepSpeed JSON needs the model, and it is None")
    try:
        compress_activations(model, **(wanted if isinstance(wanted, Mapping) else {}))
    except TypeError as error:
        raise ValueError(f"gwt.compress_activations in the DeepSpeed JSON: {error}") from None


def settings_of(args: Any, config: str | Path | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The JSON as a dict of our own, or None if there is none; raises `ValueError` as `gwt_dist.ds_json.read` does."""
    # DeepSpeed moves the older name to the newer one.
    named = [getattr(args, name, None) for name in ("deepspeed_config", "deepscale_config")]
    given = [one for one in (config, *named) if one is not None]
    if len(given) > 1:
        raise ValueError(
            f"{len(given)} DeepSpeed configurations are given, as an argument and in args, and one would be ignored; "
            f"pass one of them"
        )
    return ds_json.settings_of(given[0]) if given else None


def _builder(
    settings: dict[str, Any] | None, model: nn.Module | None, optimizer: Any, model_parameters: Any
) -> Callable[[Any], GWTAdamW] | None:
    """A function that builds the optimizer of the JSON, and `settings` made ready for it; None if it is not ours."""
    if settings is None:
        return None
    for wrong in ds_json.misspelt(settings):  # "optimzer" would have no optimizer, or another
        raise ValueError(wrong)
    params = ds_json.section_of(settings)
    if params is not None:
        if optimizer is not None:
            raise ValueError(
                f"the JSON has an optimizer section of type {TYPE} and an optimizer was passed too; DeepSpeed would "
                f"ignore the section in silence. Remove one of them"
            )
        if model is None:
            raise ValueError("model is None; parameter groups are built from the names of its modules")
        ds_json.refuse(settings)
        options = checked(params)
        del settings["optimizer"]
        prepare_settings(settings, model)
        given = None if model_parameters is None else list(model_parameters)

        def build(_: Any) -> GWTAdamW:
            built = GWTAdamW(param_groups(model, params=given, **options))
            _check_groups(settings, built)
            return built

        return build
    if isinstance(optimizer, GWTAdamW):
        if settings.get("optimizer"):
            raise ValueError(
                f"the JSON has an optimizer section of type {settings['optimizer'].get('type')!r} and a GWTAdamW was "
                f"passed too; DeepSpeed would ignore the section in silence. Remove one of them"
            )
        ds_json.refuse(settings)
        prepare_settings(settings, model)
        refuse_stepped(optimizer.state)
        _check_groups(settings, optimizer)
    elif optimizer is None and settings.get("optimizer"):
        kind = ds_json.value(settings, "optimizer.type")
        logger.warning("optimizer.type is %r in the DeepSpeed JSON: DeepSpeed steps with that, not with %s", kind, TYPE)
    return None


def _check_groups(settings: Mapping[str, Any], optimizer: GWTAdamW) -> None:
    refusals.refuse_groups(settings, optimizer.param_groups)
    if note := refusals.offload_note(settings, optimizer):
        logger.warning(note)


def prepare_settings(settings: dict[str, Any], model: nn.Module | None) -> None:
    """Refuse what cannot be right, and see that neither DeepSpeed nor a wrapper wants another optimizer."""
    refusals.refuse(settings)
    refusals.refuse_experts([] if model is None else model.named_parameters())
    support()
    if (settings.get("zero_optimization") or {}).get("offload_optimizer"):
        # True, the default, makes wrappers put DeepSpeedCPUAdam in the place of the optimizer.
        settings["zero_force_ds_cpu_optimizer"] = False

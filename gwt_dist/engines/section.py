"""An optimizer section of type GWTAdamW that DeepSpeed itself builds, as for trainers: levels by name there too.

DeepSpeed looks the type up in `torch.optim` and calls it with parameters that have lost their names. `offer` says which
model they may be of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import nn

from gwt_dist import ds_json
from gwt_dist.galore import GaLoreAdamW
from gwt_dist.groups import param_groups
from gwt_dist.optimizer import GWTAdamW
from gwt_dist.recipes import DEFAULT, level_of, program_of

_OFFERED: WeakSet[nn.Module] = WeakSet()


def offer(model: nn.Module) -> None:
    """Let an optimizer section that DeepSpeed builds for parameters of `model` take its levels by the names there."""
    _OFFERED.add(model)


def from_section(params: Iterable[Any], **section: Any) -> GWTAdamW:
    """The optimizer of a section, as `gwt_dist.initialize` builds it; `torch.optim.GWTAdamW` is this.

    Args:
        params: Parameters or groups of a model that was offered; or groups that say their own level.
        section: ``optimizer.params`` of the JSON.

    Raises:
        ValueError: For a key or value that is refused, or parameters of no model that is known, on which the section's
            level would act alike.
    """
    options = {"recipe": DEFAULT, **ds_json.checked(section)}
    support()
    given = list(params)
    # Of what was said, before the name of the default is written into all groups.
    unnamed = "recipe" not in section and any(not isinstance(group, dict) or "recipe" not in group for group in given)
    model = next((model for model in _OFFERED if _owns(model, given)), None)
    by_name = {key: options.pop(key) for key in ("level", "targets", "rest") if key in options}
    if model is not None:
        built = GWTAdamW(param_groups(model, params=given, **by_name, **options), **options)
        built.is_default = unnamed
        return built
    level = by_name.get("level", level_of(options["recipe"]))
    targets, rest = by_name.get("targets"), by_name.get("rest")
    # Nothing acts on weights that groups say nothing of, or AdamW alone.
    keys = {"wavelet": "haar", **options, "level": level}
    leveled = program_of(keys, level).least_level > level
    leveled = leveled or all(isinstance(group, dict) and "level" in group for group in given)
    if targets is not None or rest is not None or not leveled:
        raise ValueError(
            f"DeepSpeed itself builds {ds_json.TYPE} from the optimizer section of its JSON, and does not know the "
            f"names of the weights: recipe {options['recipe']!r} at level {level} would act on every one of them, "
            f"embeddings and lm_head too, and targets={targets!r} and rest={rest!r} could not be looked up. Let "
            f"gwt_dist read the section: call gwt_dist.initialize in the place of deepspeed.initialize; pass "
            f"callbacks=[AttachCallback()] of "
            f"gwt_dist.integrations.transformers to the Trainer when it is made; call prepare of "
            f"gwt_dist.integrations.accelerate in the place of accelerator.prepare. Or remove the section and pass "
            f"GWTAdamW(gwt_dist.param_groups(model, ...)) as the optimizer; to a Trainer, which under DeepSpeed leaves "
            f"optimizers=(...) out, **trainer_kwargs(args) of gwt_dist.integrations.transformers"
        )
    built = GWTAdamW(given, level=level, **options)
    built.is_default = unnamed
    return built


def support() -> None:
    """Tell DeepSpeed that ZeRO may have the optimizer, so that no `zero_allow_untested_optimizer` is asked for."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    for kind in (GWTAdamW, GaLoreAdamW):
        if kind not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(kind)


def _owns(model: nn.Module, given: list[Any]) -> bool:
    own = {id(parameter) for parameter in model.parameters()}
    parameters = [p for group in given for p in (group["params"] if isinstance(group, dict) else [group])]
    return bool(parameters) and all(id(parameter) in own for parameter in parameters)

"""transformers' `Trainer`: the optimizer from its `TrainingArguments`, and a callback that attaches it under DeepSpeed.

args = TrainingArguments(..., optim_target_modules=["attn", "mlp"], optim_args="level=2, recipe=energy")
trainer = Trainer(model=model, args=args, train_dataset=data, **trainer_kwargs(args))

The same under one process, DDP, FSDP2 and ZeRO; `portable(trainer)` has it save and resume on any number of ranks. With
an optimizer section of type GWTAdamW in the DeepSpeed JSON ``callbacks=[AttachCallback()]`` is all there is to pass.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from gwt_dist import GWTAdamW, ds_json, param_groups
from gwt_dist.engines import section
from gwt_dist.integrations.engaged import asked_for, engage, warn_of_one_process
from gwt_dist.integrations.portable import portable
from gwt_dist.recipes import DEFAULT
from gwt_dist.targets import ALL, BLOCKS, Targets

__all__ = ["AttachCallback", "optimizer_cls_and_kwargs", "parse_optim_args", "portable", "trainer_kwargs"]
_KEYWORDS = [name for name in inspect.signature(GWTAdamW.__init__).parameters if name not in ("self", "params")]
_KEYWORDS.append("rest")  # of `param_groups`
_PLAIN = "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"  # the default among them


def trainer_kwargs(
    args: TrainingArguments,
    *,
    targets: Targets | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    **options: Any,
) -> dict[str, Any]:
    """All that a Trainer is to be given: ``Trainer(model=..., args=args, train_dataset=..., **trainer_kwargs(args))``.

    Args:
        args: The arguments of the Trainer, whose learning rate, betas, weight decay, ``optim_target_modules`` and
            ``optim_args`` count; see `optimizer_cls_and_kwargs`.
        targets: As there.
        callbacks: Your own, which the Trainer gets too.
        options: Keywords of `GWTAdamW` such as ``level=2``; they win over `args`.

    Returns:
        ``optimizer_cls_and_kwargs`` and ``callbacks``, with an `AttachCallback` before yours.

    Raises:
        ValueError: As `optimizer_cls_and_kwargs` does.
    """
    return {
        "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs(args, targets=targets, **options),
        "callbacks": [AttachCallback(), *callbacks],
    }


def optimizer_cls_and_kwargs(
    args: TrainingArguments, *, targets: Targets | None = None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, from the arguments that the Trainer has anyway.

    ``learning_rate``, ``weight_decay`` and the betas come from `args`, as they do for the Trainer's own optimizers;
    ``adam_epsilon`` too where it is not its default. Biases and norms get no decay, by
    `Trainer.get_decay_parameter_names`. ``optim_target_modules`` says which weights get the level: a list of parts
    of names or regular expressions, one regular expression, ``"all-linear"`` or ``"blocks"``, which it is if not set.

    Of a DeepSpeed JSON that has an optimizer section the Trainer takes that, and nothing else may be said here then.

    Args:
        args: The arguments of the Trainer; ``optim_args="level=2, recipe=energy"`` are keywords of `GWTAdamW`.
        targets: As in `gwt_dist.param_groups`; in the place of ``optim_target_modules``.
        options: Keywords of `GWTAdamW`; they win over `args`.

    Raises:
        ValueError: For text that is not ``key=value``, a key that `GWTAdamW` does not have, targets given twice,
            another ``optim`` than AdamW, or what an optimizer section of the JSON says already or otherwise; when the
            Trainer builds the optimizer, for a target that matches nothing or a value out of range.
    """
    _refuse_beside_a_section(args, {"targets": targets, **options})
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in _PLAIN:
        raise ValueError(f"optim={optim!r} is given, and the Trainer would ignore it and step with GWTAdamW; remove it")
    if targets is not None and args.optim_target_modules is not None:
        raise ValueError(
            f"targets={targets!r} and optim_target_modules={args.optim_target_modules!r} are both given, and one would "
            f"be ignored; remove one of them"
        )
    keywords: dict[str, Any] = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    if args.adam_epsilon != TrainingArguments.adam_epsilon:
        keywords["eps"] = args.adam_epsilon
    keywords |= {"weight_decay": args.weight_decay} | parse_optim_args(args.optim_args)
    for key in options:
        _known(key, "the keywords of optimizer_cls_and_kwargs")
    return _Factory, {
        "targets": _targets(args.optim_target_modules) if targets is None else targets,
        **keywords,
        **options,
    }


def parse_optim_args(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Keywords of `GWTAdamW` from ``"level=2, recipe=energy"``.

    Values are Python's numbers, tuples, dicts, True, False and None; anything else is text. Raises `ValueError` for a
    part that is not ``key=value``, a key that is given twice, and one that `GWTAdamW` does not have.
    """
    if isinstance(text, Mapping):
        for key in text:
            _known(key, f"optim_args={dict(text)!r}")
        return dict(text)
    found: dict[str, Any] = {}
    for part in _split(text or ""):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ValueError(
                f'optim_args={text!r}: {part.strip()!r} is not key=value; write for example "level=2, recipe=energy"'
            )
        _known(key, f"optim_args={text!r}")
        if key in found:
            raise ValueError(f"optim_args={text!r} gives {key!r} twice; remove one of them")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


class AttachCallback(TrainerCallback):
    """Attaches the optimizer when training begins, and raises if the engine that was asked for is not on.

    Passed as ``callbacks=[AttachCallback()]``, so that it is there when the Trainer is made, it also has an optimizer
    section of type GWTAdamW in the DeepSpeed JSON built as `gwt_dist.initialize` does: levels by ``targets``, the same
    decay for all, and "auto" of lr, betas, eps and weight_decay as the Trainer fills it in.

    ``held`` then says how the optimizer holds the weights. Under FSDP2 and DDP there is nothing to attach, and it still
    refuses a run that is DDP where FSDP or DeepSpeed was asked for.
    """

    held: str | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises `ValueError` for a JSON that DeepSpeed's own reader would refuse, and for another section."""
        _read_again(args)
        _refuse_beside_a_section(args, {})
        if isinstance(kwargs.get("model"), nn.Module):
            section.offer(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises `ValueError` as `gwt_dist.integrations.engaged.engage` does, and for a JSON that is not one."""
        _read_again(args)
        warn_of_one_process()
        self.held = engage(kwargs["optimizer"], kwargs["model"], asked_for(args))


class _Factory:
    """The Trainer calls ``factory()(model, **kwargs)`` for what is no optimizer class, Axolotl's with its `args`."""

    def __call__(
        self, model: nn.Module, args: Any = None, *, targets: Targets, weight_decay: float, **options: Any
    ) -> GWTAdamW:
        # Its `self` is not used; a Trainer that overrides it cannot be asked from here.
        decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": weight_decay},
            {"params": [], "weight_decay": 0.0},
        ]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[name not in decaying]["params"].append(parameter)
        groups = [group for group in groups if group["params"]]
        level, unnamed = options.pop("level", None), "recipe" not in options
        rest, options = options.pop("rest", None), {"recipe": DEFAULT, **options}
        built = GWTAdamW(param_groups(model, level, targets, params=groups, rest=rest, **options), **options)
        built.is_default = unnamed  # the name is written into all groups
        return built


def _refuse_beside_a_section(args: Any, said: Mapping[str, Any]) -> None:
    """Raise `ValueError` where the Trainer would take the optimizer section of the JSON and leave out what is said."""
    plugin = getattr(args, "deepspeed_plugin", None)
    config = getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "hf_ds_config", None)
    kind = None if config is None else ds_json.value(config.config, "optimizer.type")
    if config is None or kind is None:
        return
    if kind != ds_json.TYPE:
        raise ValueError(
            f"the DeepSpeed JSON has an optimizer section of type {kind!r}: the Trainer would step with that and leave "
            f"optimizer_cls_and_kwargs out in silence. Write {ds_json.TYPE!r}, or remove the section"
        )
    said = {**said, **{name: getattr(args, name, None) for name in ("optim_target_modules", "optim_args")}}
    for name, value in said.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is given, and an optimizer section of type {ds_json.TYPE} in the DeepSpeed JSON "
                f"too, which the Trainer would take alone; remove one of them"
            )
    params = ds_json.value(config.config, "optimizer.params", {})
    for key, name in (("weight_decay", "weight_decay"), ("lr", "learning_rate")):
        value = getattr(args, name, None)
        if value is not None and value != getattr(TrainingArguments, name) and key not in params:
            raise ValueError(
                f"{name}={value!r} is given, and the optimizer section of the DeepSpeed JSON, which the Trainer takes "
                f'alone, has no {key!r}: it would be left out. Write "{key}": "auto" into optimizer.params, or remove '
                f"the section and give the Trainer **trainer_kwargs(args)"
            )


def _read_again(args: Any) -> None:
    """Raise `ValueError` for what DeepSpeed's reader would refuse; transformers' takes the last of equal keys."""
    said = getattr(args, "deepspeed", None)
    if not isinstance(said, (str, os.PathLike)):
        return
    if isinstance(said, str) and said.lstrip().startswith("{"):  # transformers takes text as well
        ds_json.parse(said, "the DeepSpeed configuration")
    else:
        ds_json.read(said)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _known(key: str, where: str) -> None:
    if key not in _KEYWORDS:
        raise ValueError(f"{where}: GWTAdamW has no keyword {key!r}; it has {', '.join(_KEYWORDS)}")


def _targets(chosen: Any) -> Targets:
    if chosen is None:
        return BLOCKS
    if isinstance(chosen, str):
        # One text is one expression here, which `param_groups` would also take for a part of a name.
        word = chosen.replace("_", "-")
        return word if word in (ALL, BLOCKS) else f"(?:{chosen})"
    return tuple(chosen)

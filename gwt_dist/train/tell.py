"""What is not as it looks when a run starts: lines for stderr, of rank 0."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gwt_dist.train.checkpoints import Begun
from gwt_dist.train.config import TrainConfig
from gwt_dist.train.ds_config import BatchSizes


def vocabulary(model: Mapping[str, Any], tokens: int) -> str:
    """Of a model's file with another `vocab_size` than the tokenizer has; "" if they are alike."""
    said = model.get("vocab_size", tokens)
    if said == tokens:
        return ""
    return f"vocab_size is {said} in {model['file']} and {tokens} in the model: the tokenizer has so many tokens"


def unsaved(kind: str) -> str:
    """Of an optimizer whose state checkpoints do not hold."""
    return (
        f"no checkpoint will be written: they hold the state of GWTAdamW, and the optimizer is {kind}. For a "
        f"baseline that can be resumed take GWTAdamW with level 0, which is AdamW"
    )


def rate(schedule: Any, step: int) -> float:
    """The learning rate of the first group after `step` steps by the schedule of this start, whatever was loaded."""
    return float(schedule.base_lrs[0] * schedule.lr_lambdas[0](step))


def resumed(
    begun: Begun | None,
    config: TrainConfig,
    sizes: BatchSizes,
    ranks: int,
    rates: tuple[float, float],
    earlier: Mapping[str, Any],
) -> Iterator[str]:
    """Where a run goes on, on how many ranks, and a learning rate that jumps there.

    Args:
        begun: The run before; None for a new one.
        config: Of this start.
        sizes: Of this start.
        ranks: Of this start.
        rates: The learning rate of the next step as the checkpoint has it, and by the schedule of this start.
        earlier: The record of the run before.
    """
    if not (begun and begun.checkpoint):
        if config.resume:
            yield f"no checkpoint in {config.output} yet: starting from the beginning"
        return
    yield f"resumed at step {begun.step} of {begun.run_folder} ({begun.checkpoint.name})"
    if not math.isclose(*rates, rel_tol=1e-6, abs_tol=1e-12):
        steps = (earlier.get("train") or {}).get("steps")
        was = f", and was over {steps}" if steps not in (None, config.steps) else ", and was another one"
        yield (
            f"warning: the schedule is now over {config.steps} steps, {config.warmup_steps} of them warm-up{was}: the "
            f"learning rate jumps from {rates[0]:.3g} to {rates[1]:.3g}"
        )
    if begun.world_size != ranks:
        yield (
            f"{ranks} ranks go on where {begun.world_size} saved: micro batch {sizes.micro}, accumulation "
            f"{sizes.accumulation}, {sizes.train} sequences a step as before"
        )

"""`describe`, and the choice of `param_groups`, under engines: what ranks run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import gwt_dist
from fsdp1_cases import refusal
from gwt_dist import GWTAdamW, describe, param_groups
from gwt_dist.description import Description
from test_targets import Layered
from zero_cases import settings

GROUPS: dict[str, Any] = {"level": 2, "recipe": "energy", "rest": {"recipe": "energy", "lr": 0.5}}


def described_case(engine: str) -> tuple[Description, str, str]:
    """What is told of a model under an engine, the same without the names of a model, and what stands in its way."""
    model: Any = Layered(False)
    if engine == "fsdp2":
        fully_shard(model)
    elif engine == "fsdp1":
        # Chosen after it is wrapped, when its parameters are parts of flat ones.
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer, held = GWTAdamW(param_groups(model, **GROUPS)), ""
    if engine.startswith("zero"):
        import deepspeed

        config = {**settings(int(engine[-1])), "zero_allow_untested_optimizer": True}
        built: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        held = refusal(lambda: describe(built.optimizer))
        gwt_dist.attach(optimizer, built)
        bare = refusal(lambda: describe(optimizer)) if engine == "zero3" else str(describe(optimizer))
        return describe(built.optimizer), bare, held
    if engine == "fsdp1":
        held = refusal(lambda: describe(optimizer))
        gwt_dist.attach(optimizer, model)
    return describe(optimizer, model), str(describe(optimizer)), held


def alone() -> Description:
    """The same in one process."""
    model: nn.Module = Layered(False)
    return describe(GWTAdamW(param_groups(model, **GROUPS)), model)

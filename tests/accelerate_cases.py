"""What the ranks of `test_accelerate.py` run: DeepSpeed with offload, prepared by the real Accelerate."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

import gwt_dist
from gwt_dist import GWTAdamW
from zero_cases import Net, gradients, load, settings, shapes_of
from zero_engine_cases import CPU, backward, difference, groups_of, initial, masters, reference


def prepared_case(forced: bool | None) -> dict[str, Any]:
    """What Accelerate makes of a `GWTAdamW` under offload, what `attach` says, and the update where it attaches."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    with patch.dict(os.environ, ACCELERATE_USE_DEEPSPEED="true"):  # as `accelerate launch` does
        try:
            return _prepared(forced, Accelerator, DeepSpeedPlugin)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def _prepared(forced: bool | None, accelerator_type: Any, plugin_type: Any) -> dict[str, Any]:
    config = settings(2, False, offload_optimizer=CPU)
    if forced is not None:
        config["zero_force_ds_cpu_optimizer"] = forced
    model = Net()
    load(model, initial(shapes_of(model)))
    # The extension that DeepSpeedCPUAdam compiles for half a minute; it never steps here.
    extension = SimpleNamespace(create_adam=lambda *_: 0, destroy_adam=lambda *_: 0)
    with patch("deepspeed.ops.adam.cpu_adam.CPUAdamBuilder", lambda: SimpleNamespace(load=lambda: extension)):
        accelerator = accelerator_type(deepspeed_plugin=plugin_type(hf_ds_config=config))
        engine, wrapper = accelerator.prepare(model, GWTAdamW(groups_of(model, "by name", 2, "paper")))
    result: dict[str, Any] = {"inner": type(wrapper.optimizer.optimizer).__name__, "message": "", "error": None}
    try:
        gwt_dist.attach(wrapper, engine)
    except ValueError as error:
        result["message"] = str(error)
        return result
    steps = list(gradients(shapes_of(model), 3))
    for step in steps:
        backward(engine, model, step, dist.get_world_size() if dist.get_rank() == 0 else 0)
    expected = reference("by name", 2, "paper", steps)
    result["error"] = difference(masters(engine, model), expected, initial(shapes_of(model)))
    return result

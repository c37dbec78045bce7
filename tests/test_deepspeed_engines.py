"""DeepSpeed beyond ZeRO's defaults on real ranks: every layout, its settings, and what goes wrong.

The update equals the update of one process on the same gradients. T1 to T29 are failures of other optimizers under
DeepSpeed that each test here would show; see the comment beside it.
"""

from __future__ import annotations

import pytest

from zero_engine_cases import engine_case, init_case, spoiled_case

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")


def zero(stage: int, bf16: bool = False, **settings) -> dict:
    """A DeepSpeed JSON without clipping, which DeepSpeed has on by default."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, **settings},
    }


CPU = {"device": "cpu", "pin_memory": False}
BF16_OPTIMIZER = {**zero(1, True), "data_types": {"grad_accum_dtype": "fp32"}}
ENGINES = {
    "no zero section": {k: v for k, v in zero(0).items() if k != "zero_optimization"},  # T2
    "0 fp32": zero(0),  # T2
    "0 bf16": zero(0, True),  # T2
    "bf16 optimizer": BF16_OPTIMIZER,  # T13
    "bf16 optimizer, immediate": {**BF16_OPTIMIZER, "bf16": {"enabled": True, "immediate_grad_update": True}},  # T13
    "2 bf16, fp32 accumulation": {**BF16_OPTIMIZER, **zero(2, True)},  # T13
    "1 offload": zero(1, offload_optimizer=CPU),  # T12
    "2 offload": zero(2, True, offload_optimizer=CPU),  # T12
    "3 offload": zero(3, offload_optimizer=CPU),  # T12
    "3 offload both": zero(3, True, offload_optimizer=CPU, offload_param=CPU),  # T12
    "3 offload weights": zero(3, offload_param=CPU),  # T12
    "1 round robin": zero(1, round_robin_gradients=True),  # T18
    "2 round robin": zero(2, True, round_robin_gradients=True),  # T18
    "1 aligned": zero(1, True, parameter_alignment=True),
    "2 aligned": zero(2, parameter_alignment=True),
    "2 round robin, aligned": zero(2, True, round_robin_gradients=True, parameter_alignment=True),  # T18
    "1 no reduce-scatter": zero(1, True, reduce_scatter=False),  # T4
    "2 no reduce-scatter": zero(2, reduce_scatter=False),  # T4
    "3 no reduce-scatter": zero(3, reduce_scatter=False),  # T4
    "3 tiny sub-groups": zero(3, True, sub_group_size=1000),  # T27
}
@pytest.mark.parametrize(("world_size", "level", "recipe"), [(2, 1, "energy"), (3, 3, "paper")])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_update_is_that_of_one_process(ranks, engine, world_size, level, recipe) -> None:
    for r in ranks(world_size, engine_case, ENGINES[engine], level, recipe):
        print({k: v for k, v in r.items() if k not in ("cut",)})

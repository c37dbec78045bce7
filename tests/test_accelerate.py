"""Accelerate puts DeepSpeedCPUAdam in the place of any optimizer under offload: `attach` notices, the way out works."""

from __future__ import annotations

import pytest

from accelerate_cases import prepared_case

pytestmark = [pytest.mark.matrix, pytest.mark.usefixtures("torch_extensions_dir")]


@pytest.mark.support("DeepSpeed", "Accelerate's swap to DeepSpeedCPUAdam under offload", outcome="refused")
@pytest.mark.parametrize("forced", [None, True])
def test_the_swap_is_refused_with_the_way_out(ranks, forced) -> None:
    for result in ranks(2, prepared_case, forced):
        assert result["inner"] == "DeepSpeedCPUAdam"
        assert 'Set "zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON' in result["message"]


@pytest.mark.support("DeepSpeed", "Accelerate with offload and `zero_force_ds_cpu_optimizer: false`")
def test_the_way_out_is_the_update_of_one_process(ranks) -> None:
    for result in ranks(2, prepared_case, False):
        assert (result["inner"], result["message"]) == ("GWTAdamW", "")
        assert result["error"] < 1e-6

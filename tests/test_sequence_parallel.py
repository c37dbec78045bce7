"""DeepSpeed's Ulysses sequence parallelism: ranks that share sequences make the update of one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gwt_dist.engines import refusals
from sequence_parallel_cases import attention_case, chosen_gradients_case, mesh_case, resumed_case

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")


@pytest.mark.support("DeepSpeed", "Ulysses sequence parallelism, ZeRO-0 to ZeRO-3")
@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False)])
def test_two_ranks_of_a_sequence_are_one_process(ranks, stage: int, bf16: bool) -> None:
    for result in ranks(2, chosen_gradients_case, stage, bf16, 2):
        assert result["split"] == 2
        assert result["error"] < 1e-6


@pytest.mark.matrix
@pytest.mark.support("DeepSpeed", "Ulysses sequence parallelism x data parallelism")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_sequences_of_two_ranks_are_one_process(ranks, stage: int) -> None:
    for result in ranks(4, chosen_gradients_case, stage, False, 2):
        assert result["error"] < 1e-6


@pytest.mark.support("DeepSpeed", "Ulysses sequence parallelism, `gwt_dist.save` and `load`")
@pytest.mark.parametrize("stage", [2, 3])
def test_its_checkpoint_goes_on_in_one_process(ranks, stage: int, tmp_path: Path) -> None:
    assert all(result["error"] < 1e-6 for result in ranks(2, chosen_gradients_case, stage, False, 2, str(tmp_path)))
    assert resumed_case(str(tmp_path)) < 1e-6


@pytest.mark.support("DeepSpeed", "Ulysses sequence parallelism, attention over ranks")
@pytest.mark.parametrize("stage", [2, 3])
def test_attention_over_two_ranks_is_that_of_one_process(ranks, stage: int) -> None:
    assert max(ranks(2, attention_case, stage)) < 1e-4  # sums in another order


@pytest.mark.support("DeepSpeed", "sequences that are split by a device mesh", outcome="refused")
def test_a_mesh_over_which_no_gradient_is_summed_is_refused(ranks) -> None:
    for message in ranks(2, mesh_case, 2):
        assert message.startswith("each sequence is split over 2 ranks ([0, 1]), and DeepSpeed does not sum gradients")
        assert "pass that module as mpu" in message


def unit(**sizes: int) -> Any:
    """An mpu that says these sizes."""
    return SimpleNamespace(**{f"get_{name}_world_size": lambda size=size: size for name, size in sizes.items()})


@pytest.mark.support("DeepSpeed", "tensor and pipeline parallelism from an `mpu`", outcome="refused")
@pytest.mark.parametrize(
    ("mpu", "ulysses", "message"),
    [
        (unit(model_parallel=2), False, "splits tensors over 2 ranks"),
        (unit(slice_parallel=3), False, "splits tensors over 3 ranks"),
        (unit(tensor_model_parallel=2, model_parallel=4), False, "splits tensors over 2 ranks"),
        (unit(tensor_model_parallel=2, sequence_parallel=2), True, "splits tensors over 2 ranks"),
        (unit(model_parallel=1, pipe_parallel=2), False, "pipeline parallelism is not tested"),
        (unit(tensor_model_parallel=1, pipeline_model_parallel=2), False, "pipeline parallelism is not tested"),
        (unit(model_parallel=1, data_parallel=2), False, ""),
        (unit(tensor_model_parallel=1, model_parallel=1, sequence_parallel=2), False, ""),
        (unit(model_parallel=2, sequence_parallel=2), True, ""),
    ],
)
def test_what_an_mpu_splits(mpu: Any, ulysses: bool, message: str) -> None:
    if ulysses:
        mpu.initialize_sequence_parallel = None
    engine = SimpleNamespace(mpu=mpu)
    if not message:
        refusals.refuse_parallel(engine)
        return
    with pytest.raises(ValueError, match=message):
        refusals.refuse_parallel(engine)

"""DeepSpeed ZeRO on real ranks: the update equals the update of one process on the same gradients."""

from __future__ import annotations

import re
from math import prod

import pytest

from gwt_dist.piece import moments_shape
from zero_cases import (
    Net,
    forgotten_attach_case,
    plain_json_case,
    refused_case,
    resume_case,
    shapes_of,
    wrong_layout_case,
    zero_case,
)

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")

ENGINES = {
    "zero1-fp32": (1, False, False),
    "zero2-fp32": (2, False, False),
    "zero3-fp32": (3, False, False),
    "zero3-init-fp32": (3, False, True),
    "zero1-bf16": (1, True, False),
    "zero2-bf16": (2, True, False),
    "zero3-bf16": (3, True, False),
    "zero3-init-bf16": (3, True, True),
}


@pytest.mark.support("DeepSpeed", "ZeRO-1, ZeRO-2, ZeRO-3, fp32 and bf16, `zero.Init`")
@pytest.mark.parametrize(("world_size", "level", "recipe"), [(2, 1, "energy"), (3, 3, "paper")])
@pytest.mark.parametrize("engine", ENGINES)
def test_groups_by_name_from_the_json_keep_what_was_planned(ranks, engine, world_size, level, recipe) -> None:
    """The update itself is that of one process under every setting in `test_matrix.py`."""
    results = ranks(world_size, zero_case, *ENGINES[engine], level, recipe)
    for result in results:
        assert result["error"] < 1e-6
        assert result["stale"] == 0.0
        assert result["steps"] == [5.0]
        assert result["bytes"] == result["planned"]
    # Moments of every unit once, and once more for each rank that keeps a cut unit beside its owner.
    once = sum(
        prod(moments_shape(shape, level if "attn" in name or "mlp" in name else 0, "haar"))
        for name, shape in shapes_of(Net()).items()
    )
    cut = {unit for result in results for unit in result["cut"]}
    twice = sum(result["received"] for result in results) - len(cut)
    assert sum(result["moments"] for result in results) == once + twice
    assert level < 3 or cut


@pytest.mark.support("DeepSpeed", "any wavelet")
@pytest.mark.parametrize("engine", ["zero2-fp32", "zero3-fp32"])
def test_cut_rows_of_another_wavelet_are_completed_too(ranks, engine) -> None:
    for result in ranks(3, zero_case, *ENGINES[engine], 2, "energy", "db2"):
        assert result["error"] < 1e-6
        assert result["received"] > 0
        assert result["bytes"] == result["planned"]


@pytest.mark.support("DeepSpeed", "`save_checkpoint`, `load_checkpoint` at the same layout, padded partitions")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_checkpoint_continues_bit_for_bit(ranks, stage, bf16, tmp_path) -> None:
    """Three ranks, so that the last partition is padded."""
    assert ranks(3, resume_case, stage, bf16, str(tmp_path)) == [0.0] * 3


@pytest.mark.support("DeepSpeed", "a forgotten `attach`", outcome="refused")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_forgotten_attach_is_refused(ranks, stage) -> None:
    for message in ranks(2, forgotten_attach_case, stage):
        assert "a sharding engine made it, and the rows of its tensors are unknown" in message
        assert "gwt_dist.attach(optimizer, engine)" in message


@pytest.mark.support("DeepSpeed", "plain `deepspeed.initialize`, then `attach`")
@pytest.mark.parametrize("stage", [2, 3])
def test_plain_deepspeed_initialize_finds_the_type_and_attach_completes_it(ranks, stage) -> None:
    assert max(ranks(2, plain_json_case, stage)) < 1e-6


@pytest.mark.support("DeepSpeed", "a layout that is not as recorded", outcome="refused")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("what", "expected"),
    [("offset", "rank 1: elements .* are not those of the model's weight"), ("gap", "are held by no rank")],
)
def test_another_layout_on_one_rank_is_refused_by_all(ranks, stage, what, expected) -> None:
    for message in ranks(2, wrong_layout_case, stage, what):
        assert re.search(expected, message), message


@pytest.mark.support(
    "DeepSpeed",
    "`elastic_checkpoint`, `compute_grad_norm: false`, NVMe, `ratio < 1`, universal checkpoints, fp16 autocast",
    outcome="refused",
)
@pytest.mark.parametrize(
    ("change", "params", "message"),
    [
        (
            {"zero_optimization": {"elastic_checkpoint": True}},
            {},
            "zero_optimization.elastic_checkpoint=True cannot be",
        ),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            {},
            "zero_optimization.compute_grad_norm=False cannot be",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}},
            {},
            "zero_optimization.offload_optimizer.device='nvme' cannot be",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            {},
            "zero_optimization.offload_optimizer.ratio=0.5 cannot be",
        ),
        ({"checkpoint": {"load_universal": True}}, {}, "checkpoint.load_universal=True cannot be"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, {}, "torch_autocast with float16 cannot be"),
        ({}, {"levle": 2}, "unknown key 'levle' (did you mean 'level'?)"),
        ({}, {"level": 17}, "level=17 must be a whole number from 0"),
        ({}, {"wavelet": "har"}, "wavelet='har' is not a discrete wavelet"),
        ({}, {"targets": ["mpl"]}, "target 'mpl' matches no weight matrix"),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_refused_at_set_up(ranks, change, params, message) -> None:
    assert message in ranks(1, refused_case, change, params)[0]


@pytest.mark.support("DeepSpeed", "an `optimizer` section beside a client optimizer", outcome="refused")
def test_an_optimizer_given_twice_is_refused(ranks) -> None:
    assert "an optimizer was passed too" in ranks(1, refused_case, {}, {}, True)[0]

"""DeepSpeed beyond ZeRO's defaults on real ranks: every layout, its settings, and what goes wrong.

The update equals the update of one process on the same gradients. T1 to T29 are failures of other optimizers under
DeepSpeed that each test here would show; see the comment beside it.
"""

from __future__ import annotations

import math
from math import prod

import pytest

from gwt_dist.piece import moments_shape
from zero_cases import Net, refused_case, shapes_of
from zero_engine_cases import (
    ENGINES,
    engine_case,
    forgotten_case,
    groups_case,
    init_case,
    read_again_case,
    refused_attach_case,
    rounded_case,
    spoiled_case,
    universal_case,
    wrapper_case,
    zero,
)

pytestmark = [pytest.mark.matrix, pytest.mark.usefixtures("torch_extensions_dir")]


WRAPPERS = ["0 bf16", "bf16 optimizer", "1", "2 bf16", "3"]
RECIPES = ["paper", "energy"]
# What `memory.plan_zero` does not know: another order of the tensors, gaps between them.
UNPLANNED = {name for name in ENGINES if "round robin" in name or "aligned" in name}


def check(results: list[dict], recipe: str, rates: tuple[float, ...] = (0.01, 0.01), tolerance: float = 1e-6) -> None:
    """What holds for every layout: the update, one step a step, and the same few collectives on all ranks."""
    for result in results:
        assert result["error"] < tolerance
        assert result["stale"] == 0.0
        assert result["at start"] == 0  # T24
        assert result["steps"] == [5.0]  # T5
        assert result["rates"] == list(rates)  # T8
        assert result["collectives"] == results[0]["collectives"]
        calls = [len(names) for names in result["collectives"]]
        # At most one for cut units and one for norms in each call of step(), and the same in every step.
        assert max(calls) <= (2 if recipe == "paper" else 1)
        assert calls == calls[: len(calls) // 5] * 5
        if recipe == "energy" and not any(r["received"] for r in results):
            assert not any(calls)


def once(level: int) -> int:
    """Coefficients of the model, each counted once."""
    return sum(
        prod(moments_shape(shape, level if "attn" in name or "mlp" in name else 0, "haar"))
        for name, shape in shapes_of(Net()).items()
    )


@pytest.mark.support(
    "DeepSpeed", "stage 0 in fp32 and bf16, `BF16_Optimizer`, ZeRO-Offload of optimizer and parameters"
)
@pytest.mark.support(
    "DeepSpeed", "`round_robin_gradients`, `parameter_alignment`, `reduce_scatter` off, tiny `sub_group_size`"
)
@pytest.mark.parametrize("engine", ENGINES)
def test_each_layout_keeps_what_was_planned(ranks, engine) -> None:
    """T2, T12, T13, T18, T27 by the engine. NaN in all padding has no effect (T19)."""
    results = ranks(3, engine_case, ENGINES[engine], 3, "paper")
    check(results, "paper")
    if results[0]["planned"] and engine not in UNPLANNED:
        assert [r["bytes"] for r in results] == [r["planned"] for r in results]  # T26
    moments = [r["moments"] for r in results]
    if engine.startswith(("0", "no")):
        assert moments == [once(3)] * 3
    else:
        assert sum(r["poisoned"] for r in results) > 0  # T19
        cut = {unit for r in results for unit in r["cut"]}
        assert cut  # T4
        assert sum(moments) == once(3) + sum(r["received"] for r in results) - len(cut)  # T26


@pytest.mark.parametrize("engine", ["2 bf16", "3 tiny sub-groups"])
def test_state_in_8_bits_keeps_what_was_planned(ranks, engine) -> None:
    """Padding is NaN there too, cells are cut, and a gradient is that of four batches."""
    results = ranks(3, engine_case, ENGINES[engine], 1, "energy in int8", "by name", 4)
    assert [r["error"] for r in results] == [0.0] * 3
    assert [r["bytes"] for r in results] == [r["planned"] for r in results]
    assert sum(r["poisoned"] for r in results) > 0 and any(r["cut"] for r in results)


@pytest.mark.support("DeepSpeed", "groups with options of their own, frozen and 1-D groups")
@pytest.mark.parametrize("engine", ["0 fp32", *WRAPPERS, "2 round robin", "2 offload", "3 tiny sub-groups"])
def test_groups_keep_their_own_options(ranks, engine) -> None:
    """T8; four ranks share a group of two elements, so that two hold nothing but padding (T23)."""
    results = ranks(4, engine_case, ENGINES[engine], 2, "paper", "by hand")
    check(results, "paper", (0.03, 0.01, 0.002, 0.005))


@pytest.mark.support("DeepSpeed", "gradient accumulation")
@pytest.mark.parametrize("engine", ["0 fp32", *WRAPPERS, "2 offload", "3 offload both"])
def test_four_accumulated_batches_are_one_large_batch(ranks, engine) -> None:
    check(ranks(2, engine_case, ENGINES[engine], 2, "energy", "by name", 4), "energy")  # T5, T12


@pytest.mark.support("DeepSpeed", "clipping, its default of 1.0 included")
@pytest.mark.parametrize(
    ("engine", "clip"),
    [(engine, 3.0) for engine in ["0 fp32", *WRAPPERS]]
    + [(engine, None) for engine in ["0 fp32", *WRAPPERS, "2 offload", "3 offload both"]],
)
def test_clipping_acts_on_the_raw_gradient(ranks, engine, clip) -> None:
    """T7. What a JSON does not set is clipped at 1.0."""
    config = {k: v for k, v in ENGINES[engine].items() if k != "gradient_clipping"}
    if clip:
        config["gradient_clipping"] = clip
    results = ranks(2, engine_case, config, 2, "energy", "by name", 1, clip or 1.0)
    check(results, "energy", tolerance=1e-5)  # DeepSpeed rounds the factor to fp32, and the rounding adds up
    for reported, norm in results[0]["norms"]:
        assert norm > 3.0
        assert reported == (0.0 if engine == "0 fp32" else pytest.approx(norm, rel=1e-6))  # not reported there


@pytest.mark.parametrize("engine", ["0 fp32", *WRAPPERS[:-1]])
def test_gradients_that_are_summed_over_ranks(ranks, engine) -> None:
    """T17; DeepSpeed itself refuses it at stage 3."""
    check(ranks(2, engine_case, ENGINES[engine] | {"gradient_allreduce_op": "sum"}, 2, "energy"), "energy")


SPOILED = [(engine, "paper", math.nan, False) for engine in [*WRAPPERS, "2 offload", "3 offload both"]]
SPOILED += [("2", "energy in int8", math.nan, False)]
SPOILED += [(engine, "energy", math.inf, True) for engine in [*WRAPPERS, "3 tiny sub-groups"]]


@pytest.mark.support("DeepSpeed", "NaN or infinity on one rank: the step never happened")
@pytest.mark.parametrize(("engine", "recipe", "value", "first"), SPOILED)
def test_a_step_that_is_not_finite_on_one_rank_never_happened(ranks, engine, recipe, value, first) -> None:
    """T6: every rank skips it; weights, moments, limiter and step keep their bits, and training goes on."""
    results = ranks(2, spoiled_case, ENGINES[engine], recipe, value, first)
    for result in results:
        assert result["called"] == 0
        assert result["same"]
        assert result["error"] < 1e-6
        assert result["collectives"] == results[0]["collectives"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_stage_0_in_fp32_skips_nothing(ranks, recipe) -> None:
    """DeepSpeed has no wrapper there and calls step() whatever the gradient is: as with AdamW, the elements that it
    reaches are lost. All ranks lose the same ones, and no other tensor is touched.
    """
    results = ranks(2, spoiled_case, ENGINES["0 fp32"], recipe, math.nan, False)
    for result in results:
        assert result["called"] == 1
        assert result["lost"] == {"mlp_down.weight"}
        assert result["bits"] == results[0]["bits"]


@pytest.mark.support("DeepSpeed", "the dry run of the unfused bf16 wrapper")
@pytest.mark.parametrize(("engine", "steps"), [("0 bf16", 1), ("bf16 optimizer", 0), ("2", 0), ("3", 0)])
def test_the_dry_run_of_an_engine_allocates_nothing(ranks, engine, steps) -> None:
    assert ranks(2, init_case, ENGINES[engine]) == [{"steps": steps, "state": 0}] * 2  # T24


@pytest.mark.support("DeepSpeed", "DeepSpeed's conversion of a checkpoint to a universal one", outcome="refused")
@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("1", "Required universal_checkpoint_info state is missing in checkpoint"),
        ("2 bf16", "Required universal_checkpoint_info state is missing in checkpoint"),
        ("bf16 optimizer", "Required universal_checkpoint_info state is missing in checkpoint"),
        ("3", "exceeds dimension size"),
    ],
)
def test_a_universal_conversion_fails_loudly(ranks, engine, message, tmp_path) -> None:
    """T14: it assumes moments as large as the weights."""
    assert message in ranks(2, universal_case, ENGINES[engine], str(tmp_path))[0]
    # Nothing that DeepSpeed would load in its place.
    assert not list(tmp_path.rglob("exp_avg.pt"))
    assert not list(tmp_path.glob("latest_universal"))


@pytest.mark.parametrize("engine", ["1", "2 round robin"])
def test_a_deepspeed_that_does_not_say_where_tensors_begin(ranks, engine) -> None:
    """Before `parameter_alignment` it had no offsets: there are no gaps."""
    assert ranks(3, read_again_case, ENGINES[engine]) == [[True, True]] * 3


@pytest.mark.parametrize("engine", [*WRAPPERS, "2 offload"])
def test_attaching_through_the_wrapper_alone(ranks, engine) -> None:
    assert max(ranks(2, wrapper_case, ENGINES[engine])) < 1e-6


@pytest.mark.parametrize("engine", ["0 bf16", "bf16 optimizer"])
def test_a_forgotten_attach_is_refused(ranks, engine) -> None:
    for message, unchanged in ranks(2, forgotten_case, ENGINES[engine]):  # T22
        assert "gwt_dist.attach(optimizer, engine)" in message
        assert unchanged


@pytest.mark.support("DeepSpeed", "further settings whose layout or rounding is not tested", outcome="refused")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "divides the gradients by a loss scale that"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "bf16.check_grad_overflow=False cannot be used"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "the master weights must be fp32"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16 second moments cannot decay; remove it"),
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "the master weights must be fp32"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "the weights are not in memory"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}}, "SuperOffload steps with"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "ZenFlow steps on chosen columns"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "partition of the weights (hpZ) is not"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "over a part of the ranks (MiCS) are not tested"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "quantized communication is not tested"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
            "quantized communication is not tested",
        ),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients=True cannot be used"),
        ({"tensor_parallel": {"autotp_size": 2}}, "would transform its part of a matrix as if it were the whole"),
    ],
    ids=str,
)
def test_settings_that_are_refused_at_set_up(ranks, change, message) -> None:
    assert message in ranks(1, refused_case, change, {})[0]  # T21, T25 are in test_deepspeed.py


@pytest.mark.support("DeepSpeed", "engines that swap the optimizer or own part of it", outcome="refused")
@pytest.mark.parametrize(
    ("engine", "what", "message"),
    [
        ("2", "expert", "parameter 'mlp_down.weight' belongs to an expert"),  # T30
        ("2", "tensor parallel", "the engine splits tensors over 2 ranks"),  # T30
        ("2", "pipeline", "pipeline parallelism is not tested"),
        ("2 offload", "swapped", '"zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON'),
        ("2", "other", "the engine steps with a GWTAdamW of its own and not with the optimizer that was passed"),
        ("elastic", "wrapper", "zero_optimization.elastic_checkpoint=True cannot be used"),  # T21
        ("no norm", "wrapper", "zero_optimization.compute_grad_norm=False cannot be used"),  # T25
    ],
)
def test_engines_that_are_refused_by_attach(ranks, engine, what, message) -> None:
    """The attributes of what cannot be built here are set by hand."""
    engines = ENGINES | {"elastic": zero(2, elastic_checkpoint=True), "no norm": zero(2, compute_grad_norm=False)}
    assert message in ranks(1, refused_attach_case, engines[engine], what)[0]


def test_groups_that_deepspeed_would_break_are_refused(ranks) -> None:
    assert "group 4 holds 1 parameters and none of them is trained" in ranks(1, groups_case, zero(2), "frozen")[0][0]
    assert ranks(1, groups_case, zero(0), "frozen")[0] == ("no error", [0.03, 0.01, 0.002, 0.005, 0.001])
    assert "parameter 'mlp_down.weight' belongs to an expert" in ranks(1, groups_case, zero(2), "expert")[0][0]


@pytest.mark.support("DeepSpeed", "weights that are rounded by chance, beside masters", outcome="refused")
def test_weights_are_not_rounded_by_chance_beside_masters(ranks) -> None:
    """At set-up, by `initialize` and by `attach`; without masters they are."""
    for config in (zero(2), zero(3), ENGINES["0 bf16"]):
        by_initialize, by_attach = ranks(1, rounded_case, config)[0]
        assert "group 0 says stochastic_rounding=True" in by_initialize and "fp32 masters" in by_initialize
        if config != zero(3):  # which has taken its parameters out of the groups by then: the first step raises
            assert "parameter 0 of group 0 is torch.float32" in by_attach and "Leave stochastic_rounding" in by_attach
    assert ranks(1, rounded_case, ENGINES["0 fp32"])[0] == ["no error", "no error"]


def scheduled(**params) -> dict:
    return zero(1) | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2, **params}}}


@pytest.mark.support("DeepSpeed", "a JSON scheduler over groups with different rates", outcome="refused")
def test_a_scheduler_that_would_make_all_rates_the_same_is_refused(ranks) -> None:
    """T9: groups of different rates, and the scheduler section of the JSON."""
    rates = [0.03, 0.01, 0.002, 0.005]
    message, _ = ranks(1, groups_case, scheduled(warmup_max_lr=0.1), "")[0]
    assert "the learning rates [0.002, 0.005, 0.01, 0.03], and the scheduler section ('WarmupLR') would set" in message
    assert ranks(1, groups_case, scheduled(), "")[0] == ("no error", rates)
    each = [0.3, 0.1, 0.02, 0.05]
    assert ranks(1, groups_case, scheduled(warmup_max_lr=each), "")[0] == ("no error", each)

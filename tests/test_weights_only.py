"""Starting from the weights of a checkpoint, whatever trained them and whatever goes on from them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import gwt_dist
from checkpoint_runs import built, content, same, saved_run, steps, train
from gwt_dist import CheckpointError, GWTAdamW
from weights_only_cases import expected, grown_case, inner_module_case, start_case, unlike, whole_tensors_case
from zero_cases import Net

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return saved_run(tmp_path / "run")


ENGINES = ["ddp", "fsdp2", "fsdp1", "fsdp1 flat", "zero0", "zero1", "zero1 accumulation", "zero2", "zero2 fp32"]
ENGINES += ["zero3", "zero3 persistent"]


@pytest.mark.parametrize("adamw", [False, True])
def test_every_engine_starts_from_the_weights(ranks, saved, adamw) -> None:
    """With another level, wavelet and recipe, or torch's AdamW; masters and bf16 weights agree."""
    for result in ranks(2, start_case, str(saved), [(kind, adamw) for kind in ENGINES]):
        for kind, (wrong, told, taken, rates, unmoved) in result.items():
            assert wrong == [[], [], [], []], kind
            assert told == (2, {"tokens": 7}, False, False), kind
            assert (taken, rates, unmoved) == (set(), {0.0}, set()), kind


@pytest.mark.matrix
def test_whole_tensors_and_fairscale(ranks, saved) -> None:
    for result in ranks(2, whole_tensors_case, str(saved)):
        assert result == {k: [] for k in ("zro", "oss", "sdp")} | {
            k: ["frozen.weight"] for k in ("flat", "modules", "tensors")
        }


def test_a_second_stage_with_frozen_weights(ranks, saved) -> None:
    for result in ranks(
        2, start_case, str(saved), [("ddp", False), ("fsdp2", False), ("zero2", False), ("zero3", True)], "mlp"
    ):
        for kind, (wrong, *_, unmoved) in result.items():
            assert wrong == [[], [], [], []], kind
            assert unmoved == set(), kind


def test_a_grown_head(ranks, saved) -> None:
    for result in ranks(2, grown_case, str(saved), ["ddp", "fsdp2", "fsdp1 flat", "zero2", "zero3"]):
        for kind, (untouched, messages, left, wrong) in result.items():
            assert untouched, kind
            assert "this model does not have mlp_tiny.weight: the checkpoint is of another model" in messages[0]
            assert "strict=False" in messages[0]
            assert "strict=False is for weights_only=True alone" in messages[1]
            shapes = {"attn_q.weight": ((66, 97), (68, 97))}
            assert left == (("mlp_tiny.weight",), ("extra.weight",), shapes, ()), kind
            assert wrong == [[], []], kind


def test_the_module_within_an_engine_is_refused(ranks, saved) -> None:
    """It does not lead to the masters, which would undo what was loaded at the next step."""
    for result in ranks(2, inner_module_case, str(saved), ["zero0", "zero2", "zero3"]):
        unfused, *sharded = result
        assert unfused[0] == "no error"  # nothing of the module shows that it is an engine's
        for messages in result:
            assert all("pass the" in message and "engine" in message for message in messages[1:]), messages
            assert len(messages) == 4
        assert all("DeepSpeed keeps a master of" in messages[0] for messages in sharded)


def test_the_masters_of_an_optimizer_of_deepspeed(saved) -> None:
    """Stage 0 in bf16 with FusedAdam: a flat fp32 copy of each group."""
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

    class Engine:
        pipeline_parallelism = False

        def __init__(self, model: nn.Module) -> None:
            self.param_names = {parameter: name for name, parameter in model.named_parameters()}

    model = Net().bfloat16()
    groups = [
        [p for n, p in model.named_parameters() if p.requires_grad and ("mlp" in n) is high] for high in (True, False)
    ]
    inner = torch.optim.AdamW([{"params": params} for params in groups], lr=0.0)
    fused = FP16_Optimizer(inner, deepspeed=Engine(model), low_precision_dtype=torch.bfloat16, static_loss_scale=1.0)
    gwt_dist.load(saved, model, fused, weights_only=True)
    right = expected(saved)
    assert unlike({n: p.detach() for n, p in model.named_parameters()}, right) == []
    names = {id(p): n for n, p in model.named_parameters()}
    for flat, params in zip(fused.fp32_groups_flat, groups, strict=True):
        assert torch.equal(flat, torch.cat([right[names[id(p)]].flatten() for p in params]))


def test_one_process_and_what_stays(saved, caplog) -> None:
    """The optimizer keeps the state and the options that it has."""
    run = built(level=1, recipe="energy")
    train(run, steps()[2:4])
    state = [t.clone() for s in run[1].state.values() for t in s.values()]
    run[1].param_groups[0]["lr"] = 0.125
    torch.manual_seed(3)
    numbers = torch.get_rng_state()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loaded = gwt_dist.load(saved, *run, weights_only=True)
    assert torch.equal(numbers, torch.get_rng_state())
    assert not caplog.records
    assert (loaded.left.in_model, bool(loaded.left)) == ((), False)
    assert unlike(dict(run[0].named_parameters()), expected(saved)) == []
    assert same(state, [t for s in run[1].state.values() for t in s.values()])
    assert run[1].param_groups[0]["lr"] == 0.125


def test_what_was_left_is_logged(saved, caplog) -> None:
    model = Net()
    model.more = nn.Linear(2, 2)
    del model.norm
    with caplog.at_level(logging.WARNING):
        gwt_dist.load(saved, model, weights_only=True, strict=False)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "1 tensors are in the checkpoint alone: norm.weight" in text
    assert "2 tensors are in the model alone and stay as they are: more.bias, more.weight" in text


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "got no optimizer, so the state in the checkpoint would be lost"),
        ({"weights_only": True, "scheduler": object()}, "got a scheduler and weights_only=True"),
        ({"strict": False}, "got no optimizer"),
    ],
)
def test_arguments_that_contradict(saved, keywords, message) -> None:
    model = Net()
    before = content((model, GWTAdamW(model.parameters(), level=1)))
    with pytest.raises(CheckpointError, match=message):
        gwt_dist.load(saved, model, **keywords)
    assert same(before, content((model, GWTAdamW(model.parameters(), level=1))))


def test_nothing_that_fits_is_an_error(saved) -> None:
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(
        CheckpointError, match=r"nothing in .* fits this model: it has attn_q.weight, .* the model 0.bias"
    ):
        gwt_dist.load(saved, other, weights_only=True, strict=False)


def test_dtypes_that_are_no_rounding_stay_errors(saved) -> None:
    model = Net()
    model.frozen.weight.data = model.frozen.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"'frozen.weight' is F32 in .* and F8_E4M3 here, which is no rounding"):
        gwt_dist.load(saved, model, weights_only=True, strict=False)


def test_adapters_around_a_base(saved) -> None:
    """The base goes into the module that it is of, before or after others are put around it."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = Net()
            self.adapter = nn.Linear(4, 4)

    model = Adapted()
    with pytest.raises(CheckpointError, match=r"nothing in .* fits this model"):
        gwt_dist.load(saved, model, weights_only=True, strict=False)
    gwt_dist.load(saved, model.base, weights_only=True)
    assert unlike(dict(model.base.named_parameters()), expected(saved)) == []


class Tied(nn.Module):
    def __init__(self, tied: bool, head_first: bool = False) -> None:
        super().__init__()
        layers = {"embed": nn.Embedding(5, 4), "middle": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)}
        for name in reversed(layers) if head_first else layers:
            self.add_module(name, layers[name])
        if tied:
            self.head.weight = self.embed.weight


def test_tied_weights(tmp_path) -> None:
    """They are found under any of their names; what is apart in the checkpoint and one here is an error."""
    for tied in (True, False):
        torch.manual_seed(1)
        model = Tied(tied)
        optimizer = GWTAdamW(model.parameters(), level=1, recipe="energy")
        folder = tmp_path / str(tied)
        gwt_dist.save(folder, model, optimizer, step=0)
        for here, head_first in ((True, False), (True, True), (False, False)):
            torch.manual_seed(2)
            other = Tied(here, head_first)
            if here and not tied:
                with pytest.raises(CheckpointError, match=r"does not have (head|embed).weight"):
                    gwt_dist.load(folder, other, weights_only=True)
                continue
            gwt_dist.load(folder, other, weights_only=True)
            assert torch.equal(other.embed.weight, model.embed.weight)
            assert torch.equal(other.head.weight, model.head.weight)
            assert (other.head.weight is other.embed.weight) is here


def test_old_versions(saved) -> None:
    """They know no excluded tensors and no tied names."""
    data = Path(__file__).parent / "data" / "checkpoints" / "version-1-paper"
    assert gwt_dist.checkpoint.read_index(gwt_dist.checkpoint.locate(data)[0]).excluded == {}

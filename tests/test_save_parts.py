"""Saves without frozen weights, and by a part of the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gwt_dist
from gwt_dist import CheckpointError, GWTAdamW
from gwt_dist.checkpoint import read_index
from gwt_dist.checkpoint.export import export_model
from gwt_dist.cli.app import main
from save_parts_cases import (
    TRAINED,
    Adapted,
    adapters_case,
    disagreeing_case,
    elsewhere_case,
    groups_case,
    stored_names,
)
from zero_cases import Net

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")

FROZEN = sorted({n for n, _ in Net().named_parameters()} - set(TRAINED))


def test_adapters_without_their_base(ranks, tmp_path) -> None:
    kinds = ["ddp", "fsdp2", "fsdp1", "fsdp1 flat", "zero2", "zero3"]
    shapes = {n: (tuple(p.shape), "F32") for n, p in Net().named_parameters() if n in FROZEN} | {"mask": ((3,), "F32")}
    for result in ranks(2, adapters_case, str(tmp_path), kinds):
        for kind in kinds:
            found = result[kind]
            assert found["error"] < 1e-6, kind
            assert found["stored"] == sorted(TRAINED), kind
            assert found["bytes"] == 0, kind
            assert found["index"] == shapes, kind
            assert found["left"] == (tuple(sorted(shapes)), True, ()), kind
            assert found["base"] == 5.0, kind


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp1", "zero2"])
def test_a_group_and_a_rank_that_is_not_in_it(ranks, tmp_path, kind) -> None:
    """Then what it saved is loaded by another group, and by a world of 1."""
    first, outside, last = ranks(3, groups_case, str(tmp_path), kind, [[2, 0]])
    for error, world, files, random, drawn, restored in (first, last):
        assert error < 1e-6
        assert (world, files) == (2, ["rank-00000.safetensors", "rank-00001.safetensors"])
        assert (random, drawn, restored) == ([0, 1], True, True)
    for message in outside:
        assert "rank 1 of 3 called gwt_dist." in message
        assert "with a process_group that it is not in" in message
    for world, members in ((3, [1, 2]), (1, None)):
        for result in ranks(world, elsewhere_case, str(tmp_path / "0"), kind, members):
            assert result is None or result[0] < 1e-6


@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_groups_that_save_at_once(ranks, tmp_path, kind) -> None:
    """Under ZeRO-3 DeepSpeed waits for all ranks when an engine is built, so all build one."""
    results = ranks(3, groups_case, str(tmp_path), kind, [[0, 2], [1]])
    assert [result[1] for result in results] == [2, 1, 2]
    assert max(result[0] for result in results) < 1e-6


def test_ranks_that_disagree(ranks, tmp_path) -> None:
    for left_out, mode in ranks(2, disagreeing_case, str(tmp_path)):
        assert "ranks leave out different tensors: frozen.weight; embed.weight" in left_out
        assert "ranks disagree about weights_only, strict and convert_state: (True, True, False) on rank 0" in mode


def run() -> tuple[nn.Module, GWTAdamW]:
    model = Adapted(1.0)
    return model, GWTAdamW([p for p in model.parameters() if p.requires_grad], level=1)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("all-frozen", FROZEN),
        ("mask", ["mask"]),
        (["embed", r"mlp_d.*\.bias"], ["embed.weight", "mlp_down.bias"]),
        ((), []),
        ([], []),
        (["all-frozen", "mask"], [*FROZEN, "mask"]),
    ],
)
def test_patterns(tmp_path, exclude, left) -> None:
    model, optimizer = run()
    folder = gwt_dist.save(tmp_path, model, optimizer, step=0, exclude=exclude)
    everything = {n for n, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert sorted(read_index(folder).excluded) == sorted(left)
    assert stored_names(folder) == everything - set(left)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (
            "embedd",
            r"exclude='embedd' matches no tensor of the model, so nothing would be left out. Names .* embed.weight",
        ),
        ("all-linear", r"exclude='all-linear' matches no tensor"),
        (["frozen", "attn"], r"exclude='attn' matches attn_q.weight, which the optimizer steps"),
        (
            "weight",
            r"exclude='weight' matches attn_q.weight, mlp_row.weight, mlp_thin.weight, which the optimizer steps",
        ),
        ("(", r"exclude '\(' is not a regular expression"),
        ("", r"exclude '' must be a part of a name"),
        ([3], r"exclude 3 must be a part of a name"),
    ],
)
def test_patterns_that_cannot_be_meant(tmp_path, exclude, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        gwt_dist.save(tmp_path / "run", *run(), step=0, exclude=exclude)
    assert not (tmp_path / "run").exists()


def test_all_frozen_of_a_model_that_is_all_trained(tmp_path) -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="exclude='all-frozen' matches no frozen parameter"):
        gwt_dist.save(tmp_path, model, GWTAdamW(model.parameters(), level=1), step=0, exclude="all-frozen")


def test_what_another_optimizer_may_step_is_not_frozen(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = GWTAdamW(model[0].parameters(), level=1)
    with pytest.raises(CheckpointError, match=r"1.bias, 1.weight is in no group of this optimizer and requires a grad"):
        gwt_dist.save(tmp_path, model, optimizer, step=0, exclude="all-frozen")
    model[1].requires_grad_(False)
    assert len(read_index(gwt_dist.save(tmp_path, model, optimizer, step=0, exclude="all-frozen")).excluded) == 2


def test_what_was_left_out_must_be_there(tmp_path) -> None:
    """With the shape that it had; and a tensor that was frozen and is trained now starts without state."""
    gwt_dist.save(tmp_path, *run(), step=0, exclude="all-frozen")
    model, optimizer = run()
    model.frozen = nn.Linear(6, 5, bias=False)
    with pytest.raises(CheckpointError, match=r"'frozen.weight' has shape \(5, 5\) in .* and \(5, 6\) in this model"):
        gwt_dist.load(tmp_path, model, optimizer)
    del model.frozen
    with pytest.raises(CheckpointError, match=r"this model does not have frozen.weight"):
        gwt_dist.load(tmp_path, model, optimizer)
    with pytest.raises(CheckpointError, match=r"this model does not have frozen.weight"):
        gwt_dist.load(tmp_path, model, weights_only=True)
    assert gwt_dist.load(tmp_path, model, weights_only=True, strict=False).left.in_checkpoint == ("frozen.weight",)
    thawed = Adapted(2.0)
    thawed.frozen.weight.requires_grad_(True)
    optimizer = GWTAdamW([p for p in thawed.parameters() if p.requires_grad], level=1)
    assert "frozen.weight" in gwt_dist.load(tmp_path, thawed, optimizer).left.excluded
    assert bool((thawed.frozen.weight == 2.0).all())


def test_inspect_and_export(tmp_path, capsys) -> None:
    folder = gwt_dist.save(tmp_path / "run", *run(), step=0, exclude="frozen", extra={"model_config": {"a": 1}})
    assert main(["inspect", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["excluded"] == [{"name": "frozen.weight", "shape": [5, 5], "dtype": "F32"}]
    assert main(["inspect", str(folder)]) == 0
    assert "left out" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"was saved without frozen.weight \(exclude=\), so it is no whole model"):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["excluded"].update(more={"shape": [-1], "dtype": "F32"}), r"excluded.more.shape is no number"),
        (lambda i: i["excluded"].update(more={"shape": [1]}), r"excluded.more should have the keys"),
        (lambda i: i["excluded"].update({"mask": {"shape": [3], "dtype": "F32"}}), r"mask is among the tensors too"),
        (lambda i: i["tied"].update(more="nobody"), r"tied.more is 'nobody', and no other name"),
        (lambda i: i["tied"].update(mask="mask"), r"tied.mask is 'mask'"),
        (lambda i: i["tied"].update(more=3), r"tied.more is 3"),
        (lambda i: i.pop("tied"), r"the index should have the keys"),
    ],
)
def test_forged(tmp_path, change, message) -> None:
    from gwt_dist.checkpoint.parse import parse

    folder = gwt_dist.save(tmp_path, *run(), step=0, exclude="frozen")
    index = json.loads((folder / "index.json").read_text())
    change(index)
    with pytest.raises(CheckpointError, match=message):
        parse(json.dumps(index).encode(), "index.json", None)


def test_a_group_without_torch_distributed(tmp_path) -> None:
    assert not torch.distributed.is_initialized()
    with pytest.raises(CheckpointError, match=r"gwt_dist.save got a process_group, and torch.distributed is not"):
        gwt_dist.save(Path(tmp_path), *run(), step=0, process_group=object())

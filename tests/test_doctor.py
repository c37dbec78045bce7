"""`gwt-dist doctor`: what it refuses is what a run refuses, in the same words."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gwt_dist
from gwt_dist.cli import diagnosis
from gwt_dist.cli.app import main
from gwt_dist.engines import refusals
from gwt_dist.kernels import build, choice, cpu
from gwt_dist.layout import Fragment
from gwt_dist.piece import Piece
from gwt_dist.recipes import program_of
from gwt_dist.units import units_of

ROOT = Path(__file__).parents[1]


PARAMS: dict[str, Any] = {"lr": 0.001, "level": 2, "recipe": "energy", "targets": ["attn", "mlp"]}


def good() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "GWTAdamW", "params": PARAMS},
    }


def net() -> nn.Module:
    return nn.ModuleDict({"attn": nn.Linear(30, 20), "mlp": nn.Linear(20, 9)})


def experts() -> nn.Module:
    model = net()
    model["mlp"].weight.allreduce = False
    return model


def examined(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> dict[str, Any]:
    assert main(["doctor", *arguments, "--json"]) == code
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def write(folder: Path, settings: dict[str, Any]) -> str:
    file = folder / "zero.json"
    file.write_text(json.dumps(settings))
    return str(file)


CHANGES: dict[str, dict[str, Any]] = {
    "elastic": {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}},
    "nvme": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
    "fp16 at stage 0": {"zero_optimization": {"stage": 0}, "fp16": {"enabled": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    "unknown key": {"optimizer": {"type": "GWTAdamW", "params": {"levle": 2}}},
    "level": {"optimizer": {"type": "GWTAdamW", "params": {"level": 17}}},
    "wavelet": {"optimizer": {"type": "GWTAdamW", "params": {"wavelet": "haarr"}}},
    "betas": {"optimizer": {"type": "GWTAdamW", "params": {"betas": [0.9, 1.0]}}},
    "target": {"optimizer": {"type": "GWTAdamW", "params": {"targets": ["attn", "mpl"]}}},
}


@pytest.mark.parametrize(
    ("change", "build_model"),
    [*((change, net) for change in CHANGES.values()), ({}, experts)],
    ids=[*CHANGES.keys(), "experts"],
)
def test_a_run_says_the_same(
    change: dict[str, Any],
    build_model: Callable[[], nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = good() | change
    arguments = ["--deepspeed-config", write(tmp_path, settings), "--model", f"{__name__}:{build_model.__name__}"]
    content = examined(capsys, arguments, 1)
    told = [finding["text"] for finding in content["findings"] if finding["kind"] == "refused"]

    def build_optimizer(**given: Any) -> None:  # what DeepSpeed does first with a callable
        given["optimizer"](None)

    monkeypatch.setattr("deepspeed.initialize", build_optimizer)
    with pytest.raises(ValueError) as refused:
        gwt_dist.initialize(model=build_model(), config=arguments[1])
    assert told == [str(refused.value)]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"level": 99}, "level=99"),
        ({"state_dtype": "fp8"}, "state_dtype='fp8' in rest"),
        ({"recipe": "enrgy"}, "recipe='enrgy' in rest"),
        ({"stochastic_rounding": True}, "parameter group 1 says stochastic_rounding=True"),
        ({"level": 1}, ""),
    ],
)
def test_the_rest_is_examined_without_a_model(
    rest: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = good() | {"optimizer": {"type": "GWTAdamW", "params": {"recipe": "energy", "rest": rest}}}
    content = examined(capsys, ["--deepspeed-config", write(tmp_path, settings)], int(bool(message)))
    assert [message in finding["text"] for finding in content["findings"]] == [True] * bool(message)


def test_all_reasons_at_once_where_a_run_stops_at_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero = {"stage": 2, "elastic_checkpoint": True, "zero_hpz_partition_size": 4, "offload_optimizer": {"ratio": 0.5}}
    settings = good() | {"zero_optimization": zero, "optimizer": {"type": "GWTAdamW", "params": {"level": 99}}}
    content = examined(capsys, ["--deepspeed-config", write(tmp_path, settings)], 1)
    told = [f["text"] for f in content["findings"] if f["kind"] == "refused"]
    assert len(told) == 4 and told[:3] == list(refusals.reasons(settings)) and "level=99" in told[3]
    with pytest.raises(ValueError, match=re.escape(told[0])):
        refusals.refuse(settings)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.name)
def test_our_own_configurations_are_not_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = examined(capsys, ["--deepspeed-config", str(path), "--model", "tiny"], 0)
    kinds = [finding["kind"] for finding in content["findings"]]
    assert kinds == (["warning"] if "adamw" in path.name else [])


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"gradient_clipping": None}, [], "DeepSpeed clips at 1.0"),
        ({"sequence_parallel_size": 2, "data_parallel_size": 1}, [], "gradient over the ranks of a sequence"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            [],
            "zero_force_ds_cpu_optimizer",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, [], "optimizer.type is 'AdamW'"),
        ({}, ["--level", "9"], "compiled kernels end at 8"),
        ({}, ["--level", "5"], "2 of its 2 matrices have shorter rows"),
        ({}, ["--wavelet", "db2"], "its unit is a whole row"),
    ],
)
def test_warnings(
    change: dict[str, Any],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {key: value for key, value in (good() | change).items() if value is not None}
    file = write(tmp_path, settings)
    content = examined(capsys, ["--deepspeed-config", file, "--model", f"{__name__}:net", *arguments], 0)
    assert any(message in finding["text"] for finding in content["findings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--deepspeed-config", "no.json"], "'no.json' is not a file"),
        (["--model", "no such model"], "no model 'no such model'"),
    ],
)
def test_mistakes_are_no_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_versions_and_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    content = examined(capsys, [], 0)
    assert content["versions"]["torch"] == torch.__version__
    for package in diagnosis.PACKAGES:
        version = content["versions"][package]
        there = importlib.util.find_spec({"PyWavelets": "pywt"}.get(package, package)) is not None
        assert (version is not None) == there, package
    assert content["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert content["machine"]["compiled kernels in"] == str(build.folder())
    assert content["findings"] == []
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "kernels, for fp32 weights" in shown and "…" not in shown, "a path is cut"


def kernel(level: int, wavelet: str = "haar", **keys: Any) -> dict[str, str]:
    """What is told of a CPU; what would run must be it."""
    fragment = Fragment("", (8, 64), 0, 512)
    piece = Piece.of(fragment, units_of(fragment.shape, level, wavelet).moments(fragment), level, wavelet)
    group = {"recipe": "energy", "level": level, "wavelet": wavelet, **keys}
    told = diagnosis.kernels(group, torch.float32)["cpu"]
    try:
        chosen = choice.choose(torch.device("cpu"), torch.float32, program_of(group, level), [piece])
    except ValueError:
        assert told["kernel"] == "none"
    else:
        assert chosen is choice._MODULES[told["kernel"]]
    return told


def test_the_kernel_that_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.prepare(program_of({"recipe": "energy"}, 2))
    assert kernel(2) == {"kernel": "cpu", "why": "the fastest that takes it; compiled already"}
    assert "levels above 8" in kernel(9)["why"]
    assert "other than Haar" in kernel(2, "db2")["why"]
    kernel(2, cautious=True)
    monkeypatch.setenv(choice.VARIABLE, "eager")
    assert kernel(2) == {"kernel": "eager", "why": "GWT_DIST_KERNEL forces it"}
    monkeypatch.setenv(choice.VARIABLE, "cpu")
    assert "a step raises" in kernel(2, "db2")["why"]
    monkeypatch.setenv(choice.VARIABLE, "fast")
    assert "must be one of" in kernel(2)["why"]


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"recipe": "orthogonal"}, {"cpu": "eager", "cuda": "eager"}),
        ({}, {"cpu": "eager", "cuda": "eager"}),
        ({"recipe": "orthogonal", "second_moment": "energy"}, {"cpu": "eager", "cuda": "eager"}),
        ({"recipe": "pepper"}, {"any": "none"}),
        ({"recipe": "foam", "wavelet": "db2"}, {"any": "none"}),
    ],
)
def test_kernels_are_those_of_the_program(
    params: dict[str, Any],
    told: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All keys of the JSON count, and what is refused has none."""
    monkeypatch.setenv(choice.VARIABLE, "eager")
    settings = good() | {"optimizer": {"type": "GWTAdamW", "params": params}}
    content = examined(capsys, ["--deepspeed-config", write(tmp_path, settings)], int(told == {"any": "none"}))
    assert {device: found["kernel"] for device, found in content["kernels"].items()} == told
    if told == {"any": "none"}:
        assert content["kernels"]["any"]["why"].split(" in ")[0] in content["findings"][0]["text"]


def test_a_machine_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "gwt_dist").mkdir()
    other = tmp_path / "gwt_dist" / f"gwt_dist_cpu_{build.capability().lower()}-0123456789abcdef.so"
    other.write_bytes(b"")  # of another version
    found = diagnosis.kernels({"level": 2, "recipe": "energy"}, torch.float32)["cpu"]
    assert found == {
        "kernel": "cpu",
        "why": "the fastest that takes it; compiled at the first step, which takes up to a minute, once",
    }
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = diagnosis.kernels({"level": 2, "recipe": "energy"}, torch.float32)["cpu"]
    assert found["kernel"] == "eager" and "'no-such-compiler' is not on the PATH" in found["why"]
    assert diagnosis.machine()["C++ compiler"] is None
    assert list(other.parent.iterdir()) == [other]  # it looks, and compiles nothing

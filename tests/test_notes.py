"""What is told of groups that are legal and may not be what was meant."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import gwt_dist
from gwt_dist import GWTAdamW, param_groups
from gwt_dist.cli.app import main
from gwt_dist.engines.section import from_section, offer
from gwt_dist.integrations import engaged, transformers
from gwt_dist.notes import HIGH_RATE
from gwt_dist.recipes import LEVEL, WITHOUT_PRODUCTS, program_of

LOGGER = "gwt_dist.optimizer"


def weights() -> list[nn.Parameter]:
    """A vector, a matrix of 8 rows for each column, one of more, and a tensor of three dimensions."""
    return [nn.Parameter(torch.zeros(shape)) for shape in ((99,), (80, 10), (81, 10), (200, 2, 2))]


def told(caplog: pytest.LogCaptureFixture, groups: Any, **options: Any) -> list[str]:
    """What the optimizer of these groups has logged."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=LOGGER):
        GWTAdamW(groups, **options)
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_the_default_is_orthogonal_at_level_1() -> None:
    optimizer = GWTAdamW(param_groups(net()))
    assert optimizer.is_default and not GWTAdamW(param_groups(net()), recipe="orthogonal").is_default
    for where in (optimizer.param_groups[0], optimizer.state_dict()["param_groups"][0]):
        assert (where["recipe"], where["level"]) == ("orthogonal", 1)


def test_an_embedding_that_nobody_asked_to_orthogonalize(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = told(caplog, weights(), level=1)
    assert message.startswith("parameter group 0 has 1 tensors with over 8 times as many rows as columns")
    for part in ("shape (81, 10)", "no recipe was named", "param_groups(model)", "write recipe='orthogonal'"):
        assert part in message
    # Of a group of its own too, whose number is said, and of no other.
    vector, matrix, tall, _ = weights()
    (message,) = told(caplog, [{"params": [vector, matrix]}, {"params": [tall]}], level=1)
    assert message.startswith("parameter group 1 has")
    assert told(caplog, [vector, matrix], level=1) == []


def test_matrices_of_which_no_level_was_said(caplog: pytest.LogCaptureFixture) -> None:
    """They are AdamW's, and one warning says so, but where it was meant or changes nothing."""
    for options in ({}, {"recipe": "energy"}):
        (message,) = told(caplog, [{"params": weights()[:2], **options}, {"params": weights()}])
        assert message.startswith("parameter group 0 says no level, so its 1 matrices are AdamW's")
        assert "GWTAdamW(gwt_dist.param_groups(model))" in message and "level=0" in message
    bare = GWTAdamW(weights(), recipe="foam")
    assert (bare.defaults["level"], bare.param_groups[0]["level"]) == (0, 0)
    for options in ({"level": 0}, {"level": 2}, {"recipe": "adalomo"}, {"recipe": "low-rank"}, {"least_level": 0}):
        assert told(caplog, weights(), **{"recipe": "orthogonal", **options}) == [], options
    assert told(caplog, weights()[:1]) == []


def test_an_embedding_of_which_something_was_said(caplog: pytest.LogCaptureFixture) -> None:
    for options in (
        *({"recipe": name} for name in ("orthogonal", "foam", "energy")),
        *({"level": 0}, {"second_moment": "energy"}),
    ):
        assert told(caplog, weights(), **{"level": 1, **options}) == [], options
        assert told(caplog, [{"params": weights(), "level": 1, **options}]) == [], options
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(81, 10),
            "attn": nn.Linear(10, 10),
            "mlp": nn.Linear(10, 10),
            "lm_head": nn.Linear(10, 81),
        }
    )
    assert told(caplog, param_groups(model)) == []
    assert told(caplog, param_groups(model, targets="all-linear")) == [], "nor a head, or an adapter, that is a target"


def test_a_copy_does_not_know_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    vector, matrix, tall, _ = weights()
    twin = copy.deepcopy(GWTAdamW([vector, matrix], level=1))
    with caplog.at_level(logging.INFO, logger=LOGGER):
        twin.add_param_group({"params": [tall]})
    assert not caplog.records and twin.param_groups[1]["recipe"] == "orthogonal"


def test_a_rate_of_the_time_of_another_scale(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = told(caplog, weights()[:1], lr=HIGH_RATE, recipe="foam", level=1)
    assert "lr=0.005 in parameter group 0" in message and "(it is 1 with the recipe 'foam')" in message
    new = ({"recipe": recipe} for recipe in ("factored", "came", "adalomo"))  # which never had a scale of 0.25
    for options in ({"lr": 0.0049}, {"scale": 0.25}, {"scale": 1.0}, {"recipe": "paper"}, {"level": 0}, *new):
        assert told(caplog, weights()[:1], **{"lr": HIGH_RATE, "recipe": "foam", "level": 1, **options}) == [], options


def net() -> nn.Module:
    return nn.ModuleDict({"attn": nn.Linear(30, 20), "mlp": nn.Linear(20, 9)})


ADAMW: dict[str, Any] = {"level": 0, "least_level": 1}


@pytest.mark.parametrize(
    ("params", "device", "number"),
    [
        *(({}, "cpu", 1), ({"level": 2}, "cpu", 1), ({}, "none", 0)),
        *(({"recipe": "orthogonal"}, "cpu", 0), ({"recipe": WITHOUT_PRODUCTS}, "cpu", 0), (ADAMW, "cpu", 0)),
    ],
    ids=str,
)
def test_products_on_a_cpu_that_nobody_asked_for(
    params: dict[str, Any],
    device: str,
    number: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By `initialize`, of a section and of an optimizer that is passed, and by `doctor`."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": device}},
        "zero_force_ds_cpu_optimizer": False,
    }
    section = settings | {"optimizer": {"type": "GWTAdamW", "params": params}}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(section))
    assert main(["doctor", "--deepspeed-config", str(file), "--model", f"{__name__}:net", "--json"]) == 0
    findings = [finding["text"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert len(findings) == number
    for text in findings:
        assert "multiplies whole matrices there" in text and f'Write "recipe": "{WITHOUT_PRODUCTS}" for' in text
    assert not program_of({"recipe": WITHOUT_PRODUCTS}, LEVEL).travels

    def build_optimizer(**given: Any) -> None:  # what DeepSpeed does first with a callable
        if callable(given["optimizer"]):
            given["optimizer"](None)
        raise InterruptedError

    monkeypatch.setattr("deepspeed.initialize", build_optimizer)
    for config, optimizer in ((section, None), (settings, GWTAdamW(param_groups(net(), **params)))):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="gwt_dist"), pytest.raises(InterruptedError):
            gwt_dist.initialize(model=net(), optimizer=optimizer, config=config)
        assert [record.getMessage() for record in caplog.records] == findings


@pytest.mark.parametrize(("params", "number"), [({}, 1), ({"recipe": "orthogonal"}, 0), (ADAMW, 0)], ids=str)
def test_products_on_a_cpu_under_a_trainer(
    params: dict[str, Any], number: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a section that DeepSpeed itself builds, when it is attached, and not when training goes on."""
    model = net()
    offer(model)
    optimizer = from_section(model.parameters(), **params)
    wrapper = type("DeepSpeedOptimizerWrapper", (), {})()  # of Accelerate, around ZeRO's around ours
    wrapper.optimizer = SimpleNamespace(optimizer=optimizer)
    settings = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    plugin = SimpleNamespace(deepspeed_config=settings)
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: SimpleNamespace(deepspeed_plugin=plugin))
    monkeypatch.setattr(engaged, "attach", lambda *_: monkeypatch.setattr(GWTAdamW, "shards", {"of": "ZeRO"}))
    with caplog.at_level(logging.WARNING, logger="gwt_dist"):
        for _ in range(2):
            assert engaged.engage(wrapper, model, "DeepSpeed") == "flat shards"
    assert len(caplog.records) == number
    assert all("multiplies whole matrices there" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("section", "group", "is_default"),
    [({}, {}, True), ({"recipe": "orthogonal"}, {}, False), ({}, {"recipe": "orthogonal"}, False)],
)
def test_a_section_over_groups_that_say_their_level(
    section: dict[str, Any], group: dict[str, Any], is_default: bool
) -> None:
    groups = [{"params": list(net().parameters()), "level": 1, **group}]
    assert from_section(groups, **section).is_default is is_default


@pytest.mark.parametrize("options", [{}, {"recipe": "orthogonal"}], ids=str)
def test_an_optimizer_that_the_trainer_builds(options: dict[str, Any]) -> None:
    """By `optimizer_cls_and_kwargs`, which writes the recipe into all groups too."""
    built = transformers._Factory()(net(), targets=["mlp"], weight_decay=0.1, **options)
    assert built.is_default is not bool(options)

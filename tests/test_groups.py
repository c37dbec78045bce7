"""Which parameters get which level."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from gwt_dist import GWTAdamW, param_groups


def model() -> nn.Module:
    net = nn.Module()
    net.embed = nn.Embedding(10, 8)
    net.layers = nn.ModuleList([nn.Module() for _ in range(2)])
    for layer in net.layers:
        layer.self_attn = nn.Linear(8, 8)
        layer.mlp = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
        layer.norm = nn.LayerNorm(8)
    net.head = nn.Linear(8, 10, bias=False)
    net.head.weight = net.embed.weight
    return net


def chosen(net: nn.Module, groups: list[dict]) -> dict[int, set[str]]:
    names = {id(p): n for n, p in net.named_parameters()}
    return {g["level"]: {names[id(p)] for p in g["params"]} for g in groups}


def test_groups_in_the_place_of_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"given list as the model, .*param_groups\(model, params=groups\) keeps"):
        param_groups([{"params": []}])  # type: ignore[arg-type]


def test_linear_weights_that_match_get_the_level_and_all_others_level_0() -> None:
    net = model()
    groups = chosen(net, param_groups(net, level=3))
    assert groups[3] == {
        f"layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.weight", "mlp.0.weight", "mlp.1.weight")
    }
    assert groups[0] == {n for n, _ in net.named_parameters()} - groups[3]
    assert "layers.0.self_attn.bias" in groups[0]
    assert "embed.weight" in groups[0], "a tied weight is taken once"


def test_first_match_wins_and_a_regular_expression_matches_the_whole_name() -> None:
    net = model()
    groups = chosen(net, param_groups(net, targets={r"layers\.0\..*": 1, "mlp": 4, r"layers\.\d+\.self_attn": 2}))
    assert groups[1] == {"layers.0.self_attn.weight", "layers.0.mlp.0.weight", "layers.0.mlp.1.weight"}
    assert groups[4] == {"layers.1.mlp.0.weight", "layers.1.mlp.1.weight"}
    assert groups[2] == {"layers.1.self_attn.weight"}


def test_all_linear_leaves_a_tied_embedding_and_includes_a_head_of_its_own() -> None:
    net = model()
    found = chosen(net, param_groups(net, targets="all-linear", level=2))
    assert len(found[2]) == 6 and "embed.weight" in found[0]
    assert "embed.weight" in chosen(net, param_groups(net, targets=["all-linear", "head"], level=2))[2]
    net.head.weight = nn.Parameter(torch.zeros(10, 8))
    assert "head.weight" in chosen(net, param_groups(net, targets="all-linear", level=2))[2]


def test_options_reach_every_group_and_given_groups_keep_their_own() -> None:
    net = model()
    first, second = list(net.layers[0].parameters()), list(net.layers[1].parameters())
    groups = param_groups(
        net, params=[{"params": first, "lr": 0.5}, {"params": second, "name": "late"}], level=2, lr=0.1, recipe="energy"
    )
    assert [(g["level"], g["lr"], g["recipe"], g.get("name")) for g in groups] == [
        (2, 0.5, "energy", None),
        (0, 0.5, "energy", None),
        (2, 0.1, "energy", "late"),
        (0, 0.1, "energy", "late"),
    ]
    assert sum(len(g["params"]) for g in groups) == len(first) + len(second)


def test_frozen_parameters_are_left_out() -> None:
    net = model()
    net.layers[0].requires_grad_(False)
    names = set().union(*chosen(net, param_groups(net)).values())
    assert names == {n for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["attn", "mpl"], r"target 'mpl' matches no weight matrix to be trained.*layers\.0\.mlp\.0"),
        ("embed", "target 'embed' matches no weight matrix"),
        ([], "targets is empty"),
        (["mlp", "("], r"target '\(' is not a regular expression"),
        ([""], "target '' must be a part of a module name"),
    ],
)
def test_targets_that_choose_nothing_are_refused(targets: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(model(), targets=targets)  # type: ignore[arg-type]


def test_a_frozen_target_is_refused() -> None:
    net = model()
    for layer in net.layers:
        layer.mlp.requires_grad_(False)
    message = r"'mlp' matches no weight matrix to be trained.*: head, layers\.0\.self_attn, layers\.1\.self_attn$"
    with pytest.raises(ValueError, match=message):
        param_groups(net, targets=["attn", "mlp"])
    assert len(chosen(net, param_groups(net, level=2))[2]) == 2, "what is no pattern takes what there is"


def test_a_parameter_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) in `params` does not belong to the model"):
        param_groups(model(), params=[nn.Parameter(torch.zeros(3))])


def test_it_says_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gwt_dist"):
        param_groups(model(), level=2)
    assert "blocks               level 2      6 tensors             640 elements  83.33%" in caplog.text
    assert "all others           level 0" in caplog.text


def keys(groups: list[dict]) -> list[dict]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def test_what_matches_no_target_has_keys_of_its_own() -> None:
    net = model()
    given = {"recipe": "orthogonal", "nor": 0.95, "detail_gain": 0.5, "nesterov": True, "state_dtype": "int8"}
    given |= {"least_level": 0}
    matrices, others = param_groups(net, level=1, rest={"recipe": "energy", "level": 3, "scale": 1.0}, **given)
    assert keys([matrices])[0] == {**given, "level": 1}
    kept = {key: value for key, value in others.items() if key != "params" and value is not None}
    assert kept == {"recipe": "energy", "level": 3, "scale": 1.0, "state_dtype": "int8"}
    assert len(others["params"]) == len(list(net.parameters())) - len(matrices["params"])
    # Defaults of the optimizer do not act where the recipe of the rest would not read them.
    optimizer = GWTAdamW([matrices, others], lr=0.1, **given)
    assert [g["nor"] for g in optimizer.param_groups] == [0.95, None]
    # The same recipe keeps its keys.
    assert param_groups(net, rest={"level": 3}, recipe="foam", nesterov=True)[1]["nesterov"] is True
    assert param_groups(net, rest={"recipe": "energy"}, recipe="energy", detail_gain=0.5)[1]["detail_gain"] == 0.5


def test_matrices_of_level_0_that_are_orthogonalized_do_not_take_embeddings_along() -> None:
    net = model()
    groups = param_groups(net, level=0, recipe="orthogonal", least_level=0)
    optimizer = GWTAdamW(groups, lr=0.1)
    assert [(g["level"], g["least_level"]) for g in groups] == [(0, 0), (0, None)]
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert "exp_avg_sq" in optimizer.state[net.embed.weight]
    assert "exp_avg_sq" not in optimizer.state[net.layers[0].self_attn.weight]
    # Neither where the optimizer is told.
    told = GWTAdamW(param_groups(model(), level=0), lr=0.1, recipe="orthogonal", least_level=0)
    assert [g["least_level"] for g in told.param_groups] == [0, None]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"levle": 1}, "rest has the unknown key 'levle' .did you mean 'level'"),
        (
            {"amsgrad": 1, "levle": 1},
            r"the unknown key 'amsgrad', the unknown key 'levle' \(did you mean 'level'\?\)",
        ),
        ({"recipe": "enery"}, r"recipe='enery' in rest must be one of"),
        ({"recipe": "energy", "nor": 0.9}, r"nor=0.9 in rest, where the recipe is 'energy'"),
        ({"level": 1}, "level=1 and no recipe, so embeddings and head would be orthogonalized"),
        ({"level": 17}, "level=17"),
    ],
)
def test_keys_of_the_rest_that_are_refused(rest: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(model(), level=1, recipe="orthogonal", rest=rest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtpye": "int8"}, "unknown key 'state_dtpye', which no optimizer would read: 'state_dtype'"),
        ({"weigth_decay": 0.1}, "unknown key 'weigth_decay', which no optimizer would read: 'weight_decay'"),
        ({"LR": 0.1}, "unknown key 'LR', which no optimizer would read: 'lr'"),
        ({"lr": "x"}, "lr='x' in the options of param_groups must be a finite number"),
        ({"maximize": True}, "maximize=True in the options of param_groups, which GWTAdamW has not"),
        ({"params": [{"params": [], "weight_decya": 0.1}]}, "group 0 of params has the unknown key 'weight_decya'"),
        ({"rest": {"level": 1}}, "rest has level=1 and no recipe, and param_groups was told none"),
        ({"rest": "int8"}, "rest='int8' must be a mapping of keys"),
    ],
    ids=str,
)
def test_what_an_optimizer_would_take_in_silence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(model(), level=1, **options)
    own = {
        "lr_scale": 2.0,
        "initial_lr": 0.1,
        "name": "body",
        "max_lr": 1.0,
        "use_muon": True,
        "layer": 3,
        "fused": True,
    }
    group = param_groups(model(), level=1, **own)[0]
    assert group.items() >= own.items(), "schedules and users may have keys of their own"


def test_levels_of_targets_are_checked() -> None:
    for targets in ({"mlp": 17}, {"blocks": -1}):
        with pytest.raises(ValueError, match=r"level=(17|-1) must be a whole number from 0"):
            param_groups(model(), targets=targets)


@pytest.mark.parametrize(
    ("level", "options", "told"),
    [
        (0, {}, True),
        (0, {"recipe": "came"}, True),
        (0, {"least_level": 0}, False),
        (0, {"recipe": "energy"}, False),
        (0, {"recipe": "adalomo"}, False),  # takes matrices of level 0
        (1, {}, False),
    ],
)
def test_level_0_that_is_adamw_is_told(
    level: int, options: dict[str, Any], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    param_groups(model(), level, **options)
    assert ("level=0 and no least_level: the recipe" in caplog.text) is told

"""A study of optimizers: which runs come next, what a run measures, what is kept, and the command around it."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from documents import blocks
from gwt_dist import recipes
from gwt_dist.cli.app import main
from gwt_dist.study import compare as whole
from gwt_dist.study.compare import compare, identity
from gwt_dist.study.config import Batch, Point, Study, read_study, study_from
from gwt_dist.study.held import bytes_held
from gwt_dist.study.optimizers import ENTRIES, build, options_of, split
from gwt_dist.study.plan import FULL, SEEDS, SHORT, beside, outcome, ranked, wanted
from gwt_dist.study.plots import front
from gwt_dist.study.results import read_results
from gwt_dist.study.run import rate_factor
from gwt_dist.study.table import lines_of, paired, unequal

SHAPES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 258,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
ROWS = [
    {"name": "energy", "optimizer": "gwt", "lr": [0.01, 0.02]},
    {"name": "adamw", "optimizer": "adamw", "lr": [0.004]},
]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A study of two rows that takes a second."""
    words = random.Random(0).choices(("one", "two", "three", "four", "five"), k=12_000)
    for i in range(12):  # documents: some of them validate
        (tmp_path / f"{i}.txt").write_text(" ".join(words[1000 * i : 1000 * (i + 1)]))
    (tmp_path / "model.json").write_text(json.dumps(SHAPES))
    return {
        "model": str(tmp_path / "model.json"),
        "corpus": str(tmp_path / "*.txt"),
        "sequence_length": 16,
        "micro_batch": 2,
        "eval_tokens": 128,
        "seeds": [0, 1],
        "extend": 0,
        "batches": [{"tokens": 64, "steps": 8}],
        "rows": ROWS,
    }


def numbers(path: Path) -> dict[str, Any]:
    """What training gave, by run: all that must not depend on when and where it ran."""
    keys = (
        "row",
        "lr",
        "seed",
        "steps",
        "losses",
        "validation_loss",
        "state_bytes",
        "data_checksum",
        "weights_checksum",
    )
    return {key: [line.get(k) for k in keys] for key, line in read_results(path / "results.jsonl")[0].items()}


@pytest.mark.parametrize(("last", "best"), [(1.9, 0.04), (1.7, 0.08)])
def test_rates_until_both_neighbours_are_worse_then_the_other_seeds(
    settings: dict[str, Any], last: float, best: float
) -> None:
    rows = [{"name": "a", "optimizer": "gwt", "lr": [0.01, 0.02, 0.04, 0.08]}]
    study = study_from(settings | {"rows": rows, "extend": 1}, "here")
    results: dict[str, dict[str, Any]] = {}

    def end(losses: dict[float, float]) -> list[tuple[float, int, int, int]]:
        runs = wanted(study, "shared", results)
        for run in runs:
            results[run.key] = {"status": "ok", "validation_loss": losses[run.lr]}
        return [(run.lr, run.seed, run.steps, run.stage) for run in runs]

    assert end({0.01: 3.0, 0.02: 2.0, 0.04: 4.0, 0.08: 5.0}) == [(lr, 0, 2, SHORT) for lr in (0.01, 0.02, 0.04, 0.08)]
    assert end({0.01: 2.1, 0.02: 1.9, 0.04: 1.8}) == [(lr, 0, 8, FULL) for lr in (0.01, 0.02, 0.04)]
    assert end({0.08: last}) == [(0.08, 0, 8, FULL)]  # the best was the highest: one further
    assert end({best: 1.6}) == [(best, 1, 8, SEEDS)]
    assert end({}) == []
    found = outcome(study, "shared", study.rows[0], study.batches[0], results)
    assert (found.best, found.edge) == (Point(best, best, 0.0), best == 0.08)
    assert [point.lr for point in found.points] == [0.01, 0.02, 0.04, 0.08]
    assert found.trials == 4 + 3 + 1
    assert [run["validation_loss"] for run in found.runs] == [min(last, 1.8), 1.6]


def end(study: Study, results: dict[str, dict[str, Any]], loss: Any, row: str = "") -> list[tuple[float, ...]]:
    """End all runs that are wanted, with `loss(run)`; returns their settings and steps."""
    runs = wanted(study, "shared", results, row)
    for run in runs:
        results[run.key] = {"status": "ok", "validation_loss": loss(run), "seed": run.seed}
    return [(run.lr, run.rest_lr, run.options["weight_decay"], run.steps) for run in runs]


def test_each_setting_is_searched_with_the_best_of_those_before(settings: dict[str, Any]) -> None:
    row = {"name": "a", "optimizer": "adamw", "lr": [0.01, 0.02], "rest_lr": [0.1, 0.2, 0.4], "weight_decay": [0, 0.1]}
    more = {"name": "b", "optimizer": "sgd", "like": "a"}
    study = study_from(settings | {"rows": [row, more], "extend": 1}, "here")
    results: dict[str, dict[str, Any]] = {}

    def loss(run: Any) -> float:
        return abs(run.lr - 0.02) + abs(run.rest_lr - 0.8) + run.options["weight_decay"] + 0.01 * run.seed

    assert end(study, results, loss) == [(0.01, 0.2, 0, 2), (0.02, 0.2, 0, 2)]
    assert end(study, results, loss) == [(0.04, 0.2, 0, 2)]  # the best was the highest: one further
    assert end(study, results, loss) == [(0.02, 0.1, 0, 2), (0.02, 0.4, 0, 2)]
    assert end(study, results, loss) == [(0.02, 0.8, 0, 2)]
    assert end(study, results, loss) == [(0.02, 0.8, 0.1, 2)]  # of decays there is no further one
    assert end(study, results, loss) == [(0.01, 0.8, 0, 8), (0.02, 0.8, 0, 8), (0.04, 0.8, 0, 8)]
    # The seeds, and the row that takes these settings as they are.
    assert end(study, results, loss) == [(0.02, 0.8, 0, 8), (0.02, 0.8, 0, 8)]
    assert end(study, results, loss) == [(0.02, 0.8, 0, 8)]
    assert end(study, results, loss) == []
    found = [outcome(study, "shared", one, study.batches[0], results) for one in study.rows]
    assert [(one.best, one.trials, len(one.runs)) for one in found] == [
        (Point(0.02, 0.8, 0.0), 3 + 3 + 1 + 3, 2),
        (Point(0.02, 0.8, 0.0), 1, 2),
    ]


def test_a_run_that_would_not_end_in_time_is_not_started(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(whole.time, "monotonic", lambda: now[0])
    long, other, *_ = wanted(study_from(settings | {"short": 1.0}, "here"), "shared", {})
    short = dataclasses.replace(long, steps=long.steps // 4)
    deadline = whole._Deadline(60.0)
    assert deadline.allows(long)  # nothing is known yet
    deadline.ended(short, {"status": "ok", "seconds": 10.0})
    deadline.ended(short, {"status": "diverged", "seconds": 1000.0})
    assert deadline.allows(long) and deadline.allows(other)  # 40 of 60 seconds
    now[0] = 125.0
    assert not deadline.allows(long) and deadline.allows(short) and not deadline.over
    now[0] = 160.0
    assert deadline.over and not deadline.allows(short)
    assert whole._Deadline(None).allows(long) and not whole._Deadline(None).over


def test_differences_are_of_the_same_seeds() -> None:
    runs = [{"seed": seed, "validation_loss": loss} for seed, loss in ((0, 1.0), (1, 2.0), (2, 4.0))]
    others = [{"seed": seed, "validation_loss": loss} for seed, loss in ((2, 4.5), (0, 1.1))]
    mean, error = paired(runs, others)
    assert (mean, error) == (pytest.approx(-0.3), pytest.approx(0.2))  # -0.1 and -0.5
    assert paired(runs[:1], others) == (pytest.approx(-0.1), None)
    assert paired(runs[1:2], others) is None


def test_the_order_of_rates() -> None:
    ok = [{"status": "ok", "validation_loss": loss} for loss in (3.0, 2.0, 2.0)]
    assert ranked((0.1, 0.2, 0.4), ok) == [0.2, 0.4, 0.1]
    assert ranked((0.1, 0.2), [{"status": "diverged"}, ok[0]]) == [0.2]
    assert [beside(0.2, (0.1, 0.2, 0.5), 2, towards) for towards in (-1, 1)] == [0.1, 0.5]
    assert [beside(lr, (0.1, 0.2, 0.5), 2, towards) for lr, towards in ((0.1, -1), (0.5, 1))] == [0.05, 1.0]


def test_rows_of_priority_1_come_first_and_whole(settings: dict[str, Any]) -> None:
    rows = [dict(row, priority=priority) for row, priority in zip(ROWS, (3, 1), strict=True)]
    study = study_from(settings | {"rows": rows}, "here")
    assert [run.row for run in wanted(study, "", {})] == ["adamw", "energy", "energy"]
    assert [run.row for run in wanted(study, "", {}, "energy")] == ["energy", "energy"]


def test_a_study_that_was_interrupted_equals_one_that_was_not(settings: dict[str, Any], tmp_path: Path) -> None:
    study = study_from(settings, "here", "small")
    ended = compare(study, tmp_path / "whole", jobs=0)
    assert (ended.made, ended.left) == ((2 + 3 + 1) + (1 + 1), 0)
    assert compare(study, tmp_path / "whole", jobs=0).made == 0

    lines = (tmp_path / "whole" / "results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "results.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:50])
    assert compare(study, tmp_path / "cut", jobs=2, seconds=0).left > 0
    assert compare(study, tmp_path / "cut", jobs=2).made == 5  # in processes of their own
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert read_results(tmp_path / "cut" / "results.jsonl")[1] == 1  # the line that was cut

    # All rows began alike and read alike.
    results = read_results(tmp_path / "whole" / "results.jsonl")[0]
    assert unequal(results.values()) == []
    assert len({line["weights_checksum"] for line in results.values()}) == 2  # seeds
    damaged = [dict(line) for line in results.values()]
    damaged[-1]["data_checksum"] += 1
    assert len(unequal(damaged)) == 1

    by_row = {line.row: line for line in lines_of(study, identity(study), results, study.batches[0])}
    matrices = 4 * 16 * 16 + 3 * 16 * 24
    rest = 2 * 258 * 16 + 3 * 16
    tensors = 7 + 5  # matrices and the rest; a step of 4 bytes each, and a norm of 4 where GWT has one
    assert by_row["adamw"].state == pytest.approx((8 * (matrices + rest) + 4 * tensors) / (matrices + rest))
    assert 2.0 <= by_row["energy"].matrix_state < 2.0 + 8 * 7 / matrices + 1e-9
    assert [line.seeds for line in by_row.values()] == [2, 2]


def test_a_row_that_fails_is_told_and_the_others_go_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange.py").write_text(
        "import torch\n"
        "def broken(matrices, rest, lr, rest_lr, options):\n    raise RuntimeError('no such thing')\n"
        "def wild(matrices, rest, lr, rest_lr, options):\n"
        "    return torch.optim.SGD([*matrices.values(), *rest.values()], lr=1e30)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [
        {"name": "broken", "optimizer": "strange:broken", "lr": [0.1, 0.2]},
        {"name": "wild", "optimizer": "strange:wild", "lr": [0.1]},
        {"name": "absent", "optimizer": "no_such_package:thing", "lr": [0.1]},
        ROWS[1],
    ]
    study = study_from(settings | {"rows": rows, "seeds": [0]}, "here")
    compare(study, tmp_path / "out", jobs=0)
    results = read_results(tmp_path / "out" / "results.jsonl")[0]
    lines = {line.row: line for line in lines_of(study, identity(study), results, study.batches[0])}
    assert lines["adamw"].loss is not None and lines["broken"].loss is None
    assert "RuntimeError: no such thing" in lines["broken"].notes
    assert "loss" in lines["wild"].notes and {r["status"] for r in results.values() if r["row"] == "wild"} == {
        "diverged"
    }
    assert "cannot be imported" in lines["absent"].notes


def test_what_is_held_counts_projections_and_not_weights() -> None:
    class Projector:
        def __init__(self) -> None:
            self.matrix = torch.zeros(10, 10)[:, :3]  # GaLore: a view of a whole decomposition

    weight = torch.nn.Parameter(torch.zeros(10, 10))
    weight.grad = torch.ones(10, 10)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    optimizer.step()
    assert bytes_held([vars(optimizer)], [weight]) == 800 + 4
    optimizer.state[weight]["projector"] = Projector()
    optimizer.state[weight]["again"] = optimizer.state[weight]["exp_avg"][0]  # a view of what is counted
    assert bytes_held([vars(optimizer)], [weight]) == 800 + 4 + 120


def test_every_entry_is_built_over_all_parameters_or_says_what_it_lacks() -> None:
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 4)})
    assert [sorted(part) for part in split(model)] == [["attn.weight"], ["attn.bias", "head.bias", "head.weight"]]
    for name in ("gwt", "adamw", "sgd", "muon", "adafactor"):
        optimizers = build(name, model, 0.01, 0.02, options_of(name, {}, "a row"))
        rates = {id(p): g["lr"] for one in optimizers for g in one.param_groups for p in g["params"]}
        assert [float(rates[id(p)]) for p in model.parameters()] == [0.01, 0.02, 0.02, 0.02], name
    with pytest.raises(ValueError, match="did you mean 'galore'"):
        options_of("galor", {}, "a row")
    with pytest.raises(ValueError, match="did you mean 'rank'"):
        options_of("galore", {"rnk": 3}, "a row")
    assert all(entry.package for entry in ENTRIES.values())


def test_the_key_of_a_run_follows_what_a_recipe_means(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"recipe": "energy", "detail_gain": 0.5}
    options = options_of("gwt", given, "a row")
    assert {key: options[key] for key in ("second_moment", "detail_gain", "limiter")} == {
        "second_moment": "energy",
        "detail_gain": 0.5,
        "limiter": 0.0,
    }
    meant = {"second_moment": "approximation", "detail_gain": 0.2, "limiter": 1.5}
    monkeypatch.setitem(recipes.RECIPES, "energy", dataclasses.replace(recipes.RECIPES["energy"], defaults=meant))
    assert options_of("gwt", given, "a row") == options | {"second_moment": "approximation", "limiter": 1.5}
    with pytest.raises(ValueError, match="did you mean 'energy'"):
        options_of("gwt", {"recipe": "enery"}, "a row")


def test_the_options_of_recorded_runs() -> None:
    """Results are found by all options of their run: these are those of runs that were recorded."""
    meant = {
        "paper": (0.25, "approximation", 1.0, 1.01),
        "energy": (1.0, "energy", "coherence", 0.0),
        "orthogonal": (0.5, "none", 1.0, 0.0),
    }
    common = {"level": 1, "weight_decay": 0.0}
    for recipe, values in meant.items():
        implied = dict(zip(("scale", "second_moment", "detail_gain", "limiter"), values, strict=True))
        options = options_of("gwt", {"recipe": recipe}, "a row")
        assert json.dumps(options, sort_keys=True) == json.dumps(
            {**common, "recipe": recipe, **implied}, sort_keys=True
        )
    options = options_of("gwt", {"recipe": "orthogonal", "nor": 0.95, "nesterov": True}, "a row")
    assert (options["nor"], options["nesterov"], "cautious" in options) == (0.95, True, False)


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100, 0.1, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 == max(factors)
    assert factors[55] == pytest.approx(0.55, abs=0.01) and 0.1 <= factors[-1] < 0.101


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rowz": []}, "did you mean 'rows'"),
        ({"rows": []}, "no rows"),
        ({"rows": [{"name": "a", "optimizer": "gwt", "lr": [0.2, 0.1]}]}, "larger than the one before"),
        ({"rows": [{"name": "a", "optimizer": "gwt", "lr": [0.1], "prio": 1}]}, "did you mean 'priority'"),
        ({"rows": [*ROWS, ROWS[0]]}, "two rows of here are called 'energy'"),
        ({"batches": [{"tokens": 65, "steps": 8}]}, "no multiple of sequence_length=16"),
        ({"seeds": [0, 0]}, "different numbers"),
        ({"warmup": 1.5}, "outside 0 to 1"),
        ({"rows": [{"name": "a", "optimizer": "gwt"}]}, "must have lr, or like .*it has neither"),
        ({"rows": [*ROWS, {"name": "a", "optimizer": "gwt", "like": "adamv"}]}, "is like 'adamv', which is no row"),
        ({"rows": [{**ROWS[0], "options": {"weight_decay": 0.1}}]}, "write it beside lr"),
        ({"reference": "none"}, "reference='none' in here is none of its rows"),
        ({"compile": 1}, "compile=1 in here: expected true or false"),
        ({"precision": "fp16"}, "precision='fp16' in here must be one of fp32, bf16"),
        ({"device": "gpu"}, "device='gpu' in here must be one of cpu, cuda, auto"),
    ],
)
def test_mistakes_are_told(settings: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_from(settings | change, "here")


def test_a_study_on_a_gpu_has_other_runs_and_is_refused_without_one(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {}
    for device, found in (("cpu", False), ("auto", False), ("auto", True), ("cuda", False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        shared[device, found] = identity(study_from(settings | {"device": device}, "here"))
    assert shared["cpu", False] == shared["auto", False] != shared["auto", True] == shared["cuda", False]
    assert "device" not in shared["cpu", False]  # runs that were recorded before there was the key
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        compare(study_from(settings | {"device": "cuda"}, "here"), tmp_path, jobs=0)


def test_rows_of_ours_say_keys_of_the_rest() -> None:
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 4)})
    given = {"recipe": "orthogonal", "level": 0, "least_level": 0, "state_dtype": "int8"}
    for rest, expected in (({}, ("orthogonal", 0, None)), ({"recipe": "energy", "level": 1}, ("energy", 1, None))):
        (optimizer,) = build("gwt", model, 0.01, 0.02, options_of("gwt", given | {"rest": rest}, "a row"))
        matrices, others = optimizer.param_groups
        assert [matrices[key] for key in given] == list(given.values()) and matrices["lr"] == 0.01
        assert tuple(others[key] for key in ("recipe", "level", "least_level")) == expected
        assert (others["lr"], others["state_dtype"]) == (0.02, "int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": "fp8"}, "state_dtype='fp8'"),
        ({"rest": {"levle": 1}}, "rest has the unknown key 'levle'; did you mean 'level'"),
        ({"rest": {"state_dtype": "fp8"}}, "state_dtype='fp8' in rest"),
    ],
)
def test_wrong_options_of_a_row_end_a_study_before_it_begins(
    options: dict[str, Any],
    message: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "small.json", tmp_path / "out"
    wrong = {"name": "ours", "optimizer": "gwt", "lr": [0.01], "options": options, "priority": 3}
    file.write_text(json.dumps(settings | {"rows": [ROWS[1], wrong]}))
    assert main(["compare", str(file), "--jobs", "0", "--output", str(out)]) == 2
    told = capsys.readouterr().err
    assert "row 'ours'" in told and message in told and not out.exists()


@pytest.mark.parametrize("path", sorted(Path("configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_of_the_tree(path: Path) -> None:
    study = read_study(path.stem)
    for row in study.rows:
        options_of(row.optimizer, row.options, row.name)
    assert isinstance(study, Study) and dataclasses.asdict(study)["name"] == path.stem


@pytest.mark.parametrize("name", ["gpu-60m", "gpu-130m"])
def test_studies_of_a_gpu_at_tiny_shapes(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Each row of them, two steps on a CPU, in bf16 and on a BPE."""
    study, small = read_study(name), study_from(settings, "here")
    shapes = {"rank": 4, "num_embeds": 16, "num_heads": 2}
    slow = [row for row in study.rows if row.optimizer.startswith("adam-8bit")]  # theirs compile for half a minute
    rows = [
        dataclasses.replace(
            row,
            **{axis: getattr(row, axis)[:1] for axis in ("lr", "rest_lr", "weight_decay")},
            options={key: shapes.get(key, value) for key, value in row.options.items()},
        )
        for row in study.rows
        if row not in slow
    ]
    tiny = dataclasses.replace(small, rows=tuple(rows), batches=(Batch(tokens=32, steps=2),), seeds=(0,))
    tiny = dataclasses.replace(tiny, tokenizer="bpe:300", precision=study.precision, reference=study.reference)
    assert (study.device, study.compile, study.corpus) == ("auto", True, "packages:400")
    compare(tiny, tmp_path / "out", jobs=0)
    results = read_results(tmp_path / "out" / "results.jsonl")[0]
    found = {line.row: line for line in lines_of(tiny, identity(tiny), results, tiny.batches[0])}
    lacking = {line["row"] for line in results.values() if line["status"] == "unavailable"}
    assert found.keys() - lacking == {name for name, line in found.items() if line.loss is not None}
    assert {
        row.name for row in rows if ENTRIES[row.optimizer].package in ("torch", "gwt_dist")
    } <= found.keys() - lacking


def test_a_model_is_compiled_once_for_all_runs(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    row = {"name": "a", "optimizer": "adamw", "lr": 0.01}
    study = study_from(settings | {"rows": [row], "compile": True}, "here")
    torch._dynamo.reset()
    counters.clear()
    compare(study, tmp_path / "compiled", jobs=0)
    assert counters["stats"]["unique_graphs"] == 2  # training and validation, of two seeds
    compare(study_from(settings | {"rows": [row]}, "here"), tmp_path / "plain", jobs=0)
    plain, compiled = (list(numbers(tmp_path / name).values()) for name in ("plain", "compiled"))
    assert len(plain) == 2 and plain == compiled


def test_rows_of_the_quality_page_are_in_the_study() -> None:
    commands = [c for b in blocks("docs/quality.md") if b.language == "bash" for c in b.commands()]
    for words in map(shlex.split, commands):
        assert words[:2] == ["gwt-dist", "compare"] and words[3] == "--row"
        assert words[4] in {row.name for row in read_study(words[2]).rows}
    assert commands


def test_study_of_the_page(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("docs/compare.md") if block.language == "yaml"]
    (tmp_path / "page.yaml").write_text(block.text)
    assert [row.name for row in read_study(str(tmp_path / "page.yaml")).rows] == ["energy-2", "adamw"]


def test_the_best_for_so_many_bytes_or_fewer() -> None:
    points = [(8.0, 1.6), (2.0, 1.5), (0.5, 1.7), (None, 1.0), (1.0, 1.7), (4.0, 1.4), (2.0, 1.6), (0.0, None)]
    assert front(points) == [(0.5, 1.7), (2.0, 1.5), (4.0, 1.4)]


def test_the_command(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "small.json", tmp_path / "out"
    file.write_text(json.dumps(settings | {"seeds": [0]}))
    assert main(["compare", str(file), "--report", "--output", str(out)]) == 2
    assert "run the study first" in capsys.readouterr().err
    assert main(["compare", str(file), "--jobs", "0", "--output", str(out), "--row", "adamw"]) == 0
    assert [line["row"] for line in read_results(out / "results.jsonl")[0].values()] == ["adamw"]
    assert "No result yet: energy.\n" in (out / "table.md").read_text()
    assert main(["compare", str(file), "--jobs", "0", "--output", str(out)]) == 0
    table = (out / "table.md").read_text()
    assert "| energy |" in table and "| adamw |" in table and "No result yet" not in table
    assert "same weights and saw the same text" in table
    assert (out / "plots-64.png").stat().st_size > 10_000
    for text in tmp_path.glob("*.txt"):
        text.unlink()
    assert main(["compare", str(file), "--report", "--output", str(out)]) == 0  # the text is not read
    assert (out / "table.md").read_text() == table
    assert main(["compare", str(file), "--row", "nothing", "--output", str(out)]) == 2
    assert "rows: energy, adamw" in capsys.readouterr().err
    with whole.Writer(out / "results.jsonl"):
        assert main(["compare", str(file), "--output", str(out)]) == 2
    assert "another study writes" in capsys.readouterr().err

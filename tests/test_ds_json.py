"""A DeepSpeed JSON: read as DeepSpeed reads it wherever it is read, and never guessed at."""

from __future__ import annotations

import base64
import copy
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import gwt_dist
from gwt_dist import ds_json
from gwt_dist.cli.app import main
from gwt_dist.train import ds_config
from gwt_dist.train.config import read_mapping
from trainer_json_cases import documented

# Texts as people write them, each with the value that DeepSpeed reads, or "refused".
TEXTS: dict[str, str] = {
    "plain": '{"zero_optimization": {"stage": 2}, "train_batch_size": 8}',
    "comments": '{\n  // one\n  "train_batch_size": 8, # two\n  /* three */ "steps_per_print": 1\n}',
    "comma at the end": '{"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95,],},},}',
    "keys without quotes": "{train_batch_size: 8\n  zero_optimization: {stage: 2}}",
    "single quotes": "{'train_batch_size': 8}",
    "no braces": "train_batch_size: 8\nwall_clock_breakdown: false",
    "text without quotes": '{"optimizer": {type: AdamW\n}}',
    "numbers": '{"a": 5e8, "b": 1e-3, "c": 1.0, "d": -0.5, "e": 12345678901234567890, "f": 0}',
    "text": '{"a": "\\u00e9\\n\\"", "b": "é"}',
    "null and flags": '{"a": null, "b": true, "c": false}',
    "begins with a mark of order": '\ufeff{"train_batch_size": 8}',
    "windows": '{\r\n  "train_batch_size": 8,\r\n  "steps_per_print": 1\r\n}\r\n',
    "nothing": "",
    "twice": '{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 1}}',
    "twice, equal": '{"train_batch_size": 8, "train_batch_size": 8}',
    "twice, inside": '{"zero_optimization": {"stage": 3, "stage": 1}}',
    "twice, in a list": '{"a": [{"b": 1}, {"b": 1, "b": 2}]}',
    "twice, with and without quotes": '{stage: 1\n"stage": 2}',
    "open": '{"zero_optimization": {"stage": 2}',
    "more behind": '{"train_batch_size": 8} {"train_batch_size": 8}',
    "no colon": '{"train_batch_size" 8}',
    "no comma": '{"a": 1 "b": 2}',
    "a number of Python": '{"a": .5}',
    "not a number": '{"a": NaN}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_reader_is_deepspeeds(text: str, tmp_path: Path) -> None:
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    file = tmp_path / "ds.json"
    file.write_bytes(text.encode())
    found: list[Any] = []
    for read in (load_ds_config, ds_json.read):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # DeepSpeed leaves the file open
            try:
                found.append(read(str(file)))
            except ValueError as error:
                found.append(None)
                message = str(error)
    assert found[0] == found[1] and type(found[1]) in (dict, type(None))
    if found[1] is None:
        assert message.startswith(f"DeepSpeed configuration {str(file)!r} ")
        assert "more than once" in message or "line 1 column" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXTS["twice"], "has the key zero_optimization more than once"),
        (TEXTS["twice, inside"], "has the key zero_optimization.stage more than once"),
        (TEXTS["twice, in a list"], r"has the key a\[1\].b more than once"),
        ('{\n"a": 1,\n"b" 2}', "is not JSON: .* line 3 column 5"),
        ("[1]", "holds list, not an object"),
        ("3", "holds int, not an object"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ds_json.parse(text, "DeepSpeed configuration 'x'")


def test_text_in_base64_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encoded(text: str) -> str:
        return base64.urlsafe_b64encode(text.encode()).decode()

    assert ds_json.read(encoded(TEXTS["comments"])) == {"train_batch_size": 8, "steps_per_print": 1}
    with pytest.raises(ValueError, match="in base64 has the key zero_optimization more than once"):
        ds_json.read(encoded(TEXTS["twice"]))
    with pytest.raises(ValueError, match=r"'no\.json' is not a file"):
        ds_json.read("no.json")
    with pytest.raises(ValueError, match="is a folder; name the JSON file itself"):
        ds_json.read(tmp_path)
    (tmp_path / "latin.json").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json' is no text \(.*name another file"):
        ds_json.read(tmp_path / "latin.json")
    monkeypatch.setitem(sys.modules, "hjson", None)
    with pytest.raises(ValueError, match="pip install hjson"):
        ds_json.parse("{}", "x")


GOOD: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 5,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "GWTAdamW", "params": {"lr": 0.01, "level": 3, "targets": ["attn", "mlp"]}},
}


def net() -> nn.Module:
    return nn.ModuleDict({"attn": nn.Linear(30, 20), "mlp": nn.Linear(20, 9)})


def initialized(monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    """What `gwt_dist.initialize` gives DeepSpeed; with the groups that it builds."""
    passed: dict[str, Any] = {}

    def initialize(**arguments: Any) -> Any:
        passed.update(arguments)
        if callable(arguments["optimizer"]):
            passed["groups"] = arguments["optimizer"](None).param_groups
        return (SimpleNamespace(basic_optimizer=None), None, None, None)

    monkeypatch.setattr("deepspeed.initialize", initialize)
    gwt_dist.initialize(model=net(), **given)
    return passed


def told_by(command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main([command, *arguments])
    output = capsys.readouterr()
    return code, output.out + output.err


def commented(settings: dict[str, Any]) -> str:
    return "// ours\n" + re.sub(r"\}$", ", # the end\n}", json.dumps(settings))


def test_every_entrance_takes_comments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(commented(GOOD))
    assert main(["plan", "tiny", "--deepspeed-config", str(file), "--json"]) == 0
    setup = json.loads(capsys.readouterr().out)["setup"]
    assert (setup["engine"], setup["level"], setup["micro_batch"], setup["accumulation"]) == ("zero2", 3, 3, 5)
    assert main(["doctor", "--deepspeed-config", str(file), "--model", "tiny"]) == 0
    assert ds_config.load(file, 2)[1].train == 30
    for given in (
        {"config": str(file)},
        {"config": file},
        {"config_params": str(file)},
        {"args": SimpleNamespace(deepspeed_config=str(file))},
        {"args": SimpleNamespace(deepscale_config=str(file))},
        {"config": base64.urlsafe_b64encode(file.read_bytes()).decode()},
        {"config": GOOD},
    ):
        passed = initialized(monkeypatch, **given)
        assert passed["config"] == {k: v for k, v in GOOD.items() if k != "optimizer"}
        assert [group["level"] for group in passed["groups"]] == [3, 0]


def test_every_entrance_refuses_a_key_that_stands_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds.json"
    text = json.dumps(GOOD)
    file.write_text(f'{text[:-1]}, "zero_optimization": {{"stage": 1}}}}')
    message = "has the key zero_optimization more than once"
    for command in (["plan", "tiny"], ["doctor"]):
        code, told = told_by(command[0], [*command[1:], "--deepspeed-config", str(file)], capsys)
        assert code == 2 and message in told and str(file) in told
    for entrance in entrances(file):
        with pytest.raises(ValueError, match=f"{re.escape(repr(str(file)))} {message}"):
            entrance()
    (tmp_path / "ds.yaml").write_text("steps: 1\nzero:\n  stage: 3\n  stage: 1\n")
    with pytest.raises(ValueError, match=r"(?s)ds\.yaml cannot be parsed: key 'stage' stands twice.*line 4"):
        read_mapping(tmp_path / "ds.yaml")


def entrances(file: Path) -> list[Callable[[], Any]]:
    return [
        lambda: gwt_dist.initialize(model=net(), config=file),
        lambda: gwt_dist.initialize(model=net(), args=SimpleNamespace(deepspeed_config=str(file))),
        lambda: ds_config.load(file, 2),
    ]


def test_a_json_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="2 DeepSpeed configurations are given"):
        gwt_dist.initialize(SimpleNamespace(deepspeed_config="a.json"), net(), config=GOOD)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_documented_json_of_the_trainer_is_not_guessed_at(
    stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything "auto", as in transformers' documentation."""
    file = tmp_path / "ds.json"
    settings = documented(stage)
    file.write_text(json.dumps(settings))
    code, told = told_by("doctor", ["--deepspeed-config", str(file), "--json"], capsys)
    (finding,) = [finding for finding in json.loads(told)["findings"] if '"auto"' in finding["text"]]
    autos = finding["text"].split("refuses it: ")[1].split(", ")
    assert (code, finding["kind"]) == (0, "warning")
    assert len(autos) == json.dumps(settings).count('"auto"') == {2: 14, 3: 16}[stage]
    for entrance in entrances(file):
        with pytest.raises(ValueError, match=r'is "auto", which transformers.* Write the value'):
            entrance()
    # A plan asks for all that its answer depends on at once, and takes it from the command line.
    code, told = told_by("plan", ["tiny", "--deepspeed-config", str(file), "--json"], capsys)
    threshold = "zero_optimization.stage3_param_persistence_threshold"
    asked = ["bf16.enabled", "fp16.enabled", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"]
    asked += [threshold] if stage == 3 else []
    assert code == 2 and re.findall(r"([\w.]+) \((?:give|write)", told) == asked
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
        file.write_text(json.dumps(settings))
    answers = ["--weights", "bf16", "--micro-batch", "3", "--accumulation", "5", "--world", "7"]
    code, told = told_by("plan", ["tiny", "--deepspeed-config", str(file), *answers, "--json"], capsys)
    setup = json.loads(told)["setup"]
    assert (setup["weights"], setup["engine"], setup["micro_batch"]) == ("bf16", f"zero{stage}", 3)
    assert setup["tokens"] == 3 * 5 * 7 * 2048
    code, told = told_by("plan", ["tiny", "--deepspeed-config", str(file), "--weights", "fp64", *answers[2:]], capsys)
    assert code == 2 and "--weights fp64 and the DeepSpeed JSON, which would make weights fp32" in told
    settings["bf16"]["enabled"] = True
    file.write_text(json.dumps(settings))
    code, told = told_by("plan", ["tiny", "--deepspeed-config", str(file), *answers], capsys)
    assert code == 2 and "--weights and --deepspeed-config: the file says it already" in told


def test_a_plan_takes_from_the_command_line_what_is_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = documented(2) | {"bf16": {"enabled": True}}
    settings["optimizer"]["params"]["level"] = "auto"
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    base = ["tiny", "--deepspeed-config", str(tmp_path / "ds.json"), "--json", "--micro-batch", "3"]
    code, told = told_by("plan", [*base, "--accumulation", "5"], capsys)
    assert code == 2 and 'optimizer.params.level is "auto", which nothing replaces' in told
    code, told = told_by("plan", [*base, "--accumulation", "5", "--level", "3"], capsys)
    setup = json.loads(told)["setup"]
    assert (setup["micro_batch"], setup["accumulation"], setup["level"]) == (3, 5, 3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": None}, (4, 2)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": None}, (2, 4)),
        ({"train_micro_batch_size_per_gpu": None}, (1, 2)),
        ({"sequence_parallel_size": 3, "train_batch_size": 4}, (2, 2)),
    ],
)
def test_a_plan_completes_the_batch_as_deepspeed_does(
    change: dict[str, Any], expected: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**GOOD, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, **change}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    code, told = told_by(
        "plan", ["tiny", "--deepspeed-config", str(tmp_path / "ds.json"), "--world", "3", "--json"], capsys
    )
    assert code == 0, told
    setup = json.loads(told)["setup"]
    assert (setup["micro_batch"], setup["accumulation"]) == expected
    ranks = 3 // settings.get("sequence_parallel_size", 1)
    assert setup["tokens"] == expected[0] * expected[1] * ranks * 2048


@pytest.mark.parametrize("section", ["zero_optimization", "fp16", "bf16", "torch_autocast", "scheduler"])
def test_a_section_that_is_auto_is_told(section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**GOOD, section: "auto"}))
    code, told = told_by("doctor", ["--deepspeed-config", str(file), "--json"], capsys)
    assert code == 1 and any(f'{section} is "auto"' in finding["text"] for finding in json.loads(told)["findings"])
    with pytest.raises(ValueError, match=f'{section} is "auto"'):
        gwt_dist.initialize(model=net(), config=file)


MISTAKES: list[tuple[str, Any, str]] = [
    ("zero_optimization.stage", "2", "zero_optimization.stage='2' of .* must be 0, 1, 2 or 3; write it without quotes"),
    ("zero_optimization.stage", True, "zero_optimization.stage=True"),
    ("zero_optimization.stage", 4, "zero_optimization.stage=4"),
    ("zero_optimization.stage", None, "zero_optimization.stage=null"),
    ("zero_optimization", True, "zero_optimization=True of .* must be an object"),
    ("zero_optimization", None, "zero_optimization=null of .* must be an object"),
    ("zero_optimization.offload_optimizer", True, "offload_optimizer=True of .* must be an object"),
    ("zero_optimization.sub_group_size", "1e9", "sub_group_size='1e9' of .* must be a whole number"),
    ("zero_optimization.reduce_scatter", "false", "reduce_scatter='false' of .* must be true or false"),
    ("zero_optimization.reduce_bucket_size", -1, "reduce_bucket_size=-1"),
    ("bf16", {"enabled": "true"}, "bf16.enabled='true' of .* must be true or false; write it without quotes"),
    ("bf16", True, "bf16=True of .* must be an object"),
    ("fp16", {"enabled": None}, "fp16.enabled=null"),
    ("train_micro_batch_size_per_gpu", "2", "train_micro_batch_size_per_gpu='2' of .* must be a whole number"),
    ("gradient_accumulation_steps", 0, "gradient_accumulation_steps=0"),
    ("gradient_accumulation_steps", 1.5, "gradient_accumulation_steps=1.5"),
    ("train_batch_size", True, "train_batch_size=True"),
    ("gradient_clipping", "1.0", "gradient_clipping='1.0' of .* must be a number"),
    ("zero_optimisation", {"stage": 3}, "'zero_optimisation' .* ignore in silence; did you mean 'zero_optimization'"),
    ("optimizer.param", {"level": 3}, "unknown key 'param' in section 'optimizer' .* did you mean 'params'"),
    ("optimizer.params", [], r"optimizer.params=\[\] of .* must be an object"),
    ("optimizer", "GWTAdamW", "optimizer='GWTAdamW' of .* must be an object"),
]


@pytest.mark.parametrize(("path", "value", "message"), MISTAKES, ids=[f"{p}={v!r}" for p, v, _ in MISTAKES])
def test_values_of_another_kind_are_named(
    path: str, value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = copy.deepcopy(GOOD)
    *sections, key = path.split(".")
    inside = settings
    for section in sections:
        inside = inside[section]
    inside[key] = value
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        gwt_dist.initialize(model=net(), config=settings)
    with pytest.raises(ValueError):
        ds_config.load(file, 2)
    code, told = told_by("plan", ["tiny", "--deepspeed-config", str(file)], capsys)
    assert code == 2 and re.search(message, told)
    code, told = told_by("doctor", ["--deepspeed-config", str(file), "--json"], capsys)
    assert code == 1 and any(re.search(message, finding["text"]) for finding in json.loads(told)["findings"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lr": "1e-3"}, "optimizer.params.lr is the text '1e-3'; write the value without quotes"),
        ({"lr": "auto"}, 'optimizer.params.lr is "auto"'),
        ({"betas": [0.9, "auto"]}, r'optimizer.params.betas\[1\] is "auto"'),
        ({"betas": ["0.9", 0.95]}, "betas=.* must be two numbers"),
        ({"level": "2"}, "optimizer.params.level is the text '2'"),
        ({"level": "auto"}, 'optimizer.params.level is "auto", which nothing replaces'),
        ({"level": True}, "level=True"),
        ({"level": 2.5}, "level=2.5"),
        ({"weight_decay": None}, "weight_decay=None"),
        ({"cautious": "true"}, "optimizer.params.cautious is the text 'true'"),
        ({"targets": None}, "optimizer.params.targets=None must be a part of a module name"),
        ({"targets": 3}, "optimizer.params.targets=3"),
        ({"targets": {"attn": "auto"}}, 'optimizer.params.targets.attn is "auto"'),
        ({"targets": {"attn": "2"}}, "targets.attn='2' must be a level"),
        ({"target": ["attn"]}, "unknown key 'target' .did you mean 'targets'"),
        ({"torch_adam": True}, "unknown key 'torch_adam'"),
    ],
)
def test_every_key_of_the_section_is_checked(
    params: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**GOOD, "optimizer": {"type": "GWTAdamW", "params": params}}
    with pytest.raises(ValueError, match=message):
        initialized(monkeypatch, config=settings)


def test_our_type_in_another_spelling_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, message in (("gwtadamw", "write 'GWTAdamW'"), ("GWTAdam", "write 'GWTAdamW'"), (None, "has no type")):
        with pytest.raises(ValueError, match=message):
            initialized(monkeypatch, config={**GOOD, "optimizer": {"type": kind, "params": {"lr": 0.1}}})


def test_what_deepspeed_takes_is_taken(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    zero = {
        "stage": 3,
        "reduce_bucket_size": 5e8,
        "overlap_comm": None,
        "offload_param": None,
        "offload_optimizer": None,
    }
    more = {"train_batch_size": None, "data_types": {"keep_in_fp32_modules": "auto"}, "my_own_notes": "auto-mated"}
    fine = {**GOOD, "zero_optimization": zero, **more}
    assert initialized(monkeypatch, config=fine)["config"]["zero_optimization"] == zero
    assert not list(ds_json.mistakes(fine)) and not list(ds_json.autos(fine))
    # Another optimizer's section is DeepSpeed's own affair, and is told.
    assert "optimizer.type" not in caplog.text
    other = {**GOOD, "optimizer": {"type": "AdamW", "params": {"lr": "1e-3"}}}
    assert initialized(monkeypatch, config=other)["config"] == other
    assert "optimizer.type is 'AdamW' in the DeepSpeed JSON: DeepSpeed steps with that" in caplog.text
    (tmp_path / "ds.json").write_text(json.dumps(other))
    assert told_by("plan", ["tiny", "--deepspeed-config", str(tmp_path / "ds.json")], capsys)[0] == 0
    assert "planned is GWTAdamW in its place" in caplog.text


def test_the_older_names_count_in_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**GOOD, "bfloat16": {"enabled": True}, "zero_optimization": {"stage": 2, "cpu_offload": True}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    _, told = told_by("plan", ["tiny", "--deepspeed-config", str(tmp_path / "ds.json"), "--json"], capsys)
    setup = json.loads(told)["setup"]
    assert (setup["weights"], setup["offload"]) == ("bf16", "optimizer")


def test_the_recipe_splits_no_sequences(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({**GOOD, "sequence_parallel_size": 2}))
    with pytest.raises(ValueError, match=r"sequence_parallel_size=2 in .*ds\.json: the recipe gives each rank"):
        ds_config.load(tmp_path / "ds.json", 2)


def test_yaml_that_takes_a_number_for_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "ds.yaml").write_text(
        "train_batch_size: 4\noptimizer:\n  type: GWTAdamW\n  params:\n    lr: 1e-3\n    level: 2\n"
    )
    with pytest.raises(ValueError, match=r"optimizer.params.lr is the text '1e-3'; .* as 1.0e-3"):
        ds_config.load(tmp_path / "ds.yaml", 2)


def test_reading_loads_neither_torch_nor_deepspeed() -> None:
    script = "import sys; sys.argv[0] = 'gwt-dist'\nfrom gwt_dist import ds_json\nds_json.parse('{}', '')\n"
    script += "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "hjson" in loaded and not {"torch", "deepspeed", "numpy"} & set(loaded), done.stderr


def test_a_misspelt_section_is_refused_whatever_the_optimizer_is() -> None:
    """Else DeepSpeed would train with the optimizer that is passed, or with none."""
    settings = {"train_micro_batch_size_per_gpu": 1, "optimzer": {"type": "GWTAdamW", "params": {"lr": 0.01}}}
    with pytest.raises(ValueError, match=r"unknown key 'optimzer' in the DeepSpeed JSON.*did you mean 'optimizer'"):
        gwt_dist.initialize(model=net(), config=settings)

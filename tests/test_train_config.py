"""Settings: one source of truth, and every mistake is one clear error."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gwt_dist
from gwt_dist import GWTAdamW, param_groups
from gwt_dist.train import checkpoints, ds_config
from gwt_dist.train.config import (
    TrainConfig,
    build_parser,
    config_from,
    find_file,
    parse_arguments,
    read_mapping,
)
from gwt_dist.train.model import model_config
from gwt_dist.train.ranks import MAX_RESTARTS, RENDEZVOUS, Ranks, ranks_from_environment
from gwt_dist.train.session import planned_state

OPTIMIZER = {"type": "GWTAdamW", "params": {"lr": 0.01, "level": 2}}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_command_line_wins_over_file_wins_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "steps: 70\nmin_lr_ratio: 1e-2  # text to YAML\nseed: 3\n")
    config, local_rank = parse_arguments(
        ["--local_rank=1", "--config", str(file), "--seed", "4", "--log-every=2", "--resume"]
    )
    assert local_rank == 1
    expected = TrainConfig(steps=70, min_lr_ratio=0.01, seed=4, log_every=2, resume="latest")
    assert config == expected


def test_help_tells_every_key_its_meaning_and_default() -> None:
    text = " ".join(build_parser().format_help().split())
    for item in dataclasses.fields(TrainConfig):
        assert f"--{item.name}" in text
        assert " ".join(item.metadata["help"].split()) in text
        assert f"(default: {item.metadata['default']})" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"unknown key 'stepz' in .*run\.yaml; did you mean 'steps'\?"),
        ("steps: many", r"steps='many' in .*run\.yaml: expected a whole number"),
        ("steps: 1.5", "expected a whole number"),
        ("steps: true", "expected a whole number"),
        ("compress_activations: 2", "compress_activations=2 in .*: expected true or false"),
        ("steps: [1]", "expected a whole number"),
        ("min_lr_ratio: low", "expected a number"),
        ("corpus:", "corpus=None in .*: expected text"),
        ("steps: 0", "steps=0 must be at least 1"),
        ("keep: -1", "keep=-1 must be at least 0"),
        ("min_lr_ratio: 1.5", r"min_lr_ratio=1\.5 is outside 0 to 1"),
        ("steps: 10\nwarmup_steps: 11", "warmup_steps=11 is more than steps=10"),
        ("eval_tokens: 10", "eval_tokens=10 is less than one sequence"),
        ("model: ''", "model is empty"),
        ("- steps", "holds a list, expected"),
        ("steps: [", "cannot be parsed"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "run.yaml", text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", str(file)])


def test_mistakes_on_the_command_line() -> None:
    with pytest.raises(ValueError, match=r"unknown key '--stepz' in the command line; .*--steps"):
        parse_arguments(["--stepz", "3"])
    for said in ("true", "false"):
        assert parse_arguments(["--compress_activations", said])[0].compress_activations == (said == "true")
    with pytest.raises(ValueError, match="steps='x' in the command line: expected a whole number"):
        parse_arguments(["--steps", "x"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such configuration file: 'nothing\.yaml'"):
        parse_arguments(["--config", "nothing.yaml"])
    with pytest.raises(ValueError, match=r"neither \.json nor \.yaml"):
        read_mapping(write(tmp_path / "run.txt", "steps: 1"))
    with pytest.raises(ValueError, match="key 'steps' stands twice"):
        read_mapping(write(tmp_path / "run.json", '{"steps": 1, "steps": 2}'))
    with pytest.raises(ValueError, match=r"the names in configs/models are 130m, 1b, .*tiny"):
        find_file("huge", "configs/models")


def test_bare_names_and_paths_find_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file("tiny", "configs/models").name == "tiny.json"
    assert find_file("configs/zero2.json").is_file()
    own = write(tmp_path / "own.json", {})
    assert find_file("own.json", "configs/models").samefile(own)


def load(tmp_path: Path, world_size: int = 2, **content: Any) -> ds_config.BatchSizes:
    content = {"train_micro_batch_size_per_gpu": 4, "optimizer": OPTIMIZER} | content
    return ds_config.load(write(tmp_path / "ds.json", content), world_size)[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gradient_cliping": 1}, r"'gradient_cliping' in .*ds\.json; .*'gradient_clipping'"),
        ({"zero_optimization": {"stag": 2}}, "'stag' in section 'zero_optimization' .*'stage'"),
        ({"zero_optimization": {"stage": 4}}, r"stage=4 of .* must be 0, 1, 2 or 3 \(in .*ds\.json\)"),
        ({"zero_optimization": 2}, "zero_optimization=2 of .* must be an object"),
        ({"bf16": {"enable": True}}, "'enable' in section 'bf16' .*'enabled'"),
        ({"scheduler": {}}, "would have two schedules"),
        ({"optimizer": {}}, "has no optimizer"),
        ({"optimizer": {"type": "GWTAdamW"}}, "lr=None"),
        ({"optimizer": {"type": "GWTAdam", "params": {"lr": 1}}}, "expected 'GWTAdamW'"),
        ({"optimizer": {**OPTIMIZER, "param": {}}}, "'param' in section 'optimizer'.*'params'"),
        (
            {"optimizer": {"type": "GWTAdamW", "params": {"lr": 1, "levle": 2}}},
            r"'levle' in optimizer.params of .* \(GWTAdamW\); did you mean 'level'",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1, "level": 2}}},
            r"'level' in optimizer.params of .* \(AdamW\)",
        ),
        (
            {"train_batch_size": 10},
            "4 .* gradient_accumulation_steps 1 .* 2 ranks = 8, but train_batch_size = 10",
        ),
        (
            {"train_batch_size": 16, "gradient_accumulation_steps": 3},
            "4 .* gradient_accumulation_steps 3 .* 2 ranks = 24, but train_batch_size = 16",
        ),
        ({"train_micro_batch_size_per_gpu": "auto"}, 'train_micro_batch_size_per_gpu is "auto"'),
        ({"train_micro_batch_size_per_gpu": 0}, "=0 of .* must be a whole number"),
    ],
)
def test_mistakes_in_the_deepspeed_json(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **content)


@pytest.mark.parametrize(
    ("params", "matrix"),  # bytes of its state beside step and norm: 96 rows of 24 coefficients
    [
        ({}, 18_432),
        ({"recipe": "paper"}, 18_432),
        ({"recipe": "foam", "nesterov": True, "cautious": True}, 18_432),
        ({"recipe": "orthogonal"}, 9_216),
        ({"second_moment": "none", "correct_bias": False}, 9_216),
        ({"recipe": "orthogonal", "nor": 0.95}, 9_216 + 96 * 4),
    ],
)
def test_a_run_is_told_the_state_that_its_optimizer_allocates(
    tmp_path: Path, params: dict[str, Any], matrix: int
) -> None:
    """Every key of `optimizer.params` is one of the plan."""
    params = {"lr": 0.01, "level": 2, "recipe": "energy", "targets": ["attn"], "betas": [0.9, 0.95]} | params
    optimizer = {"type": "GWTAdamW", "params": params}
    load(tmp_path, optimizer=optimizer)
    model = nn.ModuleDict({"attn": nn.Linear(96, 96, bias=False), "head": nn.Linear(96, 7)})
    planned = planned_state(model, {"optimizer": optimizer, "zero_optimization": {"stage": 1}}, Ranks(0, 1, 0))
    assert planned is not None
    assert (planned.wavelet, planned.rest) == (matrix, 8 * (96 * 7 + 7))
    stepped = GWTAdamW(param_groups(model, **params))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    stepped.step()
    states = [item for state in stepped.state.values() for item in state.items()]
    assert planned.wavelet + planned.rest == sum(s.nbytes for name, s in states if name.startswith("exp_avg"))
    # ZeRO has a buffer a group, and so a step.
    assert planned.scalars == sum(s.nbytes for name, s in states if not name.startswith("exp_avg")) - 4


def test_a_run_is_told_of_a_recipe_that_there_is_not() -> None:
    optimizer = {"type": "GWTAdamW", "params": {"lr": 0.01, "targets": ["attn"], "recipe": "pepper"}}
    model = nn.ModuleDict({"attn": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="recipe='pepper' in parameter group 0 must be one of"):
        planned_state(model, {"optimizer": optimizer, "zero_optimization": {"stage": 1}}, Ranks(0, 1, 0))


@pytest.mark.parametrize(
    ("world_size", "content", "expected"),
    [
        (2, {}, (24, 4, 3)),
        (1, {}, (24, 4, 6)),
        (3, {}, (24, 4, 2)),
        (4, {}, (24, 3, 2)),  # no more at once than 4
        (24, {}, (24, 1, 1)),
        (1, {"gradient_accumulation_steps": 6}, (24, 4, 6)),  # what fits these ranks as it stands
        (3, {"gradient_accumulation_steps": None, "train_batch_size": 24}, (24, 4, 2)),
        (4, {"train_micro_batch_size_per_gpu": None, "train_batch_size": 24}, (24, 2, 3)),
    ],
)
def test_a_step_keeps_its_sequences_on_other_ranks(
    tmp_path: Path, world_size: int, content: dict[str, Any], expected: tuple[int, ...]
) -> None:
    whole = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3, "optimizer": OPTIMIZER} | content
    file = write(tmp_path / "ds.json", {k: v for k, v in whole.items() if v is not None})
    found, sizes = ds_config.load(file, world_size, {"sequences": 24, "ranks": 2})
    assert dataclasses.astuple(sizes) == expected
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == expected[:2]


def test_ranks_that_cannot_share_a_step(tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", {"train_micro_batch_size_per_gpu": 4, "optimizer": OPTIMIZER})
    with pytest.raises(ValueError, match=r"takes 8 sequences .* which 3 ranks cannot .* on 1, 2, 4 or 8 ranks"):
        ds_config.load(file, 3, {"sequences": 8, "ranks": 2})


@pytest.mark.parametrize(
    ("train", "micro", "accumulation", "expected"),
    [
        (None, 4, None, (8, 4, 1)),
        (None, 4, 3, (24, 4, 3)),
        (24, 4, None, (24, 4, 3)),
        (24, None, 3, (24, 4, 3)),
        (24, None, None, (24, 12, 1)),
        (24, 4, 3, (24, 4, 3)),
    ],
)
def test_batch_sizes_are_completed_as_deepspeed_would(
    train: int | None, micro: int | None, accumulation: int | None, expected: tuple[int, int, int]
) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    values = zip(names, (train, micro, accumulation), strict=True)
    content = {name: value for name, value in values if value is not None}
    assert ds_config.batch_sizes(content, 2, "here") == ds_config.BatchSizes(*expected)


def test_batch_sizes_that_say_nothing() -> None:
    with pytest.raises(ValueError, match="gives neither train_batch_size nor"):
        ds_config.batch_sizes({"gradient_accumulation_steps": 2}, 2, "here")


def test_deepspeed_knows_every_key_that_we_take() -> None:
    import deepspeed

    root = Path(deepspeed.__file__).parent
    sources = [root / "__init__.py", *(root / "comm").glob("*.py"), *root.glob("*/config.py")]
    sources += [p for part in ("runtime", "autotuning", "utils") for p in (root / part).rglob("*.py")]
    sources += [*(root / "profiling").glob("*.py"), *(root / "datastates").glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    unknown = [k for k in ds_config.TOP_LEVEL_KEYS if f'"{k}"' not in text and f"'{k}'" not in text]
    assert not unknown


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"hidden_sizes": 64}, "unknown key 'hidden_sizes' in .* did you mean 'hidden_size'"),
        (
            {"hidden_size": 64, "num_attention_heads": 5},
            "model.json: .*hidden size .64. is not a mult",
        ),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "must divide 32 heads"),
        ({"max_position_embeddings": 16}, "sequence_length=32 is more than max_position_emb"),
    ],
)
def test_mistakes_in_the_model(tmp_path: Path, shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config(write(tmp_path / "model.json", shapes), 258, 32)


def make_run(folder: Path, *steps: int) -> Path:
    model = nn.Linear(2, 2)
    extra = {"identity": {"seed": 0}, "batch": {"sequences": 8, "ranks": 2}, "streams": None}
    for step in steps:
        gwt_dist.save(folder / "checkpoints", model, GWTAdamW(model.parameters(), level=1), step=step, extra=extra)
    return folder


def test_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "thesis.txt", "months of work")
    with pytest.raises(ValueError, match="not empty and nothing in it is overwritten"):
        checkpoints.open_run(TrainConfig(output=str(tmp_path)))
    with pytest.raises(ValueError, match="is a file; name a folder"):
        checkpoints.open_run(TrainConfig(output=str(tmp_path / "thesis.txt")))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_resume_finds_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20)
    (run / "checkpoints" / ".step-00000030.saving").mkdir()  # killed while it was saved
    shutil.copytree(run / "checkpoints" / "step-00000020", run / "checkpoints" / "step-00000040")  # ... before `latest`
    for resume in ("latest", str(run), str(run / "checkpoints" / "step-00000020")):
        found = checkpoints.open_run(TrainConfig(output=str(run), resume=resume))
        assert found is not None and found.step == 20 and found.run_folder == run


def test_resume_into_an_empty_folder_branches_off(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20)
    older = str(run / "checkpoints" / "step-00000010")
    found = checkpoints.open_run(TrainConfig(output=str(tmp_path / "new"), resume=older))
    assert found is not None and found.step == 10


@pytest.mark.parametrize(
    ("output", "resume", "steps", "message"),
    [
        ("run", "latest", 20, "steps=20, but .* is at step 20 already"),
        ("empty", "latest", 99, "no complete checkpoint in"),
        ("empty", "nowhere", 99, "no complete checkpoint in"),
        ("run", "run/checkpoints/step-00000010", 99, "would overwrite the later checkpoint"),
        ("other", "run", 99, "holds something else"),
    ],
)
def test_resume_that_cannot_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    resume: str,
    steps: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), 10, 20)
    make_run(Path("other"), 10)
    with pytest.raises(ValueError, match=message):
        checkpoints.open_run(TrainConfig(output=output, resume=resume, steps=steps, warmup_steps=0))


def test_resume_of_another_run_names_the_field(tmp_path: Path) -> None:
    batch = {"sequences": 8, "ranks": 2}
    begun = checkpoints.Begun(tmp_path, tmp_path, 5, {"optimizer.level": 2, "seed": 2}, batch)
    checkpoints.check_identity(begun, {"optimizer.level": 2, "seed": 2})
    with pytest.raises(ValueError, match=r"optimizer.level is 3 in this run and 2 in .*back to 2"):
        checkpoints.check_identity(begun, {"optimizer.level": 3, "seed": 2})
    # A run that was begun before there was a key left it as the recipe says.
    checkpoints.check_identity(begun, {"optimizer.level": 2, "seed": 2, "optimizer.limiter": None})
    with pytest.raises(ValueError, match=r"optimizer.nor is 0.95 in this run and None in"):
        checkpoints.check_identity(begun, {"optimizer.level": 2, "seed": 2, "optimizer.nor": 0.95})


def test_a_launcher_that_restarts_gives_the_same_command_line_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MAX_RESTARTS, "3")

    def opened(output: str, resume: str = "latest", steps: int = 30) -> checkpoints.Begun | None:
        return checkpoints.open_run(
            TrainConfig(output=str(tmp_path / output), resume=resume, steps=steps, warmup_steps=0)
        )

    assert opened("new") is None  # the first start
    record = {"identity": {"seed": 0}, "batch": {"sequences": 8, "ranks": 2}}
    (tmp_path / "early").mkdir()
    checkpoints.write_json(tmp_path / "early" / "run.json", record)
    early = opened("early")  # died before its first checkpoint
    assert early is not None and (early.step, early.checkpoint, early.identity) == (0, None, {"seed": 0})
    make_run(tmp_path / "run", 10, 20)
    later = opened("run")
    assert later is not None and later.step == 20
    with pytest.raises(checkpoints.RunComplete, match="all 20 steps are done"):
        opened("run", steps=20)
    write(tmp_path / "thesis" / "thesis.txt", "months of work")
    with pytest.raises(ValueError, match=r"holds neither a checkpoint nor the run.json of a run"):
        opened("thesis")
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        opened("new", resume=str(tmp_path / "runn"))
    monkeypatch.setenv(MAX_RESTARTS, "0")
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        opened("new")


def test_a_plain_start_is_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RENDEZVOUS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    found = ranks_from_environment(None)
    assert (found.rank, found.world_size, found.local_rank) == (0, 1, 0)


def test_ranks_that_would_each_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="every process would train alone"):
        ranks_from_environment(None)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="the environment lacks WORLD_SIZE, LOCAL_RANK"):
        ranks_from_environment(None)


def test_wrong_file_value_is_refused_even_if_overridden(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "steps: 0")
    with pytest.raises(ValueError, match="steps=0"):
        parse_arguments(["--config", str(file), "--steps", "5"])


def test_unknown_key_from_code() -> None:
    with pytest.raises(ValueError, match="unknown key 'momentum' in here"):
        config_from({"momentum": 1}, "here")

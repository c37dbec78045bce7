"""What a start of the recipe tells: options of the optimizer, a resume, a rate that jumps, an error under torchrun."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from gwt_dist.train import checkpoints, command, ds_config, tell
from gwt_dist.train.config import TrainConfig, find_file, parse_arguments, read_mapping
from pretrain_cases import arguments, finish, started, torchrun


def test_warm_up_is_a_tenth_of_a_short_run() -> None:
    found = [parse_arguments(["--steps", str(steps)])[0].warmup_steps for steps in (3, 20, 399, 400, 5000)]
    assert found == [0, 2, 39, 40, 40]
    assert parse_arguments(["--steps", "20", "--warmup-steps", "7"])[0].warmup_steps == 7


def test_lr_level_and_recipe_of_the_run_go_into_the_optimizer_of_the_json() -> None:
    path = find_file("configs/zero2.json")
    before, _ = ds_config.load(path, 2)
    config, _ = parse_arguments(["--lr", "3e-3", "--level", "1", "--recipe", "foam"])
    content, _ = ds_config.load(path, 2, None, {"lr": config.lr, "level": config.level, "recipe": config.recipe})
    params = before["optimizer"]["params"]
    assert content["optimizer"]["params"] == {**params, "lr": 0.003, "level": 1, "recipe": "foam"} != params
    assert ds_config.load(path, 2, None, {"lr": None, "level": None})[0] == before
    with pytest.raises(ValueError, match=r"params\.lr=-1\.0 in .*zero2\.json and lr of the run: expected a number"):
        ds_config.load(path, 2, None, {"lr": -1.0})
    with pytest.raises(ValueError, match=r"unknown key 'level' in optimizer\.params of .* and level of the run"):
        ds_config.load(find_file("configs/zero2-adamw.json"), 2, None, {"level": 1})


def test_a_resume_tells_where_it_goes_on_and_a_rate_that_jumps() -> None:
    begun = checkpoints.Begun(Path("runs/a"), Path("runs/a/checkpoints/step-00000400"), 400, {}, {}, None, 2)
    sizes = ds_config.BatchSizes(8, 2, 2)

    def told(rates: tuple[float, float], begun: checkpoints.Begun | None = begun, ranks: int = 2) -> list[str]:
        config = TrainConfig(output="runs/a", resume="latest", steps=800)
        return list(tell.resumed(begun, config, sizes, ranks, rates, {"train": {"steps": 400}}))

    assert told((1e-3, 1e-3)) == ["resumed at step 400 of runs/a (step-00000400)"]
    assert told((1e-3, 5.4e-3))[1:] == [
        "warning: the schedule is now over 800 steps, 40 of them warm-up, and was over 400: the learning rate jumps "
        "from 0.001 to 0.0054"
    ]
    assert told((1e-3, 1e-3), ranks=1)[1].startswith("1 ranks go on where 2 saved")
    assert told((0.0, 0.0), None) == ["no checkpoint in runs/a yet: starting from the beginning"]
    assert tell.vocabulary({"file": "m.json", "vocab_size": 257}, 258) == (
        "vocab_size is 257 in m.json and 258 in the model: the tokenizer has so many tokens"
    )
    assert tell.vocabulary({"file": "m.json", "vocab_size": 258}, 258) == tell.vocabulary({"file": "m.json"}, 258) == ""


def test_the_rate_of_a_schedule_is_that_of_its_own_steps() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 * step)
    assert tell.rate(schedule, 7) == pytest.approx(0.35)


def test_torchrun_is_told_the_error_and_prints_it_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    waited: list[tuple[str, float]] = []
    monkeypatch.setattr(command.time, "sleep", lambda seconds: waited.append((os.environ["LOCAL_RANK"], seconds)))
    for rank in "01":
        file = tmp_path / f"error-{rank}.json"
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv(command.ERROR_FILE, str(file))
        assert command.main(["--steps", "0"]) == 2
    assert waited == [("1", command.SECONDS_FOR_THE_FIRST)] and capsys.readouterr().err == ""
    shown = str(ChildFailedError("it", {0: ProcessFailure(0, 1, 2, str(tmp_path / "error-0.json"))}))
    assert re.search(r"traceback : error: steps=0 must be at least 1\n=+$", shown)
    monkeypatch.delenv(command.ERROR_FILE)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert command.main(["--steps", "0"]) == 2
    assert capsys.readouterr().err == "error: steps=0 must be at least 1\n"


def test_a_file_that_is_no_text_and_a_folder_say_so(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(b"\xc6\xff")
    with pytest.raises(ValueError, match=r"m\.json is no text \(.*byte 0xc6.*\); name a \.json or \.yaml file"):
        read_mapping(tmp_path / "m.json")
    with pytest.raises(ValueError, match="is a folder; name a configuration file"):
        find_file(str(tmp_path))
    with pytest.raises(ValueError, match=r"x/y: .*/x is a file; name a folder"):
        (tmp_path / "x").write_text("")
        checkpoints.open_run(TrainConfig(output=str(tmp_path / "x" / "y")))


@pytest.mark.matrix
def test_two_ranks_of_torchrun_end_in_one_message(inputs: Path, torch_extensions_dir: Path) -> None:
    with started([*torchrun(), *arguments(inputs, inputs / "never", level=99)]) as process:
        code, output = finish(process)
    assert code == 1 and output.count("level=99 must be a whole number") == 1
    assert re.search(r"traceback : error: level=99 must be .*\n=+\n*$", output)

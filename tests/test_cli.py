"""The command gwt-dist itself: its commands, its exit codes, its mistakes told in one line."""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gwt_dist.cli import EXTRAS
from gwt_dist.cli.app import COMMANDS, main
from gwt_dist.study.results import Writer

ROOT = Path(__file__).parents[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("gwt_dist")


def test_the_installed_command_is_this_one() -> None:
    (command,) = [c for c in importlib.metadata.entry_points(group="console_scripts") if c.name == "gwt-dist"]
    assert command.value == "gwt_dist.cli:start"


def test_unknown_commands_and_no_command_leave_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inpsect"]) == 2
    assert "No such command 'inpsect'. Did you mean 'inspect'?" in capsys.readouterr().err
    assert main(["plam"]) == 2
    assert "No such command 'plam'. Did you mean 'plan'?" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    assert "Commands: compare, doctor, export" in capsys.readouterr().err
    assert main([]) == 2


def test_train_is_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--stepz", "3"]) == 2
    assert "did you mean '--steps'?" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    assert "--sequence_length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["plan", ""], "the argument after 'plan' is"),
        (["compare", "smoke", "--row", ""], "the argument after 'compare smoke --row' is"),
        (["compare", "smoke", "--row="], "option --row is"),
        (["train", "--output="], "option --output is"),
        (["report", "a", ""], "the argument after 'report a' is"),
    ],
)
def test_an_empty_argument_is_refused(arguments: list[str], where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {where} empty; give it a value") and told.count("\n") == 1


def test_inputs_are_looked_at_before_the_page_that_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.html").write_text("mine")
    assert main(["report", str(tmp_path / "nope"), "--output", str(tmp_path / "page.html")]) == 2
    assert "nope is no folder; name the run folder" in capsys.readouterr().err
    assert main(["plan", "nope", "--html", str(tmp_path / "page.html")]) == 2
    assert "no model 'nope'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["plan", "tiny"], ["doctor"]], ids=lambda command: command[0])
def test_a_deepspeed_json_that_is_none_is_named(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "it.json").write_bytes(b"{\xc6}")
    for name, message in (("it.json", "it.json' is no text ('utf-8' codec"), ("", "' is a folder; name the JSON")):
        assert main([*command, "--deepspeed-config", str(tmp_path / name)]) == 2
        told = capsys.readouterr().err
        assert message in told and str(tmp_path) in told and told.count("\n") == 1


def test_a_study_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"results\.jsonl cannot be written: .+; give --output another"):
        Writer(tmp_path / "file" / "results.jsonl")


WITHOUT = """
import contextlib, io, json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from gwt_dist.cli import start
found = []
for arguments in {lines!r}:
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            start()
        except SystemExit as left:
            code = left.code
    found.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""
OF_HF = ("yaml", "tqdm", "transformers", "tokenizers", "datasets", "safetensors", "tensorboard")


def without(missing: tuple[str, ...], *lines: list[str]) -> list[list[Any]]:
    """Exit code, output and errors of gwt-dist with each of these arguments, in a process without some packages."""
    code = WITHOUT.format(missing=missing, lines=lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[list[Any]] = json.loads(done.stdout)
    return found


def test_help_and_plan_work_without_the_recipes_packages() -> None:
    """As the README installs it: an extra that is left out takes its own commands away, not the help."""
    plan = ["plan", str(ROOT / "configs/models/7b.json"), "--world", "24"]
    (code, out, err), *others = without(OF_HF, ["--help"], *([command, "--help"] for command in COMMANDS), plan)
    assert (code, err) == (0, "")
    assert all(f" {command} " in out for command in (*COMMANDS, "train"))
    for (code, _, err), command in zip(others, (*COMMANDS, plan), strict=True):
        assert (code, err) == (0, ""), command


def test_a_command_whose_packages_are_not_there_says_what_to_install() -> None:
    for command, found in zip(
        ("train", "compare"), without(OF_HF, ["train", "smoke"], ["compare", "smoke"]), strict=True
    ):
        assert found == [
            2,
            "",
            f"error: gwt-dist {command} needs the package yaml, which is not installed: "
            f'pip install -c constraints.txt -e ".[cli,hf]"\n',
        ]
    assert without(("typer",), ["plan"])[0][2] == (
        "error: gwt-dist plan needs the package typer, which is not installed: "
        'pip install -c constraints.txt -e ".[cli]"\n'
    )


def test_extras_bring_what_the_message_says() -> None:
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    for package, extra in EXTRAS.items():
        names = extras["options.extras_require"][extra].replace(">", " ").split()
        assert {"yaml": "pyyaml"}.get(package, package) in names, package

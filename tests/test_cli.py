"""The command gwt-dist itself: its commands, its exit codes, its mistakes told in one line."""

from __future__ import annotations

import importlib.metadata

import pytest

from gwt_dist.cli.app import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("gwt_dist")


def test_the_installed_command_is_this_one() -> None:
    (command,) = [c for c in importlib.metadata.entry_points(group="console_scripts") if c.name == "gwt-dist"]
    assert command.value == "gwt_dist.cli:start"


def test_unknown_commands_and_no_command_leave_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inpsect"]) == 2
    assert "inpsect" in capsys.readouterr().err
    assert main([]) == 2


def test_train_is_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--stepz", "3"]) == 2
    assert "did you mean '--steps'?" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    assert "--sequence_length" in capsys.readouterr().out

"""``gwt-dist compare``: a study of optimizers on the same text, each at its own best rate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def compare(
    study: Annotated[str, typer.Argument(help="A study's YAML file, or a name in configs/studies.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the results. [runs/compare/STUDY]")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=0, help="Worker processes of one thread each; 0: in this process. [one a core, or one on a GPU]"
        ),
    ] = None,
    row: Annotated[str, typer.Option(help="The name of a row: run it alone.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Run anew what has ended before.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="End within so many minutes; what has not ended is run the next time.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; write table and plots of what is there.")
    ] = False,
) -> None:
    """Compare optimizers: rates on one seed, then all seeds at the best. Goes on where it was stopped."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from gwt_dist.study import compare as whole
    from gwt_dist.study.config import read_study
    from gwt_dist.study.inputs import device_of
    from gwt_dist.study.report import write_report

    plan = read_study(study)
    folder = output or Path("runs/compare") / plan.name
    console = Console(stderr=True)
    if not report:
        columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
            task = progress.add_task("reading the text")

            def show(done: int, total: int, text: str) -> None:
                progress.update(task, completed=done, total=max(total, 1), description=text)

            ended = whole.compare(
                plan,
                folder,
                jobs=jobs if jobs is not None else 1 if device_of(plan) == "cuda" else os.cpu_count() or 1,
                seconds=None if minutes is None else 60 * minutes,
                only=row,
                again=again,
                show=show,
            )
        console.print(
            f"{ended.made} runs made" + (f"; the time is up, at least {ended.left} are left" * bool(ended.left))
        )
    write_report(plan, folder, row)

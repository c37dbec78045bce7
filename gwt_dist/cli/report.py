"""``gwt-dist report``: runs of the recipe as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders: --output of `gwt-dist train`.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the page if it is there.")] = False,
) -> None:
    """Write one HTML file with the curves, times, memory and settings of runs, laid over each other if several.

    It needs no network. A run that goes on can be shown too; for a live view there is TensorBoard.
    """
    from gwt_dist.report.page import page
    from gwt_dist.report.pages import check_free, write_page
    from gwt_dist.report.run import read_runs

    found = read_runs(runs)
    check_free(output, force)
    write_page(output, page(found), force=force)
    for run in found:
        for lacking in run.lacking:
            typer.echo(f"{run.name}: {lacking}", err=True)
    typer.echo(f"written: {output}")

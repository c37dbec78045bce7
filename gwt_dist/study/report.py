"""What a study shows: its table on the screen and in a file, and its plots."""

from __future__ import annotations

from pathlib import Path

from gwt_dist.study.compare import identity
from gwt_dist.study.config import Study
from gwt_dist.study.plots import write_plots
from gwt_dist.study.prepared import text_sha256
from gwt_dist.study.results import FILE, read_results
from gwt_dist.study.table import COLUMNS, cells, lines_of, unequal, write_table


def write_report(study: Study, folder: Path, only: str = "") -> None:
    """Print the table of `study` and write table.md and the plots into `folder`; `only` prints one row.

    Raises:
        ValueError: there are no results.
    """
    from rich.console import Console
    from rich.table import Table

    results, bad = read_results(folder / FILE)
    if not results:
        raise ValueError(f"no results in {folder / FILE}; run the study first")
    shared = identity(study, text_sha256(study, folder))
    console = Console()
    if bad:
        console.print(f"{bad} lines of {folder / FILE} cannot be read; their runs count as not run")
    for batch in study.batches:
        table = Table(*COLUMNS, title=f"{study.name}: {batch.tokens:,} tokens a step, {batch.steps} steps")
        for line in lines_of(study, shared, results, batch):
            if not only or line.row == only:
                table.add_row(*cells(line))
        console.print(table)
    for problem in unequal(results.values()):
        console.print(problem)
    write_table(folder / "table.md", study, shared, results)
    paths = [folder / "table.md", *write_plots(folder, study, shared, results)]
    console.print(f"written: {', '.join(str(path) for path in paths)}")

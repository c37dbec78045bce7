"""``gwt-dist doctor``: what this machine would do, and what would be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gwt_dist.formats import FP32, STATE_DTYPES
from gwt_dist.recipes import DEFAULT, LEVEL, RECIPES, level_of, readers
from gwt_dist.targets import BLOCKS


def doctor(
    context: typer.Context,
    deepspeed_config: Annotated[Path | None, typer.Option(help="A DeepSpeed JSON to examine.")] = None,
    model: Annotated[
        str,
        typer.Option(help="A model to examine, as in `gwt-dist plan`: built on the meta device, nothing is allocated."),
    ] = "",
    level: Annotated[
        int | None, typer.Option(help=f"Level of the matrices that match a target. [{LEVEL}, or as the JSON says]")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help=f"Part of a name, or a regular expression; once for each. [{BLOCKS}]")
    ] = None,
    wavelet: Annotated[str, typer.Option(help="A discrete wavelet of PyWavelets.")] = "haar",
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(sorted(RECIPES))}.")] = DEFAULT,
    state_dtype: Annotated[str, typer.Option(help=f"Format of moments: {', '.join(STATE_DTYPES)}.")] = FP32,
    rank: Annotated[
        int | None, typer.Option(min=0, help=f"Of {readers('rank')}: vectors of the subspace of a matrix.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, programs, kernels, and what of a model and a DeepSpeed JSON would be refused. Ends with 1 if any is."""
    from gwt_dist import ds_json, shipped
    from gwt_dist.cli import diagnosis
    from gwt_dist.cli.models import meta_model

    values = {
        "level": level_of(recipe) if level is None else level,
        "targets": target or BLOCKS,
        "wavelet": wavelet,
        "recipe": recipe,
        "state_dtype": state_dtype,
        "rank": rank,
    }
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}  # type: ignore[union-attr]
    settings = None if deepspeed_config is None else ds_json.read(shipped.find(deepspeed_config) or deepspeed_config)
    # Without a JSON what is not given has the defaults of this command, with one those of the JSON.
    options = {
        key: value
        for key, value in values.items()
        if settings is None or key in given or (key == "targets" and "target" in given)
    }
    module = meta_model(model) if model else None
    findings = list(diagnosis.examine(settings, module, options))
    content: dict[str, Any] = {
        "versions": diagnosis.versions(),
        "machine": diagnosis.machine(),
        "kernels": _kernels(settings or {}, options),
        "examined": [str(x) for x in (deepspeed_config, model) if x],
        "findings": [{"kind": finding.kind, "text": finding.text} for finding in findings],
    }
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        _show(content)
    if any(finding.kind == diagnosis.REFUSED for finding in findings):
        raise typer.Exit(1)


def _kernels(settings: dict[str, Any], options: dict[str, Any]) -> dict[str, dict[str, str]]:
    import torch

    from gwt_dist.cli import diagnosis

    try:
        return diagnosis.kernels({**diagnosis.params_of(settings), **options}, torch.float32)
    except ValueError as error:  # of a key that is refused
        return {"any": {"kernel": "none", "why": str(error)}}


def _show(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from gwt_dist.cli.diagnosis import PACKAGES, PROGRAMS, REFUSED

    console = Console()
    for title, key, purposes in (("versions", "versions", PACKAGES), ("this machine", "machine", PROGRAMS)):
        table = Table(title=title, title_justify="left", show_header=False)
        for _ in range(3):
            table.add_column(overflow="fold")  # a path is not cut
        for name, value in content[key].items():
            table.add_row(name, "-" if value is None else value, purposes.get(name, ""))
        console.print(table)
    table = Table(title="kernels, for fp32 weights", title_justify="left", show_header=False)
    for device, found in content["kernels"].items():
        table.add_row(device, found["kernel"], found["why"])
    console.print(table)
    for finding in content["findings"]:
        style = "bold red" if finding["kind"] == REFUSED else "yellow"
        console.print(f"{finding['kind']}:", style=style, end=" ")
        console.print(finding["text"], markup=False, highlight=False)
    if content["examined"] and not content["findings"]:
        console.print(f"nothing to say against {' with '.join(content['examined'])}", markup=False, highlight=False)

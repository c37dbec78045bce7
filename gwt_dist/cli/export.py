"""``gwt-dist export``: a checkpoint's weights as a folder that `transformers` loads."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from gwt_dist.checkpoint import CheckpointError, locate, read_index
from gwt_dist.checkpoint.export import DTYPES, export_model
from gwt_dist.checkpoint.folder import read
from gwt_dist.checkpoint.format import WEIGHT
from gwt_dist.cli.inspect import printable

Dtype = Enum("Dtype", {name: name for name in DTYPES}, type=str)  # type: ignore[misc]
_LARGEST_CONFIG = 1 << 24


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, a run's folder, or its `latest`.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; not there yet, or empty.")],
    config: Annotated[
        Path | None, typer.Option(help="A config.json or its folder; default: the config in the checkpoint.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; default: what they had. float32 keeps masters as they are.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, and what is held in memory at once.")] = "2GB",
) -> None:
    """Write the weights to a folder that transformers' AutoModelForCausalLM.from_pretrained loads.

    With a model card, README.md, and of a run of the recipe its tokenizer, unless that is plain bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from gwt_dist.report.card import describe

    console = Console(highlight=False, markup=False, emoji=False)
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn())
    lacking: list[str] = []
    try:
        folder, sha256 = locate(checkpoint)
        tensors = read_index(folder, sha256).tensors.values()
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("exporting", total=sum(entry.parts[WEIGHT].bytes for entry in tensors))
            written = export_model(
                folder,
                out,
                config=None if config is None else _config(config),
                dtype=None if dtype is None else DTYPES[dtype.value],
                max_shard_size=max_shard_size,
                progress=lambda count: bar.advance(task, count),
                beside=lambda writing, index: lacking.extend(describe(writing, index, folder, out.absolute().name)),
            )
    except CheckpointError as error:
        raise CheckpointError(printable(error)) from error
    for text in lacking:
        typer.echo(printable(text), err=True)
    size = sum(path.stat().st_size for path in written.iterdir())
    console.print(f"{written}: {len(tensors)} tensors, {size:,} bytes", soft_wrap=True)


def _config(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(read(path, _LARGEST_CONFIG))
    except FileNotFoundError:
        raise ValueError(f"config {path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"config {path} holds no object")
    return found

"""``gwt-dist inspect``: what is in a checkpoint, who wrote it, and whether it is what was written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gwt_dist.checkpoint import CheckpointError, Index, NoCheckpoint, locate, read_index
from gwt_dist.checkpoint.format import ITEM_BYTES, WEIGHT, Entry
from gwt_dist.checkpoint.values import encode
from gwt_dist.checkpoint.verify import Damage, damages
from gwt_dist.declare import Extent, Field
from gwt_dist.recipes import program_of

GOOD, DAMAGED = 0, 1
_WIDEST = 1000  # letters in a row of a table
_RANK = re.compile(r"rank-0*([0-9]+)\.safetensors")


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, a run's folder, or its `latest`.")],
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare every byte with its checksum.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show what a checkpoint holds and who wrote it, and verify every checksum.

    Leaves with 0 if it is as it was written, 1 if it is damaged or was not saved to the end, 2 if there is none.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    try:
        folder, sha256 = locate(checkpoint)
        index = read_index(folder, sha256, lengths=False)
    except NoCheckpoint:
        raise
    except CheckpointError as error:
        found = _files(checkpoint)
        if as_json:
            console.out(json.dumps({"folder": str(checkpoint), "damaged": [_plain(error)], "files": found}))
        else:
            console.print(f"damaged: {printable(error)}", style="bold red", soft_wrap=True)
            for name, size in found.items():
                console.print(f"  {printable(name)}: {size:,} bytes", soft_wrap=True)
        raise typer.Exit(DAMAGED) from None
    told = describe(folder, index)
    if not as_json:
        _show(console, told)
    bad = _verified(folder, index, console if not as_json else None) if verify else []
    if as_json:
        told |= {"verified": verify, "damaged": [asdict(one) for one in bad]}
        console.out(json.dumps(told))
    else:
        _show_damage(console, index, bad, verify)
    raise typer.Exit(DAMAGED if bad else GOOD)


def printable(text: object) -> str:
    """What a terminal can be given: names in an index may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _plain(error: CheckpointError) -> dict[str, Any]:
    return {"file": None, "tensors": [], "message": str(error)}


def _files(path: Path) -> dict[str, int]:
    """Regular files in a folder that has no index that could be read."""
    if not path.is_dir():
        return {}
    return {p.name: p.lstat().st_size for p in sorted(path.iterdir()) if p.is_file() and not p.is_symlink()}


def describe(folder: Path, index: Index) -> dict[str, Any]:
    """All that is shown, as plain data."""
    tensors = [_tensor(entry) for entry in index.tensors.values()]
    left_out = index.excluded.items()
    keys = ("weight_bytes", "master_bytes", "moment_bytes", "adamw_moment_bytes")
    return {
        "folder": str(folder),
        "step": index.step,
        "world_size": index.world_size,
        "engine": index.engine,
        "versions": index.versions,
        "tensors": tensors,
        "totals": {key: sum(tensor[key] for tensor in tensors) for key in keys},
        "state_bytes": dict(sum((Counter(tensor["state_bytes"]) for tensor in tensors), Counter())),
        "formats": _formats(tensors),
        "files": _written(index),
        "scheduler": index.scheduler is not None,
        "random_states_of_ranks": sorted(index.random),
        "excluded": [{"name": name, "shape": list(one.shape), "dtype": one.dtype} for name, one in left_out],
        "extra": encode(index.extra, "extra"),
    }


def _formats(tensors: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Of each field that has bytes, the formats that tensors have it in."""
    found: dict[str, set[str]] = {}
    for tensor in tensors:
        for name, form in tensor["formats"].items():
            found.setdefault(name, set()).add(form)
    return {name: sorted(formats) for name, formats in found.items()}


def _tensor(entry: Entry) -> dict[str, Any]:
    state = {kind: part for kind, part in entry.parts.items() if kind != WEIGHT}
    # fp32, but for state in fp64; what is stored in fewer bits is not what AdamW would have.
    item = max((ITEM_BYTES[part.dtype] for part in state.values()), default=0)
    item = max(item, 4) if state else 0
    weight = entry.parts[WEIGHT]
    numel = weight.bytes // ITEM_BYTES[weight.dtype]
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "stored_dtype": weight.dtype,
        "level": entry.level if entry.group is not None else None,
        "wavelet": entry.wavelet if entry.level else None,
        "recipe": entry.recipe if entry.level or (entry.fields and not _is_plain(entry.fields)) else None,
        "step": entry.step,
        "weight_bytes": 0 if entry.has_master else weight.bytes,
        "master_bytes": weight.bytes if entry.has_master else 0,
        "state_bytes": {kind: part.bytes for kind, part in state.items()},
        "formats": {field.name: field.format for field in entry.fields if field.name in state},
        "moment_bytes": sum(part.bytes for part in state.values()),
        "adamw_moment_bytes": 2 * numel * item,  # two for each element
    }


def _is_plain(fields: Iterable[Field]) -> bool:
    """Whether these are AdamW's fields, in whatever format."""
    return {f.name for f in fields if f.extent is not Extent.CELL} == set(program_of({}, 0).names())


def _written(index: Index) -> list[dict[str, Any]]:
    held: dict[str, Counter[str]] = {name: Counter() for name in index.files}
    parts = [one for entry in index.tensors.values() for one in entry.parts.items()]
    stored = [("weight" if kind == WEIGHT else "moment", part) for kind, part in parts]
    stored += [("random", part) for states in index.random.values() for part in states.values()]
    for kind, part in stored:
        for chunk in part.chunks:
            held[chunk.file][kind] += part.bytes_of(chunk)
    return [
        {
            "name": name,
            "rank": int(match[1]) if (match := _RANK.fullmatch(name)) else None,
            "bytes": file.bytes,
            **{f"{kind}_bytes": held[name][kind] for kind in ("weight", "moment", "random")},
        }
        for name, file in sorted(index.files.items())
    ]


def _show(console: Any, told: dict[str, Any]) -> None:
    from rich.table import Table

    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    engine = "DeepSpeed" if told["engine"] is not None else "none with counters (FSDP, DDP or one process)"
    console.print(printable(told["folder"]), style="bold", soft_wrap=True)
    console.print(
        f"step {told['step']:,}, {told['world_size']} ranks, engine: {engine}; {printable(versions)}", soft_wrap=True
    )
    table = Table("tensor", "shape", "dtype", "level", "wavelet", "recipe", "step", title="tensors", title_style="bold")
    for column in ("weight", "master", "moments", "AdamW's"):
        table.add_column(f"{column}, bytes", justify="right")
    for one in told["tensors"]:
        cells = [one["name"], "x".join(map(str, one["shape"])) or "scalar", one["dtype"]]
        cells += ["-" if one[key] is None else str(one[key]) for key in ("level", "wavelet", "recipe", "step")]
        table.add_row(*map(printable, cells), *_bytes(one))
    for one in told["excluded"]:
        shape = "x".join(map(str, one["shape"])) or "scalar"
        table.add_row(*map(printable, (one["name"], shape, one["dtype"])), *["-"] * 4, "left out")
    table.add_section()
    table.add_row("total", *[""] * 6, *_bytes(told["totals"]), style="bold")
    _print_whole(console, table)
    files = Table("file", "rank", title="who wrote what", title_style="bold")
    for column in ("weights and masters", "moments", "random states", "in all"):
        files.add_column(f"{column}, bytes", justify="right")
    for one in told["files"]:
        sizes = (one[key] for key in ("weight_bytes", "moment_bytes", "random_bytes", "bytes"))
        files.add_row(one["name"], "-" if one["rank"] is None else str(one["rank"]), *(f"{size:,}" for size in sizes))
    _print_whole(console, files)
    totals = told["totals"]
    if totals["adamw_moment_bytes"]:
        share = totals["moment_bytes"] / totals["adamw_moment_bytes"]
        fields = ", ".join(
            f"{printable(name)} in {' and '.join(told['formats'][name])} {size:,} bytes"
            for name, size in told["state_bytes"].items()
        )
        console.print(f"moments: {share:.4f} of AdamW's ({fields})", soft_wrap=True)


def _print_whole(console: Any, table: Any) -> None:
    """No name and no number is cut: a table without room for them has no frame, and the terminal folds its rows."""
    width = console.width
    needed = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    if needed > width:
        table.box = None
        console.width = needed
    console.print(table)
    console.width = width


def _bytes(one: dict[str, Any]) -> list[str]:
    keys = ("weight_bytes", "master_bytes", "moment_bytes", "adamw_moment_bytes")
    return [f"{one[key]:,}" if one[key] else "-" for key in keys]


def _verified(folder: Path, index: Index, console: Any) -> list[Damage]:
    if console is None:
        return list(damages(folder, index))
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("verifying", total=sum(file.bytes for file in index.files.values()))
        return list(damages(folder, index, lambda count: bar.advance(task, count)))


def _show_damage(console: Any, index: Index, bad: list[Damage], verified: bool) -> None:
    if not verified:
        console.print("not verified", style="yellow")
    elif not bad:
        size = sum(file.bytes for file in index.files.values())
        console.print(f"verified: {len(index.files)} files, {size:,} bytes, every checksum is right", style="green")
    for one in bad:
        console.print(f"damaged: {printable(one.message)}", style="bold red", soft_wrap=True)
        if len(one.tensors) != 1:
            held = ", ".join(map(printable, one.tensors)) or "nothing of the model"
            console.print(f"  it holds {held}", soft_wrap=True)

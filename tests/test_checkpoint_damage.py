"""Damaged, exchanged and forged files of a checkpoint: each is found, and nothing of it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import gwt_dist
from checkpoint_runs import Run, built, content, same, saved_run, steps, train
from gwt_dist import CheckpointError
from gwt_dist.checkpoint import locate


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return saved_run(tmp_path / "run")


def refused(path: Path, run: Run, before: list[Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        gwt_dist.load(path, *run)
    assert same(before, content(run)), "half of it was loaded"
    return str(caught.value)


def test_every_flipped_bit_is_found(saved) -> None:
    run = built()
    train(run, steps()[2:4])
    before, generator = content(run), random.Random(3)
    files_of = [saved / "latest", *sorted((saved / "step-00000002").iterdir())]
    assert len(files_of) == 4
    for path in files_of:
        original = path.read_bytes()
        # Half of them at the start, where the header of a file is; the data is longer than it by far.
        for length in [8 * min(len(original), 2600)] * 40 + [8 * len(original)] * 40:
            bit = generator.randrange(length)
            damaged = bytearray(original)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert path.name.removesuffix(".sha256") in refused(saved, run, before), bit
        path.write_bytes(original)
    assert gwt_dist.load(saved, *run).step == 2


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "index.json", "index.json.sha256"])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "long", "link", "folder", "pipe"])
def test_files_that_are_not_what_was_written(saved, tmp_path, name, how) -> None:
    run = built()
    before, path = content(run), saved / "step-00000002" / name
    original = path.read_bytes()
    path.unlink()
    if how == "link":
        (tmp_path / "elsewhere").write_bytes(original)
        path.symlink_to(tmp_path / "elsewhere")
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "missing":
        path.write_bytes({"empty": b"", "short": original[:-1], "long": original + b"\0"}[how])
    assert name in refused(saved, run, before)


def test_a_file_of_another_run(saved, tmp_path) -> None:
    """The same layout, so the same header; other numbers."""
    run = built()
    train(run, steps()[2:4])
    gwt_dist.save(tmp_path / "other", *run, step=2)
    name = "step-00000002/rank-00000.safetensors"
    shutil.copy(tmp_path / "other" / name, saved / name)
    assert "rank-00000.safetensors is damaged: bytes" in refused(saved, run, content(run))


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another index with checksums that are right: what someone could write who means harm."""
    folder = path / "step-00000002"
    index = json.loads((folder / "index.json").read_text())
    changed = change(index)
    text = json.dumps(index if changed is None else changed).encode() if not isinstance(changed, bytes) else changed
    sha256 = hashlib.sha256(text).hexdigest()
    (folder / "index.json").write_bytes(text)
    (folder / "index.json.sha256").write_text(f"{sha256}  index.json\n")
    (path / "latest").write_text(f"{sha256}  step-00000002/index.json\n")


def renamed(to: str) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        text = json.dumps(index).replace("rank-00000.safetensors", to)
        index.clear()
        index.update(json.loads(text))

    return change


def chunk_of(index: dict[str, Any], kind: str = "weight") -> dict[str, Any]:
    return index["tensors"]["attn_q.weight"]["parts"][kind]["pieces"][0]


def void(_: object) -> None:
    """Nothing, of whatever a change returns."""


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda i: i.update(version=5), "has the format version 5 and this gwt_dist reads 1 to 4"),
    "another format": (lambda i: i.update(format="x"), "is not the index of a checkpoint"),
    "a list": (lambda i: [1], "is not the index of a checkpoint"),
    "not JSON": (lambda i: b"{", "is not JSON"),
    "deep": (lambda i: b"[" * 200000, "is not JSON"),
    "NaN": (lambda i: i.update(extra=float("nan")), "holds NaN"),
    "unknown key": (lambda i: i.update(more=1), "the index should have the keys"),
    "up": (renamed("../step-00000002/rank-00000.safetensors"), "is no plain file name"),
    "absolute": (renamed("/etc/passwd"), "is no plain file name"),
    "hidden": (renamed(".."), "is no plain file name"),
    "not there": (renamed("rank-00001.safetensors"), "rank-00001.safetensors is missing"),
    "huge": (lambda i: i["files"]["rank-00000.safetensors"].update(bytes=1 << 50), "and the file 58"),
    "shape": (lambda i: i["tensors"]["attn_q.weight"].update(shape=[1 << 40, 1 << 40]), "is no shape of a tensor"),
    "beyond": (lambda i: chunk_of(i).update(offset=1 << 40), "do not lie in its data"),
    "header": (lambda i: chunk_of(i).update(offset=0), "do not lie in its data"),
    "rows": (lambda i: chunk_of(i).update(rows=1 << 40, stop=0), "do not lie in its data"),
    "twice": (
        lambda i: i["tensors"]["attn_q.weight"]["parts"]["weight"]["pieces"].append(chunk_of(i)),
        "do not lie in its data|do not make up the tensor",
    ),
    "gap": (lambda i: chunk_of(i).update(start=1), "do not make up the tensor"),
    "negative": (lambda i: chunk_of(i).update(start=-1), "is no number of things"),
    "boolean": (lambda i: chunk_of(i).update(start=True), "is a bool"),
    "checksum": (lambda i: chunk_of(i).update(sha256="0" * 64), "rank-00000.safetensors is damaged"),
    "dtype": (lambda i: i["tensors"]["attn_q.weight"].update(dtype="F128"), "dtype is 'F128'"),
    "state": (
        lambda i: void(i["tensors"]["attn_q.weight"]["parts"].pop("exp_avg")),
        r"parts are \['exp_avg_sq', 'weight'\]",
    ),
    "second moment": (
        lambda i: [i["tensors"]["attn_q.weight"][key].pop("exp_avg_sq") for key in ("parts", "fields")] and None,
        r"'attn_q.weight' has the state exp_avg \(unit\), limited_norm \(tensor\) in .*, and this optimizer "
        r"\(recipe 'paper'\) needs exp_avg \(unit\), exp_avg_sq \(unit\), limited_norm \(tensor\)",
    ),
    "another extent": (
        lambda i: i["tensors"]["attn_q.weight"]["fields"]["exp_avg"].update(extent="row"),
        r"has the state exp_avg \(row\), exp_avg_sq",
    ),
    "no extent": (
        lambda i: i["tensors"]["attn_q.weight"]["fields"]["exp_avg"].update(extent="rows"),
        "fields.exp_avg.extent is 'rows'",
    ),
    "more of a field": (
        lambda i: i["tensors"]["attn_q.weight"]["fields"]["exp_avg"].update(dtype="I8"),
        r"fields.exp_avg should have the keys \['extent', 'format'\]",
    ),
    "another format of state": (
        lambda i: i["tensors"]["attn_q.weight"]["fields"]["exp_avg"].update(format="bf16"),
        "attn_q.weight.exp_avg.dtype is 'F32'",
    ),
    "no format": (
        lambda i: i["tensors"]["attn_q.weight"]["fields"]["exp_avg"].update(format="int4"),
        "fields.exp_avg is none: .* cannot have the format 'int4', only fp32, bf16, int8, e4m4",
    ),
    "codes without a scale": (
        lambda i: i["tensors"]["attn_q.weight"]["fields"]["exp_avg"].update(format="int8"),
        r"attn_q.weight.fields are .*, which should have the scales \['exp_avg_scale'\]",
    ),
    "a field for a weight": (
        lambda i: i["tensors"]["attn_q.weight"]["fields"].update(weight={"extent": "unit", "format": "fp32"}),
        "fields.weight is the name of what is no state",
    ),
    "no number": (
        lambda i: i["tensors"]["attn_q.weight"]["numbers"].clear(),
        r"numbers should have the keys \['limited_norm'\] and has \[\]",
    ),
    "text for a number": (
        lambda i: i["tensors"]["attn_q.weight"]["numbers"].update(limited_norm="1"),
        "numbers.limited_norm is a str",
    ),
    "state of nobody": (lambda i: i["tensors"]["attn_q.weight"].update(group=None), "group is none, of a tensor with"),
    "recipe": (
        lambda i: i["groups"][0].update(recipe="newer"),
        "'attn_q.weight' was trained with the recipe 'newer' in .*, which is none of paper, energy",
    ),
    "format of a group": (
        lambda i: i["groups"][0].update(state_dtype="fp8"),
        "state_dtype='fp8' in a parameter group of .* must be one of",
    ),
    "group": (lambda i: i["tensors"]["attn_q.weight"].update(group=9), "group is 9, of 2"),
    "option": (lambda i: i["groups"][0].update(lr="1"), "lr='1' in a parameter group"),
    "params": (lambda i: i["groups"][0].update(params=[]), "hold params"),
    "moments": (
        lambda i: i["tensors"]["attn_q.weight"]["parts"].update(
            exp_avg=i["tensors"]["attn_q.weight"]["parts"]["weight"]
        ),
        "do not lie in its data|exp_avg of 'attn_q.weight' has shape",
    ),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_index_is_refused(saved, case) -> None:
    change, message = FORGERIES[case]
    forge(saved, change)
    run = built()
    before = content(run)
    with pytest.raises(CheckpointError, match=message):
        gwt_dist.load(saved, *run)
    assert same(before, content(run))


def test_a_forged_index_that_is_right_loads(saved) -> None:
    """What `forge` does is not what is refused."""
    forge(saved, lambda index: index.update(extra=5))
    assert gwt_dist.load(saved, *built()).extra == 5


def test_a_checkpoint_of_deepspeed_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step60")  # as DeepSpeed writes it
    with pytest.raises(
        CheckpointError, match=r"is a checkpoint of DeepSpeed \(latest names global_step60.*checkpoint-N"
    ):
        locate(tmp_path)
    (tmp_path / "latest").write_text("globe 60")
    with pytest.raises(CheckpointError, match="is damaged"):
        locate(tmp_path)

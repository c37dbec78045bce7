"""`gwt-dist inspect`: what it tells is what is there, and it names every damage and goes on to the end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gwt_dist
from checkpoint_cases import save_case
from checkpoint_runs import built, steps, train
from gwt_dist import GWTAdamW
from gwt_dist.checkpoint import read_index
from gwt_dist.cli.app import main


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoint of two steps."""
    run = built()
    train(run, steps()[:2])
    gwt_dist.save(tmp_path / "run", *run, step=2, extra={"tokens": 7})
    return tmp_path / "run"


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["inspect", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_numbers(saved, capsys) -> None:
    code, found = told(capsys, saved)
    assert (code, found["damaged"], found["verified"]) == (0, [], True)
    assert (found["step"], found["world_size"], found["extra"], found["engine"]) == (2, 1, {"tokens": 7}, None)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["gwt_dist"] == gwt_dist.__version__
    model, optimizer = built()
    gwt_dist.load(saved, model, optimizer)
    tensors = {one["name"]: one for one in found["tensors"]}
    assert tensors.keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters():
        one, state = tensors[name], optimizer.state.get(parameter, {})
        held = sum(state[kind].nbytes for kind in ("exp_avg", "exp_avg_sq") if kind in state)
        adamw = 2 * parameter.nbytes if state else 0
        assert (one["weight_bytes"], one["master_bytes"]) == (parameter.nbytes, 0)
        assert (one["moment_bytes"], one["adamw_moment_bytes"], one["shape"]) == (held, adamw, list(parameter.shape))
    assert (tensors["attn_q.weight"]["level"], tensors["attn_q.weight"]["recipe"]) == (2, "paper")
    assert (tensors["embed.weight"]["level"], tensors["embed.weight"]["wavelet"]) == (0, None)
    for key, total in found["totals"].items():
        assert total == sum(one[key] for one in found["tensors"])
    (file,) = found["files"]
    path = saved / "step-00000002" / "rank-00000.safetensors"
    assert (file["name"], file["rank"], file["bytes"]) == (path.name, 0, path.stat().st_size)
    header = read_index(path.parent).files[path.name].header_bytes
    assert file["weight_bytes"] + file["moment_bytes"] + file["random_bytes"] + header == file["bytes"]


@pytest.mark.usefixtures("torch_extensions_dir")
def test_who_wrote_what(ranks, tmp_path, capsys) -> None:
    ranks(2, save_case, str(tmp_path), ("zero2",), torch.bfloat16, timeout=120)
    code, found = told(capsys, next(tmp_path.iterdir()) / "latest")
    assert (code, found["world_size"]) == (0, 2)
    assert [file["rank"] for file in found["files"]] == [0, 1]
    assert all(file["moment_bytes"] > 0 and file["random_bytes"] > 0 for file in found["files"])
    assert found["engine"]["counters"]["global_steps"] == 2
    assert found["versions"].keys() == {"torch", "gwt_dist", "deepspeed"}
    totals, files = found["totals"], found["files"]
    assert totals["master_bytes"] > 0
    assert sum(file["weight_bytes"] for file in files) == totals["weight_bytes"] + totals["master_bytes"]
    assert sum(file["moment_bytes"] for file in files) == totals["moment_bytes"]
    assert main(["inspect", str(next(tmp_path.iterdir()))]) == 0
    assert "engine: DeepSpeed" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 200])
def test_the_table(saved, capsys, monkeypatch, columns: int) -> None:
    """Names and numbers are whole, on narrow terminals too."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["inspect", str(saved / "step-00000002")]) == 0
    shown = capsys.readouterr().out
    size = (saved / "step-00000002" / "rank-00000.safetensors").stat().st_size
    assert f"verified: 1 files, {size:,} bytes, every checksum is right" in shown
    assert "step 2, 1 ranks, engine: none" in shown
    found = told(capsys, saved)[1]
    totals = found["totals"]
    assert f"moments: {totals['moment_bytes'] / totals['adamw_moment_bytes']:.4f} of AdamW's" in shown
    for one in found["tensors"]:
        (line,) = (line for line in shown.splitlines() if f" {one['name']} " in line)
        assert f"{one['weight_bytes']:,}" in line
        assert "x".join(map(str, one["shape"])) in line
    assert main(["inspect", str(saved), "--no-verify"]) == 0
    shown = capsys.readouterr().out
    assert "not verified" in shown
    assert "every checksum" not in shown


def test_every_damage_is_named(saved, capsys, monkeypatch) -> None:
    folder = saved / "step-00000002"
    chunks = {what: part.chunks[0] for what, part in read_index(folder).stored()}
    hit = ("weight of attn_q.weight", "exp_avg of mlp_down.weight", "python random state of rank 0")
    for what in hit:
        flip(folder / "rank-00000.safetensors", chunks[what].offset)
    code, found = told(capsys, saved)
    assert code == 1
    assert {tensor for one in found["damaged"] for tensor in one["tensors"]} == set(hit)
    assert all(one["file"] == "rank-00000.safetensors" for one in found["damaged"])
    assert main(["inspect", str(saved)]) == 1
    shown = capsys.readouterr().out
    assert all(f"{what}," in shown for what in hit)
    assert told(capsys, saved, "--no-verify")[0] == 0


@pytest.mark.parametrize("how", ["header", "short", "missing", "link"])
def test_damaged_files_do_not_hide_others(ranks, tmp_path, capsys, how) -> None:
    ranks(2, save_case, str(tmp_path), ("fsdp2",), torch.float32, timeout=120)
    (folder,) = tmp_path.glob("*/step-*")
    first, second = (folder / f"rank-0000{i}.safetensors" for i in (0, 1))
    chunks = [(what, chunk) for what, part in read_index(folder).stored() for chunk in part.chunks]
    last = max((chunk.offset, what) for what, chunk in chunks if chunk.file == second.name)
    flip(second, last[0])
    if how == "header":
        flip(first, 9)
    elif how == "short":
        first.write_bytes(first.read_bytes()[:-1])
    else:
        content = first.read_bytes()
        first.unlink()
        if how == "link":
            (tmp_path / "elsewhere").write_bytes(content)
            first.symlink_to(tmp_path / "elsewhere")
    code, found = told(capsys, folder)
    assert code == 1
    assert [one["file"] for one in found["damaged"]] == [first.name, second.name]
    assert set(found["damaged"][0]["tensors"]) == {what for what, chunk in chunks if chunk.file == first.name}
    assert found["damaged"][1]["tensors"] == [last[1]]


def test_what_was_not_saved_to_the_end(saved, capsys) -> None:
    """A folder without an index, a save that died, a run without `latest`, and an index that is damaged."""
    folder = saved / "step-00000002"
    shutil.copytree(folder, saved / "copied under another name")
    assert told(capsys, saved / "copied under another name")[0] == 0
    dead = saved / ".step-00000003.saving"
    dead.mkdir()
    (dead / "rank-00000.safetensors").write_bytes(b"half")
    for _ in range(2):
        code, found = told(capsys, dead)
        assert (code, found["files"]) == (1, {"rank-00000.safetensors": 4})
        assert "index.json is missing: what is in" in found["damaged"][0]["message"]
        dead = dead.rename(saved / "step-00000003")
    assert main(["inspect", str(dead.with_name("step-00000003"))]) == 1
    shown = capsys.readouterr().out
    assert "was not saved to the end" in shown
    assert "rank-00000.safetensors: 4 bytes" in shown
    flip(folder / "index.json", 40)
    assert "index.json is damaged" in told(capsys, saved)[1]["damaged"][0]["message"]
    flip(folder / "index.json", 40)
    flip(saved / "latest", 3)
    code, found = told(capsys, saved)
    assert code == 1
    # By the checksum or, where the flipped letter is none of a checksum, by its form.
    assert re.search("latest is (missing or )?damaged", found["damaged"][0]["message"])
    (saved / "latest").unlink()
    code, found = told(capsys, saved)
    assert code == 1
    assert "latest is missing; name one of the checkpoints there: step-00000002" in found["damaged"][0]["message"]


def test_mistakes_of_the_user(tmp_path, capsys) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist: name a folder with an index.json" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds no checkpoint: name a folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["inspect", str(tmp_path / "file")]) == 2
    assert main(["inspect"]) == 2


def test_names_cannot_speak_to_the_terminal(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    model = nn.Module()
    model.register_parameter("[bold]a\x1b]0;title\x07", nn.Parameter(torch.ones(3)))
    gwt_dist.save(tmp_path, model, GWTAdamW(model.parameters(), level=1), step=0)
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "[bold]a\\x1b]0;title\\x07" in shown
    assert "\x1b" not in shown
    flip(tmp_path / "step-00000000" / "rank-00000.safetensors", -1)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "\x1b" not in capsys.readouterr().out
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4, "num_attention_heads": 1}')
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--config", str(config)]) == 2
    shown = capsys.readouterr().err
    assert "the config is of another model" in shown
    assert "\x1b" not in shown

"""`gwt-dist export`: what it writes is the live model, to the bit, and what it cannot write right it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gwt_dist
from export_cases import llama, loaded_case, logits, save_case
from gwt_dist import CheckpointError, GWTAdamW
from gwt_dist.checkpoint import files
from gwt_dist.checkpoint.export import export_model
from gwt_dist.cli.app import main


def saved_in(folder: Path, model: Any, **keywords: Any) -> Path:
    extra = {"model_config": model.config.to_dict()}
    return gwt_dist.save(folder, model, GWTAdamW(model.parameters(), level=1), step=0, **{"extra": extra} | keywords)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.support("export", "to a transformers folder, from FSDP2 and ZeRO-2 with and without masters")
@pytest.mark.parametrize("kind", ["fsdp2", "zero2", "zero2 bf16"])
def test_logits_are_those_of_the_live_model(ranks, tmp_path, capsys, kind) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    live = ranks(2, save_case, str(run), kind, kind == "fsdp2", timeout=120)
    assert main(["export", str(run), str(out), "--max-shard-size", "20KB"]) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert {t.dtype for t in weights_of(out).values()} == {torch.bfloat16 if kind.endswith("bf16") else torch.float32}
    for rank, (found, dtype) in enumerate(ranks(2, loaded_case, str(out), timeout=120)):
        assert torch.equal(found, live[rank]["logits"])
        assert dtype == ("torch.bfloat16" if kind.endswith("bf16") else "torch.float32")
    assert main(["export", str(run / "step-00000002"), str(tmp_path / "fp32"), "--dtype", "float32"]) == 0
    wide = weights_of(tmp_path / "fp32")
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"
    for name, master in live[0]["masters"].items():
        assert torch.equal(wide[name], master), name  # in bf16 these are more than the weights
    if kind == "zero2 bf16":
        assert any(not torch.equal(t, t.bfloat16().float()) for t in wide.values())


@pytest.mark.parametrize("tied", [False, True])
def test_one_process_small_chunks_and_files(tmp_path, monkeypatch, tied) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    model = llama(tied)
    saved_in(tmp_path / "run", model)
    out = export_model(tmp_path / "run", tmp_path / "out", max_shard_size=10_000)
    weights = weights_of(out)
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert ("lm_head.weight" in weights) is not tied
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(again), logits(model))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_dtypes(tmp_path) -> None:
    model = llama()
    saved_in(tmp_path / "run", model)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        assert main(["export", str(tmp_path / "run" / "latest"), str(tmp_path / name), "--dtype", name]) == 0
        weights = weights_of(tmp_path / name)
        assert all(torch.equal(weights[n], p.to(dtype)) for n, p in model.named_parameters())
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name


def test_the_config_of_a_file(tmp_path, capsys) -> None:
    model = llama()
    saved_in(tmp_path / "run", model, extra=None)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "has no config of its model: pass the model's config.json (--config)" in capsys.readouterr().err
    model.config.save_pretrained(tmp_path / "config")
    for place in ("config", "config/config.json"):
        out = tmp_path / place.replace("/", "-").replace("config", "out")
        assert main(["export", str(tmp_path / "run"), str(out), "--config", str(tmp_path / place)]) == 0
        assert weights_of(out).keys() == dict(model.named_parameters()).keys()
    for name, content, message in (
        ("missing", None, "does not exist"),
        ("broken", "{", "is not JSON"),
        ("list", "[]", "holds no object"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "no"), "--config", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


MISFITS = {
    "fewer layers": ({"num_hidden_layers": 1}, r"LlamaForCausalLM of the config does not have model.layers.1.input"),
    "more layers": ({"num_hidden_layers": 3}, r"step-00000000 does not have model.layers.2.input.* and 5 more"),
    "shape": ({"intermediate_size": 44}, r"mlp\.\w+.weight' has shape \(.*45.*\) in .* and \(.*44.*\) in the model"),
    "tied": ({"tie_word_embeddings": True}, "'lm_head.weight' and 'model.embed_tokens.weight' are apart in"),
    "type": ({"model_type": "none"}, "model_type='none', which this version of transformers does not have"),
    "list": ({"model_type": ["llama"]}, "which this version of transformers does not have"),
    "nonsense": ({"hidden_size": "wide"}, "transformers builds no model from the config"),
    "code": ({"auto_map": {"AutoModelForCausalLM": "a--b.C"}}, r"names code of its own \(auto_map\)"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_another_model_is_refused(tmp_path, case) -> None:
    changes, message = MISFITS[case]
    model = llama()
    saved_in(tmp_path / "run", model, extra={"model_config": model.config.to_dict() | changes})
    with pytest.raises(CheckpointError, match=message):
        export_model(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_untied_by_the_config_and_tied_in_the_checkpoint(tmp_path) -> None:
    model = llama(tied=True)
    config = model.config.to_dict() | {"tie_word_embeddings": False}
    saved_in(tmp_path / "run", model, extra={"model_config": config})
    with pytest.raises(CheckpointError, match=r"step-00000000 does not have lm_head.weight"):
        export_model(tmp_path / "run", tmp_path / "out")


def test_code_that_a_config_would_fetch_is_left_out(tmp_path) -> None:
    model = llama()
    config = model.config.to_dict() | {"attn_implementation": "somebody/kernel"}
    saved_in(tmp_path / "run", model, extra={"model_config": config})
    out = export_model(tmp_path / "run", tmp_path / "out")
    assert "somebody" not in (out / "config.json").read_text()


def test_damage_is_found_and_nothing_is_left(tmp_path) -> None:
    folder = saved_in(tmp_path / "run", llama())
    path = folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is damaged: bytes .*weight of"):
        export_model(tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_nothing_is_overwritten(tmp_path, capsys) -> None:
    saved_in(tmp_path / "run", llama())
    full, empty, file, link = (tmp_path / name for name in ("full", "empty", "file", "link"))
    full.mkdir()
    (full / "mine").write_text("mine")
    empty.mkdir()
    file.write_text("mine")
    link.symlink_to(empty)
    for out in (full, file, link):
        assert main(["export", str(tmp_path / "run"), str(out)]) == 2
        assert "exists and is no empty folder; nothing in it is overwritten" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(file / "within")]) == 2
    assert re.search(r"error: .*/file/within cannot be written: .+; name a folder", capsys.readouterr().err)
    assert (full / "mine").read_text() == file.read_text() == "mine"
    assert main(["export", str(tmp_path / "run"), str(empty)]) == 0
    assert (empty / "config.json").stat().st_mode == (full / "mine").stat().st_mode
    assert os.listdir(full) == ["mine"]
    for size in ("2XB", "many"):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "never"), "--max-shard-size", size]) == 2
        assert "error: " in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "never")]) == 2
    assert "nowhere does not exist: name a folder with an index.json" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()

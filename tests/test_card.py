"""The card and the tokenizer of an export: their numbers are those of checkpoint and run folder, and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer

import gwt_dist
from export_cases import llama
from gwt_dist import GWTAdamW, param_groups
from gwt_dist.cli.app import main
from gwt_dist.train.metrics import FORMAT
from gwt_dist.train.tokens import train_bpe

TEXTS = [f"{i} times {j} is {i * j}, and ünï is not ascii.\n" for i in range(12) for j in range(12)]
FRONT = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gwt_dist", "llama"]}


def card(out: Path) -> tuple[str, dict[str, str], list[list[str]]]:
    """The text, the facts by their labels, and the rows of the recipes."""
    text = (out / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.to_dict() == FRONT
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    facts = {row[0]: row[1] for row in rows if len(row) == 2}
    return text, facts, [row for row in rows if len(row) == 7][2:]


def example(out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the code of the card prints, run in the export."""
    found = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    told = io.StringIO()
    with monkeypatch.context() as there, contextlib.redirect_stdout(told):
        there.chdir(out)
        exec(found[1], {})
    return told.getvalue()


def make(folder: Path, vocab_size: int, spec: str, bpe: str | None, **kept: Any) -> tuple[Path, Any]:
    """A run folder as the recipe leaves it: a checkpoint after 4 of 6 steps, and lines up to step 6."""
    folder.mkdir()
    model = llama(vocab_size=vocab_size)
    optimizer = GWTAdamW(param_groups(model, recipe="energy", level=2, lr=0.01, rest={"lr": 0.02}))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    identity = {
        "precision": "fp32",
        "tokenizer": spec,
        "tokenizer.sha256": bpe and hashlib.sha256(bpe.encode()).hexdigest(),
        "model.vocab_size": vocab_size,
        "optimizer.type": "GWTAdamW",
        "sequence_length": 32,
        "train_batch_size": 12,
    }
    extra = {"model_config": model.config.to_dict(), "identity": identity | kept}
    gwt_dist.save(folder / "checkpoints", model, optimizer, step=4, extra=extra)
    record = {
        "format": FORMAT,
        "device": "a | <device>",
        "train": {"steps": 6, "warmup_steps": 2, "min_lr_ratio": 0.1},
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "corpus": {"source": "/data/text"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    lines = [{"step": step, "loss": 5 - step / 7, "tokens": 384 * step} for step in range(1, 7)]
    lines.insert(3, {"step": 3, "validation_loss": 4.25, "bits_per_byte": 2.125})
    lines.append({"step": 6, "validation_loss": 1.0, "bits_per_byte": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if bpe:
        (folder / "tokenizer.json").write_text(bpe, encoding="utf-8")
    return folder, model


def test_the_card_of_a_real_run(
    whole_run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = whole_run[0], tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert capsys.readouterr().err == ""
    _, facts, recipes = card(out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record, summary = (json.loads((run / name).read_text()) for name in ("run.json", "summary.json"))
    ours, adamw = (sum(r[f"wavelet_{k}"] + r[f"plain_{k}"] for r in summary["ranks"]) for k in ("moments", "adamw"))
    versions = {key: record["versions"][key] for key in ("torch", "gwt_dist", "deepspeed")}
    assert facts == {
        "": "",
        "---": "---",
        "optimizer": "GWTAdamW",
        "schedule": "linear warm-up over 2 steps, cosine to 0.1 of the top at step 12",
        "steps": "12 of 12",
        "tokens": f"{lines[-1].get('tokens') or lines[-2]['tokens']:,}",
        "batch": "12 sequences of 32 tokens",
        "text": "text",
        "precision of the weights": "fp32",
        "ranks": "2",
        "engine": "DeepSpeed, ZeRO stage 2",
        "device": "cpu",
        "optimizer state": f"{ours:,} bytes, {ours / adamw:.4f} of the {adamw:,} of AdamW's two fp32 moments",
        "training loss": f"{[line['loss'] for line in lines if 'loss' in line][-1]:.4f}",
        "validation loss": f"{summary['validation_loss']:.4f}",
        "bits per byte, validation": f"{summary['bits_per_byte']:.4f}",
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "tokenizer": "plain bytes of UTF-8, 256 ends a document; there are no files of a tokenizer",
    }
    assert [row[:2] + row[6:] for row in sorted(recipes)] == [["AdamW", "0", "0.01"], ["paper", "2", "0.01"]]
    assert sum(int(row[4].replace(",", "")) for row in recipes) == ours
    assert not list(out.glob("*token*"))
    assert example(out, monkeypatch).startswith("import ")


def test_a_tokenizer_that_the_run_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bpe = train_bpe(TEXTS, 300)
    backend = Tokenizer.from_str(bpe)
    size = backend.get_vocab_size()
    run, model = make(tmp_path / "run", size, "bpe:300", bpe)
    assert main(["export", str(run), str(tmp_path / "out|<b>")]) == 0
    out = tmp_path / "out|<b>"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer(TEXTS[5])["input_ids"] == backend.encode(TEXTS[5]).ids
    assert (tokenizer.eos_token_id, len(tokenizer)) == (0, size)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert example(out, monkeypatch).startswith("import ")
    text, facts, recipes = card(out)
    assert "\n# out\\|\\<b\\>\n" in text and facts["device"] == "a \\| \\<device\\>" and "/home" not in text
    assert facts["tokenizer"] == "bpe:300, in this folder"
    assert (facts["steps"], facts["tokens"]) == ("4 of 6", "1,536")
    # Of the checkpoint's step, and not of the end of the run.
    assert facts["training loss"] == f"{5 - 4 / 7:.4f}"
    assert facts["validation loss"] == "4.2500 at step 3"
    assert (facts["ranks"], facts["engine"]) == ("1", "DeepSpeed, ZeRO stage 3")
    # The rates of the start, and not those of the step that was saved, which are half of them.
    assert {(row[1], row[6]) for row in recipes} == {("2", "0.01"), ("0", "0.02")}
    kinds: dict[str, list[int]] = {"0": [0, 0, 0], "2": [0, 0, 0]}
    for name, parameter in model.named_parameters():
        level = "2" if re.search("_proj", name) else "0"
        rows, columns = parameter.shape if parameter.dim() == 2 else (1, parameter.numel())
        moments = 8 * rows * math.ceil(columns / 4) if level == "2" else 8 * parameter.numel()
        kinds[level] = [a + b for a, b in zip(kinds[level], (1, parameter.numel(), moments), strict=True)]
    for row in recipes:
        count, weights, held = kinds[row[1]]
        assert row[2:6] == [f"{count:,}", f"{weights:,}", f"{held:,}", f"{held / (8 * weights):.4f}"]


def test_a_bare_checkpoint_has_a_short_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    extra = {"model_config": model.config.to_dict()}
    gwt_dist.save(tmp_path / "checkpoints", model, GWTAdamW(model.parameters(), level=1), step=3, extra=extra)
    assert main(["export", str(tmp_path / "checkpoints"), str(tmp_path / "out")]) == 0
    _, facts, recipes = card(tmp_path / "out")
    assert set(facts) == {"", "---", "steps", "ranks", "versions"} and facts["steps"] == "3" and not recipes
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("case", ["other", "missing", "damaged", "size", "unknown", "records"])
def test_what_is_not_there_is_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    bpe = train_bpe(TEXTS, 290)
    size = Tokenizer.from_str(bpe).get_vocab_size()
    spec = "nowhere/at-all" if case == "unknown" else "bpe:290"
    broken = "{}" if case == "damaged" else bpe
    run, _ = make(tmp_path / "run", size + (case == "size"), spec, broken)
    if case == "other":
        (run / "tokenizer.json").write_text(train_bpe(TEXTS[:3], 290), encoding="utf-8")
    if case == "missing":
        (run / "tokenizer.json").unlink()
    if case == "records":
        (run / "metrics.jsonl").write_text("{\n{\n")
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    messages = {
        "other": "tokenizer.json is not the tokenizer that the model was trained with",
        "missing": "was trained by the run, and .*tokenizer.json: .*No such file",
        "damaged": "its JSON is none of a tokenizer",
        "size": f"has {size} tokens now, and the model was trained with {size + 1}",
        "unknown": "tokenizer 'nowhere/at-all' is neither 'bytes' nor 'bpe:N'",
        "records": "the card is without the records of the run: .*line 1 is not JSON",
    }
    assert re.search(messages[case], told) and told.count("\n") == 1, told
    _, facts, _ = card(tmp_path / "out")
    if case == "records":
        assert "training loss" not in facts and facts["tokenizer"] == "bpe:290, in this folder"
    else:
        assert facts["tokenizer"] == f"{spec}, not in this folder" and "training loss" in facts
        assert not list((tmp_path / "out").glob("*token*"))

"""Tokens of a study: made once, used while they are whole and of the same text, and a report without the text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gwt_dist.study import prepared
from gwt_dist.study.config import Study, study_from
from gwt_dist.study.prepared import COVERED, TRAIN, VALIDATION, prepare, text_sha256
from gwt_dist.train.corpus import load_corpus
from gwt_dist.train.tokens import encode_stream, load_tokenizer, train_bpe


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i}: naïve words, and words again\n" * 20)
    rows = [{"name": "adamw", "optimizer": "adamw", "lr": [0.004]}]
    values = {"corpus": str(tmp_path / "text"), "tokenizer": "bpe:300", "sequence_length": 16, "eval_tokens": 64}
    return study_from(values | {"rows": rows, "batches": [{"tokens": 64, "steps": 2}]}, "here")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each time that training text is encoded."""
    calls: list[int] = []

    def counted(tokenizer: Any, texts: Any) -> Any:
        calls.append(len(texts))
        return token_stream(tokenizer, texts)

    token_stream = prepared.token_stream
    monkeypatch.setattr(prepared, "token_stream", counted)
    return calls


def test_tokens_are_those_of_the_text_and_made_once(study: Study, tmp_path: Path, made: list[int]) -> None:
    found = prepare(study, tmp_path / "out")
    corpus = load_corpus(study.corpus)
    tokenizer = load_tokenizer("bpe:300", train_bpe(corpus.train, 300))
    assert (found.corpus_sha256, found.vocab_size) == (corpus.sha256, tokenizer.vocab_size)
    ids, _ = encode_stream(tokenizer, corpus.train)
    validation, covered = encode_stream(tokenizer, corpus.validation)
    for name, expected in ((TRAIN, ids), (VALIDATION, validation), (COVERED, covered)):
        array = found.array(name)
        assert type(array) is np.ndarray and array.dtype == np.uint16 and isinstance(array.base, np.memmap)
        np.testing.assert_array_equal(array, expected)
    assert prepare(study, tmp_path / "out") == found and len(made) == 1
    assert prepare(dataclasses.replace(study, name="other", seeds=(5,)), tmp_path / "out") == found and len(made) == 1
    others = [dataclasses.replace(study, tokenizer=name) for name in ("bpe:290", "bytes")]
    assert len({prepare(other, tmp_path / "out").path for other in others} | {found.path}) == len(made) == 3
    assert {path.name[:7] for path in (tmp_path / "out").iterdir()} == {"tokens-", "corpora"}


def test_a_tokenizer_of_the_same_name_that_changed_has_other_tokens(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dataclasses.replace(study, tokenizer="some/folder")
    loaded = [load_tokenizer(f"bpe:{size}", train_bpe(["words and words"], size)) for size in (260, 262)]
    monkeypatch.setattr(prepared, "load_tokenizer", lambda spec: loaded.pop())
    assert [prepare(named, tmp_path / "out").vocab_size for _ in range(2)] == [262, 260]


@pytest.mark.parametrize(
    ("file", "how"),
    [
        (TRAIN, lambda raw: raw[:-2]),
        (TRAIN, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        (COVERED, lambda raw: b""),
        ("prepared.json", lambda raw: raw[: len(raw) // 2]),
        ("prepared.json", lambda raw: b"[]"),
        ("prepared.json", lambda raw: b'{"sha256": {}, "corpus_sha256": "", "vocab_size": 1}'),
        (VALIDATION, None),
        ("tokenizer.json", None),
    ],
)
def test_what_is_damaged_is_made_anew(study: Study, tmp_path: Path, made: list[int], file: str, how: Any) -> None:
    found = prepare(study, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in found.path.iterdir()}
    if how is None:
        (found.path / file).unlink()
    else:
        (found.path / file).write_bytes(how(before[file]))
    assert prepare(study, tmp_path / "out") == found and len(made) == 2
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == before


def test_half_of_it_is_never_seen(
    study: Study, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "encode_stream", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(study, tmp_path / "out")
    (left,) = (tmp_path / "out").iterdir()
    assert not left.name.startswith("tokens-")
    found = prepare(study, tmp_path / "out")
    assert len(made) == 2 and sorted(p.name for p in (tmp_path / "out").iterdir()) == ["corpora.json", found.path.name]


def test_another_text_has_other_tokens_and_a_report_needs_none(study: Study, tmp_path: Path, made: list[int]) -> None:
    out, file = tmp_path / "out", tmp_path / "text" / "0.txt"
    first = prepare(study, out)
    text = file.read_text()
    file.write_text(text + "one line more\n")
    assert text_sha256(study, out) == first.corpus_sha256 != load_corpus(study.corpus).sha256
    second = prepare(study, out)
    assert second.path != first.path and text_sha256(study, out) == second.corpus_sha256
    file.write_text(text)
    assert prepare(study, out) == first and len(made) == 2
    for path in (tmp_path / "text").iterdir():
        path.unlink()
    assert text_sha256(study, out) == first.corpus_sha256
    for damaged in ("", "[]", json.dumps({study.corpus: 1})):
        (out / "corpora.json").write_text(damaged)
        with pytest.raises(ValueError, match="none of them"):
            text_sha256(study, out)

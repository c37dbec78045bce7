"""Tokenizers: every byte of the text is covered by exactly one token."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gwt_dist.train import tokens
from gwt_dist.train.tokens import (
    ByteTokenizer,
    Tokenizer,
    bpe_size,
    encode_stream,
    every_core,
    load_tokenizer,
    token_stream,
    train_bpe,
)

TEXTS = [
    "hello world, hello again\n",
    "naïve café, 漢字 and 🙂🙂\n",
    "",
    "  blanks  \r\n\ttabs",
    "\n",
]


def bpe(size: int = 300) -> Tokenizer:
    return load_tokenizer(f"bpe:{size}", train_bpe(TEXTS * 10, size))


def normalising_backend() -> Any:
    """Lower-cases, splits accents off and drops blanks: text that no token covers."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", "</s>"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def save_pretrained(folder: Path, **tokens: str) -> Path:
    from transformers import PreTrainedTokenizerFast

    build: Any = PreTrainedTokenizerFast
    loaded = build(tokenizer_object=normalising_backend(), **tokens)
    loaded.save_pretrained(str(folder))
    return folder


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    for text, (ids, covered) in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert ids.astype(np.uint8).tobytes().decode("utf-8") == text
        assert covered.tolist() == [1] * len(text.encode("utf-8"))
    assert tokenizer.eos < tokenizer.vocab_size


def test_bpe_covers_every_byte() -> None:
    tokenizer = bpe()
    assert 257 < tokenizer.vocab_size <= 300
    for text, (ids, covered) in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert len(ids) == len(covered)
        assert covered.sum() == len(text.encode("utf-8"))
        assert ids.max(initial=0) < tokenizer.vocab_size


def test_bpe_with_bytes_alone_is_the_byte_tokenizer() -> None:
    ids, covered = encode_stream(bpe(257), ["aé"])
    assert covered.tolist() == [1, 0, 2, 0] or covered.tolist() == [1, 2, 0, 0]
    assert len(ids) == 4


def test_pretrained_folder_covers_every_byte(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_pretrained(tmp_path, eos_token="</s>", unk_token="[UNK]")))
    for text, (ids, covered) in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        if len(ids):
            assert covered.sum() == len(text.encode("utf-8"))
    assert tokenizer.eos == 1
    assert [ids.tolist() for ids in tokenizer.ids(TEXTS)] == [ids.tolist() for ids, _ in tokenizer.encode(TEXTS)]


def test_stream_ends_each_document() -> None:
    ids, covered = encode_stream(ByteTokenizer(), ["ab", "", "c"])
    assert ids.tolist() == [97, 98, 256, 256, 99, 256]
    assert covered.tolist() == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe()], ids=lambda tokenizer: tokenizer.name)
def test_a_stream_in_many_batches_is_the_same(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, covered = encode_stream(tokenizer, TEXTS)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 20)
    for stream in (encode_stream(tokenizer, TEXTS)[0], token_stream(tokenizer, TEXTS)):
        assert stream.dtype == np.uint16 and stream.tolist() == ids.tolist()
    assert covered.sum() == sum(len(text.encode("utf-8")) for text in TEXTS)
    assert len(token_stream(tokenizer, [])) == 0


def test_bytes_that_tokens_cover() -> None:
    # a, é (2 bytes, two tokens), 漢 (3), a blank that no token covers, 🙂 (4), and a rest.
    offsets = [(0, 1), (1, 2), (1, 2), (2, 3), (4, 5), (5, 6)]
    assert tokens._covered_bytes("aé漢 🙂bcd", offsets).tolist() == [1, 2, 0, 3, 5, 3]
    assert tokens._covered_bytes("abc", [(0, 2), (1, 2)]).tolist() == [2, 1]
    assert tokens._covered_bytes("abcde", [(0, 3), (1, 2), (3, 5)]).tolist() == [3, 0, 2]
    assert tokens._covered_bytes("", []).tolist() == []


def test_a_bpe_of_much_text_is_trained_on_a_sample() -> None:
    texts = [f"{i:03d} " * 25 for i in range(100)]
    assert train_bpe(texts, 400) == train_bpe(texts, 400, 10_000)
    part = tokens._sample(texts, 2000)
    assert len(part) == 20 and set(part) < set(texts) and part != texts[:20]
    assert train_bpe(texts, 400, 2000) == train_bpe(part, 400) != train_bpe(texts, 400)
    assert len(tokens._sample(texts, 2001)) == 20 and len(tokens._sample(texts, 1)) == 1


@pytest.mark.parametrize(("before", "after"), [(None, "false"), ("false", "false"), ("true", "true")])
def test_every_core_is_for_a_while(before: str | None, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    with every_core():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ["TOKENIZERS_PARALLELISM"] == after


@pytest.mark.parametrize("spec", ["bpe:many", "bpe:"])
def test_bpe_without_a_number(spec: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        bpe_size(spec)


def test_bpe_too_small() -> None:
    with pytest.raises(ValueError, match="need 257"):
        train_bpe(TEXTS, 100)


def test_unknown_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither 'bytes' nor 'bpe:N'"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_tokenizer_without_an_end_token(tmp_path: Path) -> None:
    folder = save_pretrained(tmp_path, unk_token="[UNK]")
    with pytest.raises(ValueError, match="neither an eos nor a sep token"):
        load_tokenizer(str(folder))

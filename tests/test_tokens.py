"""Tokenizers: every byte of the text is covered by exactly one token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gwt_dist.train.tokens import (
    ByteTokenizer,
    Tokenizer,
    bpe_size,
    encode_stream,
    load_tokenizer,
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


def test_stream_ends_each_document() -> None:
    ids, covered = encode_stream(ByteTokenizer(), ["ab", "", "c"])
    assert ids.tolist() == [97, 98, 256, 256, 99, 256]
    assert covered.tolist() == [1, 1, 0, 0, 1, 0]


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

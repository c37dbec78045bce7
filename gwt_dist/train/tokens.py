"""Tokenizers that know how many bytes of text each token stands for.

Bits per byte compares models with different tokenizers. It is exact here because every encoded
document carries, beside its token ids, the bytes that each token covers; they sum to the length of
the document in UTF-8. An end-of-document token covers no bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[Any]  # uint8, uint16 or uint32
ByteCounts = npt.NDArray[np.uint16]


class Tokenizer(Protocol):
    """Text to token ids. `eos` ends every document; ids are below `vocab_size`."""

    name: str
    vocab_size: int
    eos: int

    def encode(self, texts: Sequence[str]) -> list[tuple[Ids, ByteCounts]]:
        """Ids [n] and the bytes [n] that each covers, for each text, without `eos`."""
        ...


class ByteTokenizer:
    """256 byte values and one end-of-document token; rounded up to an even vocabulary."""

    name = "bytes"
    eos = 256
    vocab_size = 258

    def encode(self, texts: Sequence[str]) -> list[tuple[Ids, ByteCounts]]:
        """Ids [n] uint8 and n ones, for each text."""
        out: list[tuple[Ids, ByteCounts]] = []
        for text in texts:
            ids = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
            out.append((ids, np.ones(len(ids), dtype=np.uint16)))
        return out


class SubwordTokenizer:
    """A `tokenizers.Tokenizer`, loaded by transformers or trained here."""

    def __init__(self, backend: Any, name: str, eos: int) -> None:
        self.backend = backend
        self.name = name
        self.eos = eos
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        backend.no_truncation()
        backend.no_padding()

    def encode(self, texts: Sequence[str]) -> list[tuple[Ids, ByteCounts]]:
        """Ids [n] uint16 or uint32 and the bytes of each, for each text."""
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        out: list[tuple[Ids, ByteCounts]] = []
        for text, code in zip(texts, self.backend.encode_batch(list(texts), add_special_tokens=False), strict=True):
            out.append((np.array(code.ids, dtype=dtype), _covered_bytes(text, code.offsets)))
        return out


def _covered_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> ByteCounts:
    """Bytes from the end of the token before to the end of this one; the last takes the rest.

    Works for any normaliser: tokens that share one character count it once, characters that no
    token covers (stripped blanks) go to the next token.
    """
    if not offsets:
        return np.zeros(0, dtype=np.uint16)
    widths = np.fromiter((len(c.encode("utf-8")) for c in text), dtype=np.int64, count=len(text))
    position = np.concatenate([[0], np.cumsum(widths)])  # bytes before each character
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    ends[-1] = len(text)
    covered: ByteCounts = np.diff(position[np.concatenate([[0], ends])]).astype(np.uint16)
    return covered


def train_bpe(texts: Sequence[str], vocab_size: int) -> str:
    """A byte-level BPE of at most `vocab_size` tokens, as the JSON of a `tokenizers.Tokenizer`.

    Raises:
        ValueError: `vocab_size` cannot hold the 256 bytes and the end token.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"tokenizer 'bpe:{vocab_size}': 256 bytes and an end token need 257")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return str(backend.to_str())


def bpe_size(spec: str) -> int | None:
    """N of 'bpe:N', None for any other tokenizer.

    Raises:
        ValueError: 'bpe:' with something that is no number.
    """
    kind, colon, size = spec.partition(":")
    if kind != "bpe" or not colon:
        return None
    if not size.isdigit():
        raise ValueError(f"tokenizer {spec!r}: expected 'bpe:N' with a whole number N")
    return int(size)


def load_tokenizer(spec: str, trained: str | None = None) -> Tokenizer:
    """The tokenizer that `spec` names; `trained` is the JSON from `train_bpe` where it is a BPE.

    Raises:
        ValueError: transformers cannot load it, it has no end token, or no byte positions.
    """
    # Ranks are processes already; the library's own threads would only warn about forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if spec == "bytes":
        return ByteTokenizer()
    if trained is not None:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(trained)
        return SubwordTokenizer(backend, spec, 0)  # train_bpe puts its end token first
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(spec)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"tokenizer {spec!r} is neither 'bytes' nor 'bpe:N', and transformers cannot load it: {reason}"
        ) from None
    if not loaded.is_fast:
        raise ValueError(
            f"tokenizer {spec!r} has no fast version, so the bytes of a token are unknown and bits "
            "per byte cannot be told; use one with a tokenizer.json"
        )
    eos = loaded.eos_token_id if loaded.eos_token_id is not None else loaded.sep_token_id
    if eos is None:
        raise ValueError(f"tokenizer {spec!r} has neither an eos nor a sep token to end documents")
    return SubwordTokenizer(loaded.backend_tokenizer, spec, eos)


def encode_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Ids, ByteCounts]:
    """All documents in one stream, each followed by `eos`: ids [n] and bytes covered [n]."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    encoded = []
    for first, last in pairwise([*range(0, len(texts), 256), len(texts)]):
        encoded += tokenizer.encode(texts[first:last])
    total = sum(len(ids) + 1 for ids, _ in encoded)
    stream, covered = np.empty(total, dtype=dtype), np.empty(total, dtype=np.uint16)
    position = 0
    for ids, counts in encoded:
        end = position + len(ids)
        stream[position:end], covered[position:end] = ids, counts
        stream[end], covered[end] = tokenizer.eos, 0
        position = end + 1
    return stream, covered

"""Tokenizers that know how many bytes of text each token stands for.

Bits per byte compares models with different tokenizers. It is exact here because every encoded
document carries, beside its token ids, the bytes that each token covers; they sum to the length of
the document in UTF-8. An end-of-document token covers no bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[Any]  # uint8, uint16 or uint32
ByteCounts = npt.NDArray[np.uint16]

BPE_CHARACTERS = 32 * 10**6  # that a BPE is trained on at most: seconds, where all text of all packages takes minutes
BATCH_CHARACTERS = 4 * 10**6  # that are encoded at a time, about 100 bytes of memory for each of their tokens
BPE_END = 0  # id of the end token of a BPE that was trained here: special tokens come first
_PARALLELISM = "TOKENIZERS_PARALLELISM"


class Tokenizer(Protocol):
    """Text to token ids. `eos` ends every document; ids are below `vocab_size`."""

    name: str
    vocab_size: int
    eos: int

    def encode(self, texts: Sequence[str]) -> list[tuple[Ids, ByteCounts]]:
        """Ids [n] and the bytes [n] that each covers, for each text, without `eos`."""
        ...

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of `encode` alone, which is faster."""
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

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Ids [n] uint8, for each text."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]


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
        dtype = _dtype_of(self)
        out: list[tuple[Ids, ByteCounts]] = []
        for text, code in zip(texts, self.backend.encode_batch(list(texts), add_special_tokens=False), strict=True):
            out.append((np.array(code.ids, dtype=dtype), _covered_bytes(text, code.offsets)))
        return out

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Ids [n] uint16 or uint32, for each text; the library leaves out their places in it."""
        codes = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(code.ids, dtype=_dtype_of(self)) for code in codes]


def _dtype_of(tokenizer: Tokenizer) -> Any:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _covered_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> ByteCounts:
    """Bytes from the end of the token before to the end of this one; the last takes the rest.

    Works for any normaliser: tokens that share one character count it once, characters that no
    token covers (stripped blanks) go to the next token.
    """
    if not offsets:
        return np.zeros(0, dtype=np.uint16)
    flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
    ends = np.concatenate([[0], np.maximum.accumulate(flat[1::2])])
    ends[-1] = len(text)
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        # UTF-8 takes one byte more from each of these on (RFC 3629, section 3).
        widths = 1 + sum((points >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
        ends = np.concatenate([[0], np.cumsum(widths)])[ends]
    return np.diff(ends).astype(np.uint16)


@contextlib.contextmanager
def every_core() -> Iterator[None]:
    """Inside, `tokenizers` trains and encodes on all cores; for a process beside which no rank works."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "true"
    try:
        yield
    finally:
        # Not unset: having used its threads, the library would warn about every fork to come.
        os.environ[_PARALLELISM] = before if before is not None else "false"


def train_bpe(texts: Sequence[str], vocab_size: int, characters: int = BPE_CHARACTERS) -> str:
    """A byte-level BPE of at most `vocab_size` tokens, as the JSON of a `tokenizers.Tokenizer`.

    Of more than `characters` in `texts` it is trained on a sample: whole documents, drawn by a fixed seed.

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
    backend.train_from_iterator(_sample(texts, characters), trainer)
    return str(backend.to_str())


def _sample(texts: Sequence[str], characters: int) -> Sequence[str]:
    """All texts, or at least one and no more than `characters` of them, whatever their order."""
    if sum(map(len, texts)) <= characters:
        return texts
    order = np.random.default_rng(0).permutation(len(texts))
    count = int(np.searchsorted(np.cumsum([len(texts[i]) for i in order]), characters, side="right"))
    return [texts[i] for i in order[: max(1, count)]]


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
    os.environ.setdefault(_PARALLELISM, "false")
    if spec == "bytes":
        return ByteTokenizer()
    if trained is not None:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(trained)
        return SubwordTokenizer(backend, spec, BPE_END)
    loaded = _loaded(spec)
    eos = loaded.eos_token_id if loaded.eos_token_id is not None else loaded.sep_token_id
    if eos is None:
        raise ValueError(f"tokenizer {spec!r} has neither an eos nor a sep token to end documents")
    return SubwordTokenizer(loaded.backend_tokenizer, spec, eos)


def _loaded(spec: str, **keywords: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(spec, **keywords)
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
    return loaded


def save_tokenizer(folder: Path, spec: str, vocab_size: int, trained: str | None = None) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` loads as the tokenizer that `spec` names, not 'bytes'.

    Nothing is fetched: a name is looked up in the cache of transformers, where the run had it.

    Args:
        folder: Where its files go.
        spec: As in `load_tokenizer`.
        vocab_size: The number of tokens that the model was trained with.
        trained: The JSON from `train_bpe` where it is a BPE.

    Raises:
        ValueError: it is not there, is damaged, or has another number of tokens. Nothing was written.
    """
    if trained is None:
        loaded = _loaded(spec, local_files_only=True)
    else:
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        fast: Any = PreTrainedTokenizerFast
        try:
            backend = Backend.from_str(trained)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer {spec!r}: its JSON is none of a tokenizer: {error}") from None
        loaded = fast(tokenizer_object=backend, eos_token=backend.id_to_token(BPE_END))
    found = loaded.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    if found != vocab_size:
        raise ValueError(f"tokenizer {spec!r} has {found} tokens now, and the model was trained with {vocab_size}")
    loaded.save_pretrained(folder)


def encode_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Ids, ByteCounts]:
    """All documents in one stream, each followed by `eos`: ids [n] and bytes covered [n]."""
    encoded = [pair for batch in _in_batches(texts) for pair in tokenizer.encode(batch)]
    stream = _joined([ids for ids, _ in encoded], tokenizer.eos, _dtype_of(tokenizer))
    return stream, _joined([counts for _, counts in encoded], 0, np.uint16)


def token_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
    """The ids [n] of `encode_stream` alone: for training text, of which nobody asks how many bytes a token covers."""
    parts = (ids for batch in _in_batches(texts) for ids in tokenizer.ids(batch))
    return _joined(parts, tokenizer.eos, _dtype_of(tokenizer))


def _in_batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    first, characters = 0, 0
    for last, text in enumerate(texts, start=1):
        characters += len(text)
        if characters >= BATCH_CHARACTERS or last == len(texts):
            yield texts[first:last]
            first, characters = last, 0


def _joined(parts: Iterable[npt.NDArray[Any]], end: int, dtype: Any) -> npt.NDArray[Any]:
    """All `parts` in one array of `dtype`, each followed by `end`."""
    kept = list(parts)
    out = np.empty(sum(len(part) + 1 for part in kept), dtype=dtype)
    position = 0
    for part in kept:
        out[position : position + len(part)] = part
        position += len(part) + 1
        out[position - 1] = end
    return out

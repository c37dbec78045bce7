"""Text of a study as tokens in files, made once: all workers, and later calls, map them into memory.

A folder `tokens-KEY` in the output of the study holds `train.npy` and `validation.npy` (ids [n], uint16 or uint32),
`covered.npy` (bytes that each validation token stands for [n], uint16), `tokenizer.json` (unless tokens are bytes) and
`prepared.json`, which has the SHA-256 of the other files. Beside it `corpora.json` has the SHA-256 of each corpus as it
was last prepared, so that a report needs neither the text nor the tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gwt_dist.study.config import Study
from gwt_dist.train.corpus import Corpus, load_corpus
from gwt_dist.train.tokens import (
    ByteCounts,
    Ids,
    SubwordTokenizer,
    Tokenizer,
    bpe_size,
    encode_stream,
    every_core,
    load_tokenizer,
    token_stream,
    train_bpe,
)

FORMAT = 1  # of the files; another makes other keys
CORPORA = "corpora.json"
TRAIN, VALIDATION, COVERED = "train.npy", "validation.npy", "covered.npy"
_TOKENIZER, _RECORD = "tokenizer.json", "prepared.json"
_UNFINISHED = "unfinished-"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A complete folder of tokens: `corpus_sha256` of its text, `vocab_size` of its tokenizer."""

    path: Path
    corpus_sha256: str
    vocab_size: int

    def array(self, name: str) -> Any:
        """The array [n] in `name`, mapped and not read; slices of it are plain arrays.

        Raises:
            ValueError: it is no such file.
            OSError: it cannot be opened.
        """
        return np.asarray(np.load(self.path / name, mmap_mode="r"))


def prepare(study: Study, folder: Path) -> Prepared:
    """The tokens of `study` in `folder`. Reads the text; tokens that are there already are used if they are whole and
    of the same text and tokenizer, and else made anew. One process at a time may do so.

    Raises:
        ValueError: the text or the tokenizer is not to be had, or what is written cannot be read again.
    """
    with every_core():
        corpus = load_corpus(study.corpus)
        size = bpe_size(study.tokenizer)
        # A BPE follows from its size and the text, and takes minutes: only where there are no tokens of it.
        tokenizer = load_tokenizer(study.tokenizer) if size is None else None
        path = folder / f"tokens-{_key(study, corpus, tokenizer)}"
        found = _whole(path)
        if found is None:
            if size is not None:
                tokenizer = load_tokenizer(study.tokenizer, train_bpe(corpus.train, size))
            assert tokenizer is not None
            _make(path, corpus, tokenizer)
            found = _whole(path)
    if found is None:
        raise ValueError(
            f"the tokens in {path} are not those that were just written there, and runs would train on something else; "
            "look for a failing disk, or give --output another folder"
        )
    known = _corpora(folder)
    if known.get(study.corpus) != corpus.sha256:
        _write_whole(folder / CORPORA, json.dumps(known | {study.corpus: corpus.sha256}, indent=1))
    return found


def text_sha256(study: Study, folder: Path) -> str:
    """SHA-256 of the text that `study` was last prepared with in `folder`, or else of the text as it is now.

    Raises:
        ValueError: it was not prepared there, and the text is not to be had.
    """
    return _corpora(folder).get(study.corpus) or load_corpus(study.corpus).sha256


def _key(study: Study, corpus: Corpus, tokenizer: Tokenizer | None) -> str:
    # What a name or a folder stands for may change: the key holds what was loaded.
    content = tokenizer.backend.to_str() if isinstance(tokenizer, SubwordTokenizer) else ""
    text = json.dumps([FORMAT, study.corpus, corpus.sha256, study.tokenizer, content])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _make(path: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Write the folder `path` under another name, and give it its own when all of it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in (path, *path.parent.glob(f"{_UNFINISHED}*")):  # damaged, and of processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    unfinished = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
    unfinished.mkdir()
    arrays: dict[str, Ids | ByteCounts] = {TRAIN: token_stream(tokenizer, corpus.train)}
    arrays[VALIDATION], arrays[COVERED] = encode_stream(tokenizer, corpus.validation)
    for name, array in arrays.items():
        np.save(unfinished / name, array)
    if isinstance(tokenizer, SubwordTokenizer):
        (unfinished / _TOKENIZER).write_text(tokenizer.backend.to_str(), encoding="utf-8")
    record = {
        "corpus": corpus.source,
        "corpus_sha256": corpus.sha256,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "tokens": {name: len(array) for name, array in arrays.items()},
        "sha256": {file.name: _sha256(file) for file in sorted(unfinished.iterdir())},
    }
    _write_whole(unfinished / _RECORD, json.dumps(record, indent=1))
    for file in unfinished.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    unfinished.rename(path)


def _whole(path: Path) -> Prepared | None:
    """What is in `path` if each of its files is as it was written, else None."""
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        if not {TRAIN, VALIDATION, COVERED} <= set(record["sha256"]):
            return None
        if any(_sha256(path / name) != written for name, written in record["sha256"].items()):
            return None
        return Prepared(path, record["corpus_sha256"], int(record["vocab_size"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _corpora(folder: Path) -> dict[str, str]:
    """SHA-256 by corpus; of a file that is not there or cannot be read nothing, and the text is read instead."""
    try:
        found = json.loads((folder / CORPORA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, Mapping) else {}


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)

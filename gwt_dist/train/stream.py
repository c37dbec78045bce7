"""Text that is streamed from a `datasets` name, each rank its share, and resumed exactly on as many ranks.

`datasets` can resume a stream, but not its own shuffle buffer, so documents are shuffled here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gwt_dist.train.batches import Batch
from gwt_dist.train.corpus import Corpus, in_validation
from gwt_dist.train.tokens import Tokenizer


def open_stream(spec: str) -> tuple[Any, Any | None]:
    """The 'train' split of 'owner/name' or 'owner/name:config', and 'validation' if it has one.

    Returns:
        `datasets.IterableDataset` objects, not yet divided between ranks.

    Raises:
        ValueError: it cannot be loaded, has no 'train' split, or no "text" in its documents.
    """
    import datasets

    name, _, config = spec.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"corpus {spec!r} is no file or folder here, and as a dataset it cannot be loaded: {reason}"
        ) from None
    if "train" not in splits:
        raise ValueError(f"dataset {spec!r} has no split 'train', only {', '.join(splits)}")
    return splits["train"], splits.get("validation")


def validation_documents(spec: str, train: Any, validation: Any | None, characters: int) -> Corpus:
    """The first validation documents, of `characters` or more in all, as a corpus without training
    text; its `sha256` covers the name of the dataset and these documents.

    Without a validation split they are those of `train` that `held_out` keeps from training.
    """
    source = validation if validation is not None else train
    texts: list[str] = []
    length = 0
    for record in source:
        text = document(record, spec)
        if validation is not None or held_out(text):
            texts.append(text)
            length += len(text)
            if length >= characters:
                break
    digest = hashlib.sha256(spec.encode("utf-8"))
    for text in texts:
        digest.update(text.encode("utf-8"))
    return Corpus(source=spec, train=(), validation=tuple(texts), sha256=digest.hexdigest())


def document(record: dict[str, Any], spec: str) -> str:
    """The text of one record. Raises ValueError if it has none."""
    text = record.get("text")
    if not isinstance(text, str):
        raise ValueError(f"dataset {spec!r} has no text column 'text', only {', '.join(map(repr, record))}")
    return text


def held_out(text: str) -> bool:
    """Whether a document without a name belongs to validation, by the hash of its start."""
    return in_validation(text[:1000])


class StreamedBatches:
    """Batches from one rank's share of a streamed dataset. So many documents at a time are read and shuffled.

    The place in it is where the documents in hand begin, and how many of them are used: going on reads them once more,
    so that a checkpoint holds no text.

    Args:
        dataset: `datasets.IterableDataset`, already divided by `split_dataset_by_node`.
        spec: its name, for errors.
        buffer: documents that are shuffled together.
        skip_held_out: leave out the documents that validation uses.
    """

    def __init__(
        self,
        dataset: Any,
        spec: str,
        tokenizer: Tokenizer,
        length: int,
        *,
        micro: int,
        seed: int,
        buffer: int,
        skip_held_out: bool,
    ) -> None:
        self._dataset, self._spec, self._tokenizer = dataset, spec, tokenizer
        self._length, self._micro = length, micro
        self._size, self._skip_held_out, self._seed = buffer, skip_held_out, seed
        self._epoch, self._number = 0, -1  # of the documents in hand
        self._in_hand: list[str] = []
        self._used = 0
        self._pending: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._source = self._documents()
        self._start = self._position()

    def batch(self, step: int, micro_step: int) -> Batch:
        """The next tokens [micro, length + 1]; the arguments are not used, the order is."""
        return np.stack([self._window() for _ in range(self._micro)])

    def state_dict(self) -> dict[str, Any]:
        """Where the documents in hand begin, how many of them are used, and the tokens left over; JSON."""
        return {"start": self._start, "used": self._used, "pending": self._pending.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._start = state["start"]
        self._epoch, self._number = self._start["epoch"], self._start["number"]
        self._dataset.set_epoch(self._epoch)
        self._dataset.load_state_dict(self._start["dataset"])
        self._source = self._documents()
        self._in_hand, self._used = [], state["used"]
        if self._used:
            self._read()
        self._pending = np.array(state["pending"], dtype=np.int64)

    def _position(self) -> dict[str, Any]:
        return {"dataset": self._dataset.state_dict(), "epoch": self._epoch, "number": self._number}

    def _read(self) -> None:
        """The next documents, in an order drawn from (seed, how many such before)."""
        self._number += 1
        documents = [next(self._source) for _ in range(self._size)]
        order = np.random.default_rng([self._seed, self._number]).permutation(self._size)
        self._in_hand = [documents[i] for i in order]

    def _next(self) -> str:
        if self._used == len(self._in_hand):
            self._start, self._used = self._position(), 0
            self._read()
        self._used += 1
        return self._in_hand[self._used - 1]

    def _documents(self) -> Iterator[str]:
        """Documents for ever, epoch after epoch."""
        while True:
            found = False
            for record in self._dataset:
                text = document(record, self._spec)
                found = True
                if text and not (self._skip_held_out and held_out(text)):
                    yield text
            if not found:
                raise ValueError(f"dataset {self._spec!r} has no documents for this rank; use fewer ranks")
            self._epoch += 1
            self._dataset.set_epoch(self._epoch)

    def _window(self) -> npt.NDArray[np.int64]:
        while len(self._pending) <= self._length:
            (ids,) = self._tokenizer.ids([self._next()])
            end = np.array([self._tokenizer.eos])
            self._pending = np.concatenate([self._pending, ids, end]).astype(np.int64)
        window = self._pending[: self._length + 1]
        self._pending = self._pending[self._length :]
        return window

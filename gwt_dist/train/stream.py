"""Text that is streamed from a `datasets` name, each rank its share, and resumed exactly.

`datasets` can resume a stream, but not its own shuffle buffer. The buffer is therefore kept here
and goes into the checkpoint with the position of the stream and the tokens not used yet.
"""

from __future__ import annotations

import hashlib
import random
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
    """Batches from one rank's share of a streamed dataset, documents shuffled in a buffer.

    Args:
        dataset: `datasets.IterableDataset`, already divided by `split_dataset_by_node`.
        spec: its name, for errors.
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
        self._buffer_size, self._skip_held_out = buffer, skip_held_out
        self._random = random.Random(seed)
        self._buffer: list[str] = []
        self._pending: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._epoch = 0
        self._source = self._documents()

    def batch(self, step: int, micro_step: int) -> Batch:
        """The next tokens [micro, length + 1]; the arguments are not used, the order is."""
        return np.stack([self._window() for _ in range(self._micro)])

    def state_dict(self) -> dict[str, Any]:
        """Position of the stream, shuffle buffer, its random state, and the tokens left over."""
        return {
            "dataset": self._dataset.state_dict(),
            "epoch": self._epoch,
            "buffer": list(self._buffer),
            "random": self._random.getstate(),
            "pending": self._pending.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._epoch = state["epoch"]
        self._dataset.set_epoch(self._epoch)
        self._dataset.load_state_dict(state["dataset"])
        self._buffer = list(state["buffer"])
        self._random.setstate(state["random"])
        self._pending = np.array(state["pending"], dtype=np.int64)
        self._source = self._documents()

    def _documents(self) -> Iterator[str]:
        """Documents for ever, epoch after epoch."""
        while True:
            found = False
            for record in self._dataset:
                text = document(record, self._spec)
                found = True
                if text and not (self._skip_held_out and held_out(text)):
                    yield text
            if not found and not self._buffer:
                raise ValueError(f"dataset {self._spec!r} has no documents for this rank; use fewer ranks")
            self._epoch += 1
            self._dataset.set_epoch(self._epoch)

    def _window(self) -> npt.NDArray[np.int64]:
        while len(self._pending) <= self._length:
            while len(self._buffer) < self._buffer_size:
                self._buffer.append(next(self._source))
            place = self._random.randrange(len(self._buffer))
            text, self._buffer[place] = self._buffer[place], self._buffer[-1]
            self._buffer.pop()
            ids, _ = self._tokenizer.encode([text])[0]
            end = np.array([self._tokenizer.eos])
            self._pending = np.concatenate([self._pending, ids, end]).astype(np.int64)
        window = self._pending[: self._length + 1]
        self._pending = self._pending[self._length :]
        return window

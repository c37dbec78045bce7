"""The order of the data: a pure function, shared out alike for any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gwt_dist.train import stream
from gwt_dist.train.batches import ShuffledBatches, Validation, checksum
from gwt_dist.train.ds_config import BatchSizes
from gwt_dist.train.tokens import ByteTokenizer

LENGTH = 4
TOKENS = np.arange(24 * LENGTH + 1, dtype=np.uint16)  # 24 windows
COVERED = np.arange(len(TOKENS), dtype=np.uint16) % 5


def batches(world_size: int, rank: int, accumulation: int = 1, seed: int = 0) -> ShuffledBatches:
    sizes = BatchSizes(train=12, micro=12 // accumulation // world_size, accumulation=accumulation)
    return ShuffledBatches(TOKENS, LENGTH, sizes, rank=rank, seed=seed)


def first_tokens(world_size: int, accumulation: int, step: int) -> list[int]:
    return [
        int(window[0])
        for rank in range(world_size)
        for micro_step in range(accumulation)
        for window in batches(world_size, rank, accumulation).batch(step, micro_step)
    ]


@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_a_step_takes_the_same_windows_for_any_ranks_and_accumulation(step: int) -> None:
    expected = first_tokens(1, 1, step)
    for world_size, accumulation in ((1, 3), (2, 1), (2, 3), (3, 4)):
        assert first_tokens(world_size, accumulation, step) == expected


def test_batch_depends_on_its_arguments_alone() -> None:
    used = batches(2, 1)
    for step in (5, 0, 3):
        used.batch(step, 0)
    assert np.array_equal(used.batch(4, 0), batches(2, 1).batch(4, 0))


def test_a_checksum_is_that_of_the_windows_whoever_has_them() -> None:
    def of_step(step: int, world_size: int, accumulation: int) -> int:
        own = [batches(world_size, rank, accumulation) for rank in range(world_size)]
        return sum(checksum(one.batch(step, micro_step)) for one in own for micro_step in range(accumulation))

    assert of_step(3, 1, 1) == of_step(3, 2, 3) == of_step(3, 3, 2)
    assert len({of_step(step, 2, 1) for step in range(20)}) == 20


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order() -> None:
    epochs = [first_tokens(1, 1, 2 * e) + first_tokens(1, 1, 2 * e + 1) for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 24 * LENGTH, LENGTH))
    assert epochs[0] != epochs[1]


def test_seeds_differ() -> None:
    assert not np.array_equal(batches(1, 0).batch(0, 0), batches(1, 0, seed=1).batch(0, 0))


def test_windows_overlap_by_the_token_that_is_only_input() -> None:
    window = batches(1, 0).batch(0, 0)[0]
    assert window.tolist() == list(range(window[0], window[0] + LENGTH + 1))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_validation_is_the_same_for_any_number_of_ranks(world_size: int, micro: int) -> None:
    validation = Validation(TOKENS, COVERED, LENGTH, eval_tokens=7 * LENGTH)
    seen: dict[int, int] = {}
    numbers_of_batches = set()
    for rank in range(world_size):
        own = list(validation.batches(rank, world_size, micro))
        numbers_of_batches.add(len(own))
        for batch in own:
            assert batch.tokens.shape == (micro, LENGTH + 1)
            for window, counted, size in zip(batch.tokens, batch.counted, batch.text_bytes, strict=True):
                if counted:
                    assert int(window[0]) not in seen
                    seen[int(window[0])] = int(size)
                    assert size == COVERED[window[1:]].sum()
    assert len(numbers_of_batches) == 1
    assert len(seen) == validation.windows == 7
    assert max(seen) > len(TOKENS) // 2  # spread over the text, not its start


def test_text_shorter_than_a_sequence() -> None:
    sizes = BatchSizes(train=1, micro=1, accumulation=1)
    with pytest.raises(ValueError, match="training text has 4 tokens, one sequence of 4 needs 5"):
        ShuffledBatches(TOKENS[:4], LENGTH, sizes, rank=0, seed=0)
    with pytest.raises(ValueError, match="validation text has 4 tokens"):
        Validation(TOKENS[:4], COVERED[:4], LENGTH, eval_tokens=8)


def streamed(folder: Path, rank: int = 0, world_size: int = 2, buffer: int = 5) -> Any:
    import datasets
    from datasets.distributed import split_dataset_by_node

    files = []
    for part in range(2):
        path = folder / f"part{part}.txt"
        path.write_text("".join(f"{part}-{i:03d}\n" for i in range(40)), encoding="utf-8")
        files.append(str(path))
    dataset = datasets.load_dataset(
        "text", data_files=files, split="train", streaming=True, cache_dir=str(folder / "cache")
    )
    return stream.StreamedBatches(
        split_dataset_by_node(dataset, rank=rank, world_size=world_size),
        "a/b",
        ByteTokenizer(),
        6,
        micro=2,
        seed=rank,
        buffer=buffer,
        skip_held_out=True,
    )


def test_streamed_batches_resume_with_the_same_next_batch(tmp_path: Path) -> None:
    through = streamed(tmp_path)
    expected = [through.batch(step, 0) for step in range(60)]  # several epochs of one rank's share
    for stop in (0, 1, 7, 31):
        first = streamed(tmp_path)
        for step in range(stop):
            first.batch(step, 0)
        resumed = streamed(tmp_path)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = [resumed.batch(step, 0) for step in range(stop, 60)]
        assert all(np.array_equal(a, b) for a, b in zip(rest, expected[stop:], strict=True)), stop


def test_streamed_shares_do_not_overlap_and_leave_validation_out(tmp_path: Path) -> None:
    texts = []
    for rank in range(2):
        tokens = np.concatenate([streamed(tmp_path, rank).batch(i, 0)[:, :-1] for i in range(15)])
        text = "".join(chr(t) if t < 256 else "|" for t in tokens.flatten())
        texts.append(set(text.split("|")[1:-1]))
    assert texts[0] and texts[1] and not texts[0] & texts[1]
    assert not any(stream.held_out(text) for text in texts[0] | texts[1])


def test_validation_of_a_stream() -> None:
    train = [{"text": f"document {i}"} for i in range(200)]
    of_train = stream.validation_documents("a/b", train, None, characters=30)
    assert of_train.validation and all(stream.held_out(t) for t in of_train.validation)
    given = stream.validation_documents("a/b", train, [{"text": "x" * 40}] * 3, characters=30)
    assert given.validation == ("x" * 40,)
    assert given.sha256 != of_train.sha256


def test_stream_without_text() -> None:
    with pytest.raises(ValueError, match="no text column 'text', only 'content'"):
        stream.validation_documents("a/b", [{"content": "x"}], None, characters=1)


def test_dataset_that_cannot_be_loaded() -> None:
    with pytest.raises(ValueError, match="as a dataset it cannot be loaded"):
        stream.open_stream("nobody/nothing-at-all")

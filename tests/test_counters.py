"""Counters of steps and micro-batches: restored so that a run goes on, whatever ranks and accumulation took it over."""

from __future__ import annotations

import pytest

from counter_cases import load_case, save_case, size_of

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")

# Ranks, accumulation, sequences of a micro-batch: 12 and 15 sequences a step.
SAVED = [(1, 6, 2), (2, 2, 3), (3, 4, 1), (1, 5, 3), (3, 5, 1)]
LOADED = [(1, 6, 2), (1, 4, 3), (1, 5, 3), (2, 6, 1), (2, 3, 2), (2, 2, 3), (3, 4, 1), (3, 2, 2), (3, 5, 1)]


def test_any_step_goes_on_with_any_accumulation(ranks, tmp_path) -> None:
    """Each of seven saved steps, under ZeRO-2 and 3, on 1 to 3 ranks with accumulations of 1 to 6."""
    for world in (1, 2, 3):
        for errors in ranks(world, save_case, str(tmp_path), [one for one in SAVED if one[0] == world], timeout=120):
            assert max(errors) < 2e-3
    for world in (1, 2, 3):
        runs = [one for one in LOADED if one[0] == world]
        for results in ranks(world, load_case, str(tmp_path), SAVED, runs, timeout=120):
            for (by, sizes, step), (error, counted) in results.items():
                done = step + 2
                assert error < 2e-3, f"{by} saved at step {step}, {sizes}: {error:.1%} of the update off"
                assert counted == [done, done * sizes[1], done * size_of(sizes)]

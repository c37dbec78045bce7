"""The curve of a run: one line of `metrics.jsonl` per logged step, and the same for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What another run of the same settings, or the same run resumed, has different in its lines: all else is the same.
TIMINGS = ("tokens_per_second", "seconds")
# The keys of `seconds`, in the order of a step. "engine" is what DeepSpeed's step does around the optimizer: clipping,
# gathering weights.
PHASES = ("first step", "data", "forward", "backward", "optimizer", "engine", "evaluation", "checkpoint", "other")
FORMAT = 1  # of run.json, metrics.jsonl and summary.json, raised when a reader of the one before would go wrong


def read_metrics(path: Path, up_to_step: int | None = None) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`, those after `up_to_step` left out; none if there is no file.

    A last line that was cut off when the run was killed is dropped.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if up_to_step is None or row["step"] <= up_to_step:
            rows.append(row)
    return rows


class Metrics:
    """Writer of rank 0; on other ranks, or with `enabled=False`, it writes nothing.

    Args:
        folder: The run folder, which exists.
        inherited: Lines of the run that this one goes on from; they replace what the file holds,
            so that a resumed run leaves one curve. The new file is complete before it takes the
            place of the old one.
        start_step: Steps done already; TensorBoard hides what it has beyond them.
    """

    def __init__(self, folder: Path, inherited: list[dict[str, Any]], start_step: int, *, enabled: bool) -> None:
        self._enabled = enabled
        if not enabled:
            return
        # Imported late: it takes a second that only rank 0 needs to spend.
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        fresh = folder / "metrics.jsonl.new"
        fresh.write_text("".join(json.dumps(row) + "\n" for row in inherited), encoding="utf-8")
        os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, **values: float | int | str | Mapping[str, float] | None) -> None:
        """One line with `step` and `values`, on disk when this returns; text is not for TensorBoard."""
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            parts = (
                {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
            )
            for tag, number in parts.items():
                if isinstance(number, int | float):
                    self._board.add_scalar(tag, number, step)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._enabled:
            self._file.close()
            self._board.close()

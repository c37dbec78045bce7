"""`load`: find what this rank needs, check all of it on all ranks, and only then change anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gwt_dist.checkpoint import folder, random_states, schedules, together
from gwt_dist.checkpoint.files import Reader
from gwt_dist.checkpoint.fit import Fit, check
from gwt_dist.checkpoint.format import WEIGHT, CheckpointError, Chunk, Index, Stored
from gwt_dist.checkpoint.holdings import Holding, Run
from gwt_dist.declare import Extent
from gwt_dist.engines.weights import check_boundary, set_counters
from gwt_dist.layout import Overlap


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` found beside the state that it put back."""

    step: int  # optimizer steps done
    extra: Any  # what `save` was given
    folder: Path
    random_restored: bool  # whether this rank's number had random states in the checkpoint


@dataclass(slots=True)
class _Task:
    """A chunk that this rank needs, and where it goes."""

    what: str
    stored: Stored
    chunk: Chunk
    places: list[tuple[Tensor, Overlap]]


def load(
    path: str | Path,
    model: Any,
    optimizer: Any,
    *,
    which: str | int = "latest",
    scheduler: Any = None,
    restore_random: bool = True,
) -> Loaded:
    """Put a checkpoint into a model and its optimizer, under any engine and number of ranks. A collective.

    Each rank reads what it needs and no more, in chunks of at most 16 MiB. First all ranks check that everything fits
    and that the checksum of every chunk is right; if that fails on any rank, all raise and nothing was changed.

    Weights are stored in the precision of the engine that saved them: fp32 masters where it had some. They are cast to
    what is here: masters become bf16 weights by rounding, bf16 weights become masters as they are. Options of the
    parameter groups (``lr`` and the like) become the saved ones, as with torch's ``load_state_dict``; ``level``,
    ``wavelet`` and the recipe must be the same already. A rank takes the random states of its own number; one whose
    number the saved run did not have keeps those that it has.

    Args:
        path: Folder of the run's checkpoints, as given to `save`.
        model: The model as it is wrapped, or the DeepSpeed engine; attached, where the engine needs it.
        optimizer: Its `GWTAdamW`, or any wrapper that holds it.
        which: ``"latest"``, a step, or the name of a folder in `path`.
        scheduler: The learning-rate schedule that goes on, of the class that was saved: what was given to `save`, or
            that of a DeepSpeed engine, whichever the checkpoint has. An engine's own need not be given. False leaves
            all schedules as they are, those in the checkpoint too.
        restore_random: Whether to take the random states.

    Raises:
        CheckpointError: On all ranks, if anything is missing, damaged, from a newer version, or does not fit this model
            and optimizer (the message names the file or the tensor), if a schedule would get no state or a state no
            schedule, or if gradients are accumulated for a step that is not done.
    """
    place, sha256 = together.from_rank_0(lambda: _found(Path(path), which))
    where = Path(place)
    index = together.each(lambda: folder.read_index(where, sha256))
    run = together.each(lambda: Run(model, optimizer))
    together.each(lambda: check_boundary(model, run.optimizer, "load"))
    fit = together.each(lambda: check(index, run, str(where)))
    takers = together.each(lambda: schedules.takers(index, run, scheduler, str(where)))
    tasks = together.each(lambda: _tasks(index, run, fit))
    states = index.random.get(together.rank(), {}) if restore_random else {}
    random = together.each(lambda: _random(where, index, states))
    together.each(lambda: _verify(where, index, tasks))
    together.each(lambda: schedules.attempt(takers, run))
    try:
        together.each(lambda: _commit(where, index, run, fit, tasks, takers))
        if random:
            random_states.restore(random)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. It had been checked, so something changed meanwhile; model and optimizer now hold parts of two "
            f"states: load again before going on"
        ) from error
    return Loaded(index.step, index.extra, where, bool(states))


def _found(path: Path, which: str | int) -> tuple[str, str]:
    place, sha256 = folder.find(path, which)
    return str(place), sha256


def _tasks(index: Index, run: Run, fit: Fit) -> list[_Task]:
    """Every chunk of which this rank needs anything, in the order of the files."""
    tasks: dict[Chunk, _Task] = {}
    for holding in _holdings(run, fit):
        name = holding.fragment.fqn
        stored = index.tensors[name].parts[holding.kind]
        if stored.shape != holding.fragment.shape:
            raise CheckpointError(
                f"{holding.kind} of {name!r} has shape {stored.shape} in the checkpoint and "
                f"{holding.fragment.shape} here"
            )
        for chunk in stored.chunks:
            overlaps = chunk.fragment.intersect(holding.fragment)
            if overlaps:
                task = tasks.setdefault(chunk, _Task(f"{holding.kind} of {name!r},", stored, chunk, []))
                task.places += [(holding.buffer, overlap) for overlap in overlaps]
    return sorted(tasks.values(), key=lambda task: (task.chunk.file, task.chunk.offset))


def _holdings(run: Run, fit: Fit) -> Iterator[Holding]:
    """All that is to be filled: weights, masters and other copies of weights, state."""
    weights = run.weights
    yield from run.weight_holdings([*weights.model, *weights.copies, *weights.masters], WEIGHT)
    for one, state in fit.states:
        if state is not None:
            yield from run.state_holdings(one, state)


def _random(where: Path, index: Index, states: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The random states of this rank, which are small, in memory and checked."""
    with Reader(where, index.files) as reader:
        found = {kind: reader.whole(stored, f"the {kind} random state,") for kind, stored in states.items()}
    if found:
        random_states.check(found)
    return found


def _verify(where: Path, index: Index, tasks: list[_Task]) -> None:
    with Reader(where, index.files) as reader:
        for task in tasks:
            reader.verify(task.stored, task.chunk, task.what)


def _commit(
    where: Path, index: Index, run: Run, fit: Fit, tasks: list[_Task], takers: Sequence[schedules.Taker]
) -> None:
    schedules.restore(takers)
    set_counters(run.model, index.engine, index.step)
    with Reader(where, index.files) as reader:
        for task in tasks:
            reader.read(task.stored, task.chunk, task.places)
    for one, state in fit.states:
        if state is None:
            run.optimizer.state.pop(one.parameter, None)
            continue
        entries = [index.tensors[name] for name in one.names]
        assert entries[0].step is not None
        state["step"].fill_(float(entries[0].step))
        for field in one.plan.fields:
            if field.extent is Extent.TENSOR:  # 0 for the tensors that have none
                values = [entry.numbers.get(field.name, 0.0) for entry in entries]
                state[field.name].view(-1).copy_(torch.tensor(values, dtype=torch.float64))
        run.optimizer.state[one.parameter].update(state)
    for groups in run.groups:
        for group, options in zip(groups, fit.options, strict=True):
            for key, value in options.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value

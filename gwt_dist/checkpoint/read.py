"""`load`: find what this rank needs, check all of it on all ranks, and only then change anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gwt_dist.checkpoint import folder, random_states, schedules
from gwt_dist.checkpoint.elements import are_distinct, can_take, put
from gwt_dist.checkpoint.files import Reader
from gwt_dist.checkpoint.fit import Fit, check
from gwt_dist.checkpoint.format import WEIGHT, CheckpointError, Chunk, Index, Stored
from gwt_dist.checkpoint.holdings import Holding, Run, weight_holdings, weights_of
from gwt_dist.checkpoint.match import Left, Match, match, tell
from gwt_dist.checkpoint.together import Together
from gwt_dist.declare import Extent
from gwt_dist.engines.weights import Weights, check_boundary, set_counters
from gwt_dist.layout import Overlap


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` found beside the state that it put back.

    Attributes:
        step: Optimizer steps done.
        extra: What `save` was given.
        folder: The folder of the checkpoint.
        random_restored: Whether this rank's number had random states in the checkpoint.
        left: Tensors that it did not touch.
    """

    step: int
    extra: Any
    folder: Path
    random_restored: bool
    left: Left


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
    optimizer: Any = None,
    *,
    which: str | int = "latest",
    scheduler: Any = None,
    restore_random: bool = True,
    weights_only: bool = False,
    strict: bool = True,
    convert_state: bool = False,
    process_group: ProcessGroup | None = None,
) -> Loaded:
    """Put a checkpoint into a model and its optimizer, under any engine and number of ranks. A collective.

    Each rank reads what it needs and no more, in chunks of at most 16 MiB. First all ranks check that everything fits
    and that the checksum of every chunk is right; if that fails on any rank, all raise and nothing was changed.

    Weights are stored in the precision of the engine that saved them: fp32 masters where it had some. They are cast to
    what is here: masters become bf16 weights by rounding, bf16 weights become masters as they are. Options of the
    parameter groups (``lr`` and the like) become the saved ones, as with torch's ``load_state_dict``; ``level``,
    ``wavelet``, ``state_dtype`` and the recipe must be the same already. ``stochastic_rounding`` is taken only where
    weights are bf16 without masters, then and now. A rank takes the random states of its own number; one whose
    number the saved run did not have keeps those that it has.

    What the save left out (``exclude=``) must be in the model, in the shape that it had, and stays as it is there.

    With `weights_only` it is a start from the weights: parameters, their masters here and persistent buffers, from any
    checkpoint, whatever optimizer, recipe, levels and groups there were and are. The optimizer is left as it is, with
    the state and options that it has; so are schedules, counters of an engine and random states.

    Args:
        path: Folder of the run's checkpoints, as given to `save`.
        model: The model as it is wrapped, or the DeepSpeed engine; attached, where the engine needs it.
        optimizer: Its `GWTAdamW`, or any wrapper that holds it. With `weights_only` any optimizer of the model, or
            None; where an engine keeps masters in it, the engine or that optimizer must be given.
        which: ``"latest"``, a step, or the name of a folder in `path`.
        scheduler: The learning-rate schedule that goes on, of the class that was saved: what was given to `save`, or
            that of a DeepSpeed engine, whichever the checkpoint has. An engine's own need not be given. False leaves
            all schedules as they are, those in the checkpoint too.
        restore_random: Whether to take the random states.
        weights_only: Whether to take the weights and nothing else.
        strict: False, with `weights_only`, leaves tensors as they are here which only the model or only the checkpoint
            has, or which have another shape; logs them on rank 0, and says them in ``Loaded.left``.
        convert_state: Whether moments that were saved in another format, ``state_dtype``, are decoded and stored in the
            one that is here, rounded by the noise of the step that was saved: the same bits on any ranks. A rank has
            them in memory as they were saved too, meanwhile.
        process_group: The ranks that load, if they are not all: those that train this model, and nobody else calls it.
            Ranks are numbered as in this group.

    Raises:
        CheckpointError: On all ranks, if anything is missing, damaged, from a newer version, or does not fit this model
            and optimizer (the message names the file or the tensor), if a schedule would get no state or a state no
            schedule, or if a DeepSpeed engine or `fuse_backward` holds gradients for a step that is not done (those
            that a loop of your own adds up are not seen). On one rank, if that is not in `process_group`.
    """
    together = Together.of(process_group, "gwt_dist.load")
    together.agree((weights_only, strict, convert_state), "weights_only, strict and convert_state")
    together.each(lambda: _check_arguments(optimizer, scheduler, weights_only, strict, convert_state))
    place, sha256 = together.from_rank_0(lambda: _found(Path(path), which))
    where = Path(place)
    index = together.each(lambda: folder.read_index(where, sha256))
    run = together.each(lambda: None if weights_only else _between_steps(model, optimizer))
    weights = together.each(lambda: weights_of(model, optimizer) if run is None else run.weights)
    matched = together.each(lambda: match(index, weights, str(where), strict=strict, weights_only=weights_only))
    fit = together.each(lambda: None if run is None else check(index, run, str(where), convert_state))
    takers = together.each(lambda: [] if run is None else schedules.takers(index, run, scheduler, str(where)))
    holdings = together.each(lambda: list(_holdings(weights, run, fit, matched)))
    tasks = together.each(lambda: _tasks(index, holdings, matched))
    shared = together.each(lambda: _shared(where, index, holdings, matched))
    states = index.random.get(together.rank(), {}) if restore_random and not weights_only else {}
    random = together.each(lambda: _random(where, index, states))
    together.each(lambda: _verify(where, index, tasks))
    together.each(lambda: schedules.attempt(takers, run.groups if run is not None else ()))
    try:
        together.each(lambda: _commit(where, index, run, fit, tasks, shared, takers))
        if random:
            random_states.restore(random)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. It had been checked, so something changed meanwhile; model and optimizer now hold parts of two "
            f"states: load again before going on"
        ) from error
    if not strict and together.rank() == 0:
        tell(matched.left, str(where))
    return Loaded(index.step, index.extra, where, bool(states), matched.left)


def _check_arguments(optimizer: Any, scheduler: Any, weights_only: bool, strict: bool, convert: bool) -> None:
    if weights_only and convert:
        raise CheckpointError(
            "load got convert_state=True and weights_only=True, which takes no state of the optimizer: leave one of "
            "both out"
        )
    if weights_only and scheduler is not None and scheduler is not False:
        raise CheckpointError(
            "load got a scheduler and weights_only=True, which takes no state of a schedule: leave one of both out"
        )
    if not weights_only and optimizer is None:
        raise CheckpointError(
            "load got no optimizer, so the state in the checkpoint would be lost: pass the optimizer, or say "
            "weights_only=True to start from the weights"
        )
    if not weights_only and not strict:
        raise CheckpointError(
            "strict=False is for weights_only=True alone: a run that goes on with a part of its state is another run. "
            "Say weights_only=True to start from the weights that fit"
        )


def _between_steps(model: Any, optimizer: Any) -> Run:
    run = Run(model, optimizer)
    check_boundary(model, run.optimizer, "load")
    return run


def _found(path: Path, which: str | int) -> tuple[str, str]:
    place, sha256 = folder.find(path, which)
    return str(place), sha256


def _tasks(index: Index, holdings: Iterable[Holding], matched: Match) -> list[_Task]:
    """Every chunk of which this rank needs anything, in the order of the files."""
    tasks: dict[Chunk, _Task] = {}
    for holding in holdings:
        if not are_distinct(holding.buffer):
            continue  # see `_shared`
        name = matched.sources[holding.fragment.fqn]
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


def _holdings(weights: Weights, run: Run | None, fit: Fit | None, matched: Match) -> Iterator[Holding]:
    """All that is to be filled: weights, masters and other copies of weights, state."""
    copies = [*weights.model, *weights.copies, *weights.masters]
    leave = {fragment.fqn for local in copies for fragment in local.fragments} - matched.sources.keys()
    yield from weight_holdings(copies, WEIGHT, leave)
    if run is not None and fit is not None:
        converted = set().union(*(conversion.converted for conversion in fit.conversions))
        for one, state in fit.states:
            if state is not None:
                its = run.state_holdings(one, state.tensors)
                yield from (h for h in its if (h.fragment.fqn, h.kind) not in converted)
        for conversion in fit.conversions:
            yield from conversion.holdings()


def _shared(where: Path, index: Index, holdings: Iterable[Holding], matched: Match) -> list[tuple[Tensor, Tensor]]:
    """Tensors whose elements may share memory, as after `expand`, and what goes into them, in memory and checked."""
    found = []
    with Reader(where, index.files) as reader:
        for holding in holdings:
            if are_distinct(holding.buffer):
                continue
            name = holding.fragment.fqn
            whole = reader.whole(index.tensors[matched.sources[name]].parts[holding.kind], f"weight of {name!r},")
            if whole.shape != holding.buffer.shape or not can_take(holding.buffer, whole):
                raise CheckpointError(
                    f"{name!r} has strides {holding.buffer.stride()} here, so elements share memory which have values "
                    f"of their own in {where}, and some would be lost. Make it a tensor of its own (clone, contiguous)"
                )
            found.append((holding.buffer, whole))
    return found


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
    where: Path,
    index: Index,
    run: Run | None,
    fit: Fit | None,
    tasks: list[_Task],
    shared: Iterable[tuple[Tensor, Tensor]],
    takers: Sequence[schedules.Taker],
) -> None:
    with Reader(where, index.files) as reader:
        for task in tasks:
            reader.read(task.stored, task.chunk, task.places)
    for tensor, whole in shared:
        put(tensor, whole)
    if run is not None and fit is not None:
        for conversion in fit.conversions:
            conversion.finish()
        schedules.restore(takers)
        set_counters(run.model, index.engine, index.step)
        _put_state(index, run, fit)


def _put_state(index: Index, run: Run, fit: Fit) -> None:
    """The state that is no elements, and the options."""
    for one, state in fit.states:
        if state is None:
            run.optimizer.state.pop(one.parameter, None)
            continue
        tensors = list(zip(one.plan.shard.tensors, (index.tensors[name] for name in one.names), strict=True))
        state.tensors["step"].fill_(float(state.step))
        for field in one.plan.fields:
            if field.extent is Extent.TENSOR:  # 0 for the tensors that have none
                numbers = [(entry.numbers.get(field.name, 0.0), one.stored(its.fqn)[1]) for its, entry in tensors]
                values = [its[place] if isinstance(its, list) else its for its, place in numbers]
                state.tensors[field.name].view(-1).copy_(torch.tensor(values, dtype=torch.float64))
        run.optimizer.state[one.parameter].update(state.tensors)
        run.optimizer.restored(one.parameter, state.missed)
    for groups in run.groups:
        for group, options in zip(groups, fit.options, strict=True):
            for key, value in options.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value

"""`save`: every rank writes what it owns, rank 0 the index."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gwt_dist.checkpoint import folder, schedules
from gwt_dist.checkpoint.dtypes import safetensors_dtype
from gwt_dist.checkpoint.exclude import excluded, shown
from gwt_dist.checkpoint.files import Part, split, write_file
from gwt_dist.checkpoint.format import (
    ITEM_BYTES,
    WEIGHT,
    CheckpointError,
    Entry,
    Excluded,
    File,
    Index,
    Stored,
    dump,
    stored_of,
    to_json,
)
from gwt_dist.checkpoint.holdings import MASTER, Holding, Numbers, Run, Traits
from gwt_dist.checkpoint.random_states import capture
from gwt_dist.checkpoint.together import Together
from gwt_dist.engines.weights import check_boundary, clean, counters
from gwt_dist.exchange import join
from gwt_dist.layout import Fragment

_Interval = tuple[int, int, int]  # start, stop, rows


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a rank could write of one stored tensor."""

    kind: str
    name: str
    shape: tuple[int, ...]
    interval: _Interval
    dtype: str
    common: bool


@dataclass(frozen=True, slots=True)
class _Report:
    """What a rank knows: what it could write, and the steps and numbers of the tensors of which it has elements."""

    step: int
    offers: list[_Offer]
    traits: dict[str, Traits]
    steps: dict[str, tuple[int, Numbers]]
    groups: list[dict[str, Any]]
    excluded: dict[str, Excluded]


@dataclass(frozen=True, slots=True)
class _Written:
    """The file of a rank and what is in it, by kind and name."""

    file: tuple[str, File]
    stored: dict[tuple[str, str], Stored]
    random: dict[str, Stored]


def save(
    path: str | Path,
    model: Any,
    optimizer: Any,
    *,
    step: int,
    extra: Any = None,
    scheduler: Any = None,
    keep: int | None = None,
    random_states: bool = True,
    exclude: str | Iterable[str] = (),
    process_group: ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint that any number of ranks under any engine can load. A collective.

    Each rank writes what it owns, every element is written once, and nothing is gathered. What is written gets its name
    when all of it is on the disk; an error, a full disk or a killed rank leaves the checkpoints before it as they were.

    Args:
        path: Folder of the run's checkpoints, the same for all ranks; this one becomes ``path/step-00000200``.
        model: The model as it is wrapped, or the DeepSpeed engine.
        optimizer: The `GWTAdamW`, or any wrapper that holds it.
        step: Optimizer steps done.
        extra: What you want to get back, such as the place in the data: None, numbers, text, bytes, lists, tuples,
            sets, mappings, and small tensors and NumPy arrays. It comes back equal, types included. Rank 0's counts.
        scheduler: A learning-rate scheduler, or anything with ``state_dict`` and ``load_state_dict``, of such values.
            That which a DeepSpeed engine steps is saved without being given.
        keep: Leave the `keep` newest checkpoints up to this one; None leaves all.
        random_states: Keep the random states of Python and torch of each rank.
        exclude: Pattern or patterns of names of parameters and buffers to leave out, each a part of the name or a
            regular expression that matches all of it; ``"all-frozen"`` is every parameter that is not trained. The
            index says what was left out, and `load` then leaves it as it is in the model.
        process_group: The ranks that save, if they are not all: those that train this model, and nobody else calls it.
            Ranks are numbered as in this group. Groups that save at once need a folder each.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: On all ranks, if any of them cannot write its part or the parts make up no whole; if a
            DeepSpeed engine or `fuse_backward` holds gradients for a step that is not done (those that a loop of your
            own adds up are not seen: save after its step); for a value in `extra` or in the state of the scheduler that
            would not come back as it is (the message has its keys); for a pattern that matches nothing or a tensor that
            the optimizer steps; for a tensor of a kind that is not stored. On one rank, if that is not in
            `process_group`.
    """
    together = Together.of(process_group, "gwt_dist.save")
    run = together.each(lambda: Run(model, optimizer))
    together.each(lambda: check_boundary(model, run.optimizer, "save"))
    beside = together.each(lambda: _beside(model, scheduler, extra) if together.rank() == 0 else {})
    left_out = together.each(lambda: excluded(run, exclude))
    holdings = together.each(lambda: run.holdings(left_out))
    reports = together.gather(together.each(lambda: _report(run, holdings, left_out, step, keep)))
    mine = together.each(lambda: _assign(reports))[together.rank()]
    saving = Path(together.from_rank_0(lambda: str(folder.start(Path(path), step)), Path(path)))
    file = saving / folder.file_of(together.rank())

    def finish() -> str:
        index = Index(
            step=step,
            world_size=together.world_size(),
            tensors=_entries(reports, written),
            groups=tuple(reports[0].groups),
            files=dict(one.file for one in written),
            engine=counters(model),
            **beside,
            random={rank: one.random for rank, one in enumerate(written) if one.random},
            versions=_versions(),
            excluded=left_out,
            tied=run.weights.tied,
        )
        return str(folder.finish(saving, dump(index), keep))

    try:
        random = f"random:{together.rank()}" if random_states else ""
        written = together.gather(together.each(lambda: _write(file, holdings, mine, step, random), file))
        return Path(together.from_rank_0(finish, saving))
    except CheckpointError:
        if together.rank() == 0:
            shutil.rmtree(saving, ignore_errors=True)  # a full disk is none for whoever comes next
        raise


def _beside(model: Any, scheduler: Any, extra: Any) -> dict[str, Any]:
    """What is the user's; tried before anything is written, as it may be what no index can hold."""
    states = schedules.read(model, scheduler)
    found = {"scheduler": states.get("scheduler"), "engine_schedule": states.get("engine"), "extra": extra}
    dump(Index(0, 0, {}, (), {}, **found))
    return found


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for package in ("gwt_dist", "deepspeed"):
        if package in sys.modules:
            found[package] = str(getattr(sys.modules[package], "__version__", "unknown"))
    return found


def _report(
    run: Run, holdings: Sequence[Holding], left_out: dict[str, Excluded], step: int, keep: int | None
) -> _Report:
    if not 0 <= step < 10**12 or (keep is not None and keep < 1):
        raise CheckpointError(f"step={step} must be at least 0, and keep={keep} at least 1 or None")
    steps: dict[str, tuple[int, Numbers]] = {}
    for one in run.stepped:
        state = run.optimizer.state.get(one.parameter)
        if state:
            taken, numbers = int(state["step"]), one.numbers(state)
            missed = {clean(name): number for name, number in run.optimizer.missed(one.parameter).items()}
            # Only those with elements count: FSDP1 leaves ranks without any out of the steps.
            steps |= {name: (taken - missed.get(name, 0), numbers[name]) for _, name in one.held}
    options = []
    for i, group in enumerate(run.groups[0]):
        options.append({key: plain(value) for key, value in group.items() if key != "params"})
        for key, value in options[-1].items():
            to_json(value, f"option {key!r} of parameter group {i}")
    return _Report(step, [_offer(holding) for holding in holdings], run.traits(), steps, options, left_out)


def _offer(holding: Holding) -> _Offer:
    owned = holding.owned
    interval = (owned.start, owned.stop, owned.rows) if owned.numel else (0, 0, 1)
    dtype = safetensors_dtype(holding.buffer.dtype, owned.fqn)
    return _Offer(holding.kind, owned.fqn, owned.shape, interval, dtype, holding.common)


def plain(value: Any) -> Any:
    """A 0-d tensor as the number that it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _assign(reports: Sequence[_Report]) -> list[set[tuple[str, str, _Interval]]]:
    """By rank, what each writes: every element once, and where ranks hold the same, spread evenly.

    All ranks compute it from the same reports. Raises `CheckpointError` if the offers make up no whole tensor.
    """
    if len({report.step for report in reports}) > 1:
        raise CheckpointError(f"ranks save different steps: {[report.step for report in reports]}")
    if any(report.excluded != reports[0].excluded for report in reports):
        told = [shown(report.excluded) for report in reports]
        raise CheckpointError(
            f"ranks leave out different tensors: {'; '.join(told)}. Give all of them the same exclude="
        )
    holders: dict[tuple[str, str], dict[_Interval, list[int]]] = {}
    offered: dict[tuple[str, str], _Offer] = {}
    for rank, report in enumerate(reports):
        for offer in report.offers:
            key = offer.kind, offer.name
            first = offered.setdefault(key, offer)
            if (offer.shape, offer.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"{offer.kind} of {offer.name!r} is {offer.dtype} of shape {offer.shape} on rank {rank} and "
                    f"{first.dtype} of shape {first.shape} on another; ranks must build the same model"
                )
            ranks = holders.setdefault(key, {}).setdefault(offer.interval, [])
            if not (offer.common and ranks):
                ranks.append(rank)
    tasks: list[set[tuple[str, str, _Interval]]] = [set() for _ in reports]
    bytes_of = [0] * len(reports)
    for (kind, name), intervals in holders.items():
        if kind == WEIGHT and (MASTER, name) in holders:
            continue  # the rounding of its master
        offer = offered[kind, name]
        fragments = [Fragment(name, offer.shape, low, high, 0, rows) for low, high, rows in intervals]
        join([fragments])  # a LayoutError names the elements that nobody holds
        for fragment, (interval, ranks) in zip(fragments, intervals.items(), strict=True):
            if fragment.numel:
                least = min(ranks, key=lambda rank: bytes_of[rank])
                bytes_of[least] += fragment.numel * ITEM_BYTES[offer.dtype]
                tasks[least].add((kind, name, interval))
    return tasks


def _write(
    path: Path,
    holdings: Sequence[Holding],
    mine: set[tuple[str, str, _Interval]],
    step: int,
    random: str,
) -> _Written:
    """Write the file of this rank, with its random states under the name `random` if there is one."""
    parts, left = [], set(mine)
    for holding in holdings:
        offer = _offer(holding)
        task = offer.kind, offer.name, offer.interval
        if task in left:
            left.remove(task)
            kind = WEIGHT if offer.kind == MASTER else offer.kind
            for fragment in split(holding.owned, ITEM_BYTES[offer.dtype]):
                parts.append(Part(offer.name, kind, offer.dtype, fragment, holding.fragment, holding.buffer))
    assert not left, "a rank writes what it offered"
    states = capture() if random else {}
    for kind, state in states.items():
        fragment = Fragment(kind, (state.numel(),), 0, state.numel())
        parts.append(Part(random, kind, "U8", fragment, fragment, state))
    name = path.name
    file, chunks = write_file(path, parts, {"format": "gwt_dist", "step": str(step), "file": name})
    stored: dict[tuple[str, str], Stored] = {}
    for part, chunk in zip(parts, chunks, strict=True):
        before = stored.get((part.kind, part.name))
        earlier = before.chunks if before else ()
        stored[part.kind, part.name] = Stored(part.dtype, part.fragment.shape, (*earlier, chunk))
    kept = {kind: stored.pop((kind, random)) for kind in states}
    return _Written((name, file), stored, kept)


def _entries(reports: Sequence[_Report], written: Sequence[_Written]) -> dict[str, Entry]:
    offers = {(offer.kind, offer.name): offer for report in reports for offer in report.offers}
    traits = {name: told for report in reversed(reports) for name, told in report.traits.items()}
    steps = {name: told for report in reversed(reports) for name, told in report.steps.items()}
    for rank, report in enumerate(reports):
        for name, (step, _) in report.steps.items():
            if step != steps[name][0]:
                raise CheckpointError(f"{name!r} has taken {step} steps on rank {rank} and {steps[name][0]} on another")
    entries = {}
    for kind, name in offers:
        if kind != WEIGHT:
            continue
        parts = {}
        for part in (WEIGHT, *stored_of(traits[name].fields)) if name in steps else (WEIGHT,):
            offer = offers.get((MASTER, name), offers[WEIGHT, name]) if part == WEIGHT else offers[part, name]
            chunks = [chunk for one in written if (s := one.stored.get((part, name))) for chunk in s.chunks]
            parts[part] = Stored(offer.dtype, offer.shape, tuple(chunks))
        about = traits.get(name)
        entry = Entry(name, offers[WEIGHT, name].shape, offers[WEIGHT, name].dtype, parts)
        if about is not None:
            taken, numbers = steps.get(name, (None, {}))
            entry = replace(
                entry,
                group=about.group,
                level=about.level,
                wavelet=about.wavelet,
                recipe=about.recipe,
                fields=about.fields,
                step=taken,
                numbers=numbers,
            )
        entries[name] = entry
    return entries

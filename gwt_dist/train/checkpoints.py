"""The run folder: refusing to overwrite, resuming only what fits, saving.

    output/
      run.json                  settings of the run, as last started
      metrics.jsonl             the curve, see `gwt-dist report`
      tensorboard/
      tokenizer.json            where the tokenizer was trained for this run
      summary.json              written at the end
      checkpoints/              of `gwt_dist.save`, see docs/checkpoints.md
        latest
        step-00000200/

What a run adds to the index of a checkpoint, under `extra`: `model_config` (that of transformers), `identity` (what
makes it the same run), `batch` (sequences of a step, and ranks when the run began), `streams` (the place of each rank
in a streamed corpus; else null, as the step says it all). `run.json` has the same `identity` and `batch`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gwt_dist.checkpoint import CheckpointError, find, load, read_index, save
from gwt_dist.train.config import TrainConfig
from gwt_dist.train.ranks import may_restart

RECORD = "run.json"
FOLDER = "checkpoints"


class RunComplete(Exception):
    """A restarted run has done all its steps already."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A run that began before, and its checkpoint; None if it was stopped before the first one."""

    run_folder: Path
    checkpoint: Path | None
    step: int
    identity: dict[str, Any]
    batch: dict[str, int]
    streams: list[Any] | None = None
    world_size: int = 0  # ranks that wrote the checkpoint

    @property
    def where(self) -> Path:
        """For messages."""
        return self.checkpoint or self.run_folder


def open_run(config: TrainConfig) -> Begun | None:
    """What to resume, or None for a new run. Writes nothing.

    Raises:
        ValueError: the output folder of a new run is not empty, there is no checkpoint to resume, it is damaged, or the
            run has checkpoints after the one named.
        RunComplete: a launcher started a run again that was at its end.
    """
    output = Path(config.output)
    place = next((place for place in (output, *output.parents) if place.exists()), output)
    if place.exists() and not place.is_dir():
        raise ValueError(f"output {output}: {place} is a file; name a folder")
    occupied = output.is_dir() and any(output.iterdir())
    if not config.resume:
        if occupied:
            raise ValueError(
                f"output folder {output} is not empty and nothing in it is overwritten; "
                "name another --output, or go on with --resume latest"
            )
        return None
    if config.resume == "latest" and may_restart() and not (output / FOLDER / "latest").exists():
        # The launcher gives the first start and every restart the same command line.
        return _without_checkpoint(output) if occupied else None
    begun = _find(output if config.resume == "latest" else Path(config.resume))
    assert begun.checkpoint is not None
    here = output.is_dir() and output.samefile(begun.run_folder)
    if occupied and not here:
        raise ValueError(
            f"resume {begun.checkpoint} belongs to the run {begun.run_folder}, but output "
            f"folder {output} holds something else; name that run or an empty folder as --output"
        )
    if here:
        newest = find(output / FOLDER, "latest")[0]
        if not newest.samefile(begun.checkpoint):
            raise ValueError(
                f"resume {begun.checkpoint} would overwrite the later checkpoint {newest}; resume "
                "that one, or name an empty folder as --output to branch off"
            )
    if config.steps <= begun.step:
        if here and may_restart() and config.steps == begun.step:
            raise RunComplete(f"all {begun.step} steps are done: {begun.checkpoint} is of the last one")
        raise ValueError(
            f"steps={config.steps}, but {begun.checkpoint} is at step {begun.step} already; raise steps to train on"
        )
    return begun


def _without_checkpoint(output: Path) -> Begun:
    """A run that died before its first checkpoint."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        return Begun(output, None, 0, record["identity"], record["batch"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"output folder {output} is not empty and holds neither a checkpoint nor the {RECORD} of a run "
            f"({error!r}); nothing in it is overwritten, so name another --output"
        ) from None


def _find(place: Path) -> Begun:
    named = place.parent.name == FOLDER and place.name.startswith("step-")
    if not (place.is_dir() if named else (place / FOLDER / "latest").exists()):
        raise ValueError(
            f"resume: no complete checkpoint in {place}; give 'latest', a run folder that has {FOLDER}/latest, or one "
            f"of its {FOLDER}/step-* folders, or start anew without --resume"
        )
    folder, sha256 = find(place.parent if named else place / FOLDER, place.name if named else "latest")
    index = read_index(folder, sha256)
    try:
        extra = index.extra
        found = extra["identity"], extra["batch"], extra["streams"]
    except (KeyError, TypeError):
        raise ValueError(f"resume: {folder} was not saved by this recipe, which keeps more than the state") from None
    return Begun(folder.parent.parent, folder, index.step, *found, index.world_size)


def check_identity(begun: Begun, identity: Mapping[str, Any]) -> None:
    """Compare what makes a run the same run: model, text, optimizer, sequences of a step and their like.

    Raises:
        ValueError: names the first field that differs, both values, and the ways out.
    """
    for key in {**identity, **begun.identity}:
        # A key of the optimizer that is None is as the recipe says, as one is that nobody knew of then.
        then, now = begun.identity.get(key), identity.get(key)
        if then != now:
            raise ValueError(
                f"resume: {key} is {now!r} in this run and {then!r} in {begun.where}; going "
                f"on would be another run. Set {key} back to {then!r}, or start anew without "
                "--resume in another --output"
            )


def check_streams(begun: Begun, world_size: int) -> None:
    """A rank's share of a stream is cut by the number of ranks, so that cannot change.

    Raises:
        ValueError: another number of ranks.
    """
    if begun.streams is not None and len(begun.streams) != world_size:
        raise ValueError(
            f"resume: the corpus is streamed, each of {len(begun.streams)} ranks its share, so {world_size} ranks "
            f"cannot go on with the same text. Start {len(begun.streams)} ranks, or read the corpus from files"
        )


def read_record(run: Path) -> dict[str, Any]:
    """The record of a run, for what is told of it; empty if it is not there or damaged."""
    try:
        found = json.loads((run / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is either complete or not there."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def keep_state(output: Path, engine: Any, step: int, place: Any, beside: Mapping[str, Any], keep: int) -> Path:
    """Save a checkpoint after `step` steps, then prune to the newest `keep`, if not 0. A collective.

    Args:
        output: The run folder.
        engine: DeepSpeed engine.
        step: Steps that are done.
        place: The place of this rank in a streamed corpus, else None.
        beside: What goes into the index with it.
        keep: Number of checkpoints.

    Raises:
        ValueError: on all ranks, if any cannot write its part; the checkpoints before it are as they were.
    """
    streams: list[Any] | None = None
    if place is not None:
        streams = [None] * dist.get_world_size()
        dist.all_gather_object(streams, place)
    extra = {**beside, "streams": streams}
    return save(output / FOLDER, engine, engine.optimizer, step=step, extra=extra, keep=keep or None)


def restore_state(engine: Any, begun: Begun, seed: int) -> None:
    """Load weights, optimizer, schedule and random states. A collective.

    Raises:
        ValueError: on all ranks, if anything is damaged or does not fit; nothing was changed then.
    """
    assert begun.checkpoint is not None
    loaded = load(begun.checkpoint.parent, engine, engine.optimizer, which=begun.checkpoint.name)
    if loaded.step != begun.step:
        raise CheckpointError(f"{begun.checkpoint} changed while the run was started")
    if not loaded.random_restored:  # more ranks than saved
        torch.manual_seed(seed + (begun.step << 20) + dist.get_rank())

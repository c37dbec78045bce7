"""The run folder: refusing to overwrite, saving, pruning, and resuming only what fits.

    output/
      run.json                  settings of the run, as last started
      metrics.jsonl             the curve
      tensorboard/
      tokenizer.json            where the tokenizer was trained for this run
      summary.json              written at the end
      checkpoints/step_00000200/
        ...                     DeepSpeed's files
        position_rank00000.pt   random states and place in the text of one rank
        run.json                settings and step

The run.json of a checkpoint is written last: a folder that has one is complete.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gwt_dist.train.config import TrainConfig

RECORD = "run.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk, and the record written with it."""

    folder: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.record["step"])

    @property
    def run_folder(self) -> Path:
        """The run that saved it."""
        return self.folder.parent.parent


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in run_folder.glob(f"checkpoints/step_*/{RECORD}"))


def open_run(config: TrainConfig) -> Checkpoint | None:
    """What to resume, or None for a new run. Writes nothing.

    Raises:
        ValueError: the output folder of a new run is not empty, there is no complete checkpoint to
            resume, or the run has checkpoints after the one named, which would be overwritten.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    if not config.resume:
        if output.is_dir() and any(output.iterdir()):
            raise ValueError(
                f"output folder {output} is not empty and nothing in it is overwritten; "
                "name another --output, or go on with --resume latest"
            )
        return None
    checkpoint = _find(output if config.resume == "latest" else Path(config.resume))
    if output.is_dir() and any(output.iterdir()) and not output.samefile(checkpoint.run_folder):
        raise ValueError(
            f"resume {checkpoint.folder} belongs to the run {checkpoint.run_folder}, but output "
            f"folder {output} holds something else; name that run or an empty folder as --output"
        )
    if output.is_dir() and output.samefile(checkpoint.run_folder):
        newest = complete_checkpoints(output)[-1]
        if not newest.samefile(checkpoint.folder):
            raise ValueError(
                f"resume {checkpoint.folder} would overwrite the later checkpoint {newest}; resume "
                "that one, or name an empty folder as --output to branch off"
            )
    if config.steps <= checkpoint.step:
        raise ValueError(
            f"steps={config.steps}, but {checkpoint.folder} is at step {checkpoint.step} already; "
            "raise steps to train on"
        )
    return checkpoint


def _find(place: Path) -> Checkpoint:
    folder = place
    if not (place.parent.name == "checkpoints" and (place / RECORD).is_file()):
        found = complete_checkpoints(place)
        if not found:
            raise ValueError(
                f"resume: no complete checkpoint in {place}; give 'latest', a run folder that has "
                "checkpoints/step_*/run.json, or such a step folder, or start anew without --resume"
            )
        folder = found[-1]
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"resume: {folder / RECORD} cannot be read: {error}") from None
    return Checkpoint(folder, record)


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Compare what makes a run the same run: model, text, optimizer, ranks and their like.

    Raises:
        ValueError: names the first field that differs, both values, and the ways out.
    """
    saved: dict[str, Any] = checkpoint.record["identity"]
    for key in {**identity, **saved}:
        then, now = saved.get(key, "(not set)"), identity.get(key, "(not set)")
        if then != now:
            raise ValueError(
                f"resume: {key} is {now!r} in this run and {then!r} in {checkpoint.folder}; going "
                f"on would be another run. Set {key} back to {then!r}, or start anew without "
                "--resume in another --output"
            )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is either complete or not there."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def save(engine: Any, run_folder: Path, record: Mapping[str, Any], position: Any, *, step: int, keep: int) -> Path:
    """Save a checkpoint after `step` steps, then prune to the `keep` newest. A collective.

    Args:
        engine: DeepSpeed engine.
        run_folder: The output folder of the run.
        record: What goes into its run.json, the step apart.
        position: State of this rank's batches.
        step: Optimizer steps done.
        keep: Complete checkpoints to leave; 0 leaves all.
    """
    rank = torch.distributed.get_rank()
    folder = run_folder / "checkpoints" / f"step_{step:08d}"
    if rank == 0 and folder.exists():
        # Without its record it is what a killed run left behind; open_run refused all others.
        shutil.rmtree(folder)
    torch.distributed.barrier()
    engine.save_checkpoint(
        str(folder.parent),
        tag=folder.name,
        client_state={"step": step, "corpus_sha256": record["identity"]["corpus.sha256"]},
        save_latest=False,
    )
    torch.save({"position": position, "random": _random_states()}, folder / f"position_rank{rank:05d}.pt")
    torch.distributed.barrier()
    if rank == 0:
        write_json(folder / RECORD, {**record, "step": step})
        for old in complete_checkpoints(run_folder)[: -keep or None] if keep else []:
            (old / RECORD).unlink()  # first, so that a half-deleted folder is not taken as complete
            shutil.rmtree(old)
    return folder


def load(engine: Any, checkpoint: Checkpoint) -> Any:
    """Load weights, optimizer, schedule and random states. A collective.

    Returns:
        The position of this rank's batches.

    Raises:
        ValueError: DeepSpeed cannot find its files, or they are from another step.
    """
    folder = checkpoint.folder
    path, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None or client_state.get("step") != checkpoint.step:
        raise ValueError(f"resume: DeepSpeed's files in {folder} are missing or of another step")
    rank = torch.distributed.get_rank()
    mine = torch.load(folder / f"position_rank{rank:05d}.pt", weights_only=True)
    _restore_random_states(mine["random"])
    return mine["position"]


def _random_states() -> dict[str, Any]:
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

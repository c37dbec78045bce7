"""`portable`: checkpoints of transformers' `Trainer` that any number of ranks under any engine can resume from.

trainer = portable(Trainer(model=model, args=args, train_dataset=data, **trainer_kwargs(args)))
trainer.train(resume_from_checkpoint=True)

The files that the Trainer writes by itself know the number of ranks under DeepSpeed, which refuses another, and the
engine. Callbacks cannot change that: the Trainer has loaded, or failed, before it calls the first. So four methods of
the one Trainer are replaced: the one that saves the weights also saves by `gwt_dist.save`, and those that load do so
by `gwt_dist.load`. The steps done, the place in the data and the log are the Trainer's, from its trainer_state.json.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import transformers
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gwt_dist import CheckpointError, load, save
from gwt_dist.checkpoint import random_states
from gwt_dist.integrations.engaged import asked_for, engage

logger = logging.getLogger(__name__)

FOLDER = "gwt_dist"  # in the folder checkpoint-N of a Trainer
_REPLACED = ("save_model", "_prepare_for_training", "_load_from_checkpoint", "_load_rng_state")
_Trainer = TypeVar("_Trainer")


def portable(trainer: _Trainer, *, exclude: str | Iterable[str] = (), convert_state: bool = False) -> _Trainer:
    """Have a Trainer save by `gwt_dist.save` too, and resume by `gwt_dist.load`: on other ranks, under another engine.

    Each of its checkpoints gets a folder ``checkpoint-N/gwt_dist``, written by all ranks, that holds weights, optimizer
    state, schedule, random states and the sizes of the batch. ``train(resume_from_checkpoint=...)`` then reads that
    folder and ``trainer_state.json``, and nothing else of the checkpoint. What the Trainer writes for itself stays as
    it is, and can be left out with ``save_only_model=True``, except that the fp16 scaler of torch is only there.

    The run goes on where it was if a step has as many sequences as before: per_device_train_batch_size,
    gradient_accumulation_steps and the number of ranks may change if their product does not. Random states (dropout)
    are those that a rank of this number had; a rank that has none keeps its own, which is logged.

    Args:
        trainer: A `Trainer` or one of a class derived from it, before ``train()``; its optimizer is a `GWTAdamW`.
        exclude: As in `gwt_dist.save`: ``"all-frozen"`` leaves the frozen weights out, as of a model with adapters.
        convert_state: As in `gwt_dist.load`: whether moments may be of another ``state_dtype`` than they were saved.

    Returns:
        The same trainer.

    Raises:
        ValueError: If a method that it replaces is not there, as in transformers before 5.
            When training begins, without a ``gwt_dist`` folder in the checkpoint, for another number of sequences a
            step, unless ``ignore_data_skip=True`` says that the place in the data does not count, for fp16 without its
            scaler, and as `gwt_dist.integrations.engaged.engage` does.
        CheckpointError: As `gwt_dist.save` and `gwt_dist.load` do.
    """
    missing = [name for name in _REPLACED if not callable(getattr(trainer, name, None))]
    if missing:
        raise ValueError(
            f"{type(trainer).__name__} of transformers {transformers.__version__} has no {', '.join(missing)}, so it "
            f"would go on saving and resuming for this number of ranks alone. portable() is for the Trainer of "
            f"transformers 5 and classes derived from it"
        )
    if not isinstance(getattr(vars(trainer).get("save_model"), "__self__", None), _Portable):
        parts = _Portable(trainer, exclude if isinstance(exclude, str) else tuple(exclude), convert_state)
        vars(trainer).update({name: getattr(parts, name.removeprefix("_")) for name in _REPLACED})
    return trainer


class _Portable:
    """What stands in the place of the methods of one trainer, which it calls where it adds to them."""

    def __init__(self, trainer: Any, exclude: str | tuple[str, ...], convert_state: bool) -> None:
        self._trainer = trainer
        self._exclude, self._convert_state = exclude, convert_state
        self._save_model = trainer.save_model
        self._prepare_for_training = trainer._prepare_for_training
        self._random: Mapping[str, Tensor] = {}  # for when the trainer restores it, which is after it has shuffled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Called before older checkpoints are removed, on all ranks."""
        trainer = self._trainer
        step = trainer.state.global_step
        self._save_model(output_dir, _internal_call=_internal_call)
        if not (_internal_call and output_dir and Path(output_dir).name == f"{PREFIX_CHECKPOINT_DIR}-{step}"):
            return  # the model alone was asked for
        extra = {"sequences": self._sequences(), "scaler": None}
        if scaler := getattr(trainer.accelerator, "scaler", None):
            extra["scaler"] = scaler.state_dict()
        if hasattr(trainer.model, "config"):
            extra["model_config"] = trainer.model.config.to_dict()  # for gwt-dist export
        if not dist.is_initialized() or dist.get_rank() == 0:
            # Of an earlier run that got as far, whose other files the trainer has just written over.
            shutil.rmtree(Path(output_dir, FOLDER), ignore_errors=True)
        save(
            Path(output_dir, FOLDER),
            trainer.model_wrapped,
            trainer.optimizer,
            step=step,
            extra=extra,
            scheduler=trainer.lr_scheduler,
            exclude=self._exclude,
        )

    def load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the weights are loaded with the rest, once the model is wrapped."""

    def prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """The trainer's own, which then loads nothing, and the load."""
        prepared = self._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            engage(self._trainer.optimizer, self._trainer.model_wrapped, asked_for(self._trainer.args))
            self._load(Path(resume_from_checkpoint))
        return prepared

    def load_rng_state(self, checkpoint: str | None) -> None:
        """Called when the batches that were seen are skipped; earlier it would have changed how they are shuffled."""
        if self._random:
            random_states.restore(self._random)

    def _load(self, checkpoint: Path) -> None:
        trainer, before = self._trainer, random_states.capture()
        scheduler = trainer.lr_scheduler
        try:
            loaded = load(
                checkpoint / FOLDER,
                trainer.model_wrapped,
                trainer.optimizer,
                scheduler=scheduler,
                convert_state=self._convert_state,
            )
        except CheckpointError as error:
            if (checkpoint / FOLDER).exists():
                raise
            raise ValueError(
                f"{checkpoint} has no folder {FOLDER!r}: it was saved without portable(trainer), or cut off. Resume "
                f"from another checkpoint, or without portable(), from the Trainer's own files, which under DeepSpeed "
                f"need the number of ranks that saved them"
            ) from error
        self._random = random_states.capture() if loaded.random_restored else {}
        random_states.restore(before)
        if loaded.step != trainer.state.global_step:
            raise ValueError(
                f"{checkpoint / FOLDER} was saved after {loaded.step} steps and trainer_state.json beside it says "
                f"{trainer.state.global_step}: the weights would go on at another place in the data. Resume from a "
                f"checkpoint as it was saved"
            )
        self._check_sequences(checkpoint, loaded.extra["sequences"])
        if scaler := getattr(trainer.accelerator, "scaler", None):
            if loaded.extra["scaler"]:
                scaler.load_state_dict(loaded.extra["scaler"])
            else:
                logger.warning("%s has no state of a gradient scaler: its scale begins anew", checkpoint)
        if not loaded.random_restored:
            logger.warning("%s has no random states for a rank of this number, which keeps its own", checkpoint)

    def _sequences(self) -> int:
        """Of one step, on all ranks."""
        return int(self._trainer.get_total_train_batch_size(self._trainer.args))

    def _check_sequences(self, checkpoint: Path, saved: int) -> None:
        here = self._sequences()
        if here != saved and not self._trainer.args.ignore_data_skip:
            raise ValueError(
                f"{checkpoint} was saved by a run of {saved} sequences a step, and here are {here}: skipping its "
                f"{self._trainer.state.global_step} steps would skip or repeat data. Choose "
                f"per_device_train_batch_size and gradient_accumulation_steps so that times the number of ranks they "
                f"are {saved}, or let the data begin anew with ignore_data_skip=True"
            )

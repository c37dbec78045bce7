"""What the runs of a study share: text as tokens, and one model, which is compiled once and begun anew for each run."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gwt_dist.study.config import Study, shapes_of
from gwt_dist.study.plan import Run
from gwt_dist.study.prepared import COVERED, TRAIN, VALIDATION, Prepared
from gwt_dist.train.batches import ShuffledBatches, Validation
from gwt_dist.train.ds_config import BatchSizes
from gwt_dist.train.model import build_model, initialise, model_config, token_losses


def device_of(study: Study) -> str:
    """The device of a study's runs, "cpu" or "cuda"; "auto" is looked up here."""
    if study.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return study.device


class Inputs:
    """Made once in a process. Tokens are mapped from the files of `prepared`, which processes share."""

    def __init__(self, study: Study, prepared: Prepared) -> None:
        self.study = study
        self._vocab_size = prepared.vocab_size
        self.train = prepared.array(TRAIN)
        tokens, covered = prepared.array(VALIDATION), prepared.array(COVERED)
        self.validation = Validation(tokens, covered, study.sequence_length, study.eval_tokens)

    @cached_property
    def shapes(self) -> Any:
        """The `LlamaConfig` of the model."""
        return model_config(shapes_of(self.study), self._vocab_size, self.study.sequence_length)

    @cached_property
    def device(self) -> torch.device:
        """Where models and batches are."""
        return torch.device(device_of(self.study))

    def batches(self, run: Run) -> ShuffledBatches:
        """The training batches of `run`, which depend on its seed and batch size alone."""
        sequences = run.tokens // self.study.sequence_length
        micro = min(self.study.micro_batch, sequences)
        sizes = BatchSizes(train=sequences, micro=micro, accumulation=sequences // micro)
        return ShuffledBatches(self.train, self.study.sequence_length, sizes, rank=0, seed=run.seed)

    @cached_property
    def _model(self) -> Any:
        self.shapes._attn_implementation = self.study.attention
        return build_model(self.shapes, 0, {}).to(self.device)  # type: ignore[arg-type]

    def model(self, seed: int) -> nn.Module:
        """The model as it is at the beginning of a run: always the same tensors, with the values of `seed`."""
        model: nn.Module = self._model
        model.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        initialise(model, self.shapes.initializer_range, seed)
        return model

    @cached_property
    def losses(self) -> Any:
        """Function of tokens [batch, length + 1], int64, on the device: losses [batch, length] in nats, fp32."""
        model, bf16, device = self._model, self.study.precision == "bf16", self.device.type

        def losses(tokens: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
                return token_losses(model, tokens)

        return torch.compile(losses) if self.study.compile else losses

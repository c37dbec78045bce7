"""One run of a study: the same text and the same initial weights for every optimizer, on one thread."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
import traceback
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from gwt_dist.study.config import Study, shapes_of
from gwt_dist.study.held import bytes_held
from gwt_dist.study.optimizers import build, set_rates, split
from gwt_dist.study.plan import Run
from gwt_dist.train.batches import ShuffledBatches, Validation, checksum
from gwt_dist.train.corpus import load_corpus
from gwt_dist.train.ds_config import BatchSizes
from gwt_dist.train.model import build_model, model_config, token_losses
from gwt_dist.train.tokens import bpe_size, encode_stream, load_tokenizer, train_bpe

WARM_UP_STEPS = 3  # of an optimizer's own time: the first ones allocate, and compile


def device_of(study: Study) -> str:
    """The device of a study's runs, "cpu" or "cuda"; "auto" is looked up here."""
    if study.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return study.device


class Inputs:
    """What the runs of a study share: text as tokens, and the shapes of the model. Read once in a process."""

    def __init__(self, study: Study) -> None:
        self.study = study
        corpus = load_corpus(study.corpus)
        self.corpus_sha256 = corpus.sha256
        trained = bpe_size(study.tokenizer)
        self._tokenizer = load_tokenizer(study.tokenizer, None if trained is None else train_bpe(corpus.train, trained))
        self.train, _ = encode_stream(self._tokenizer, corpus.train)
        tokens, covered = encode_stream(self._tokenizer, corpus.validation)
        self.validation = Validation(tokens, covered, study.sequence_length, study.eval_tokens)

    @cached_property
    def shapes(self) -> Any:
        """The `LlamaConfig` of the model."""
        return model_config(shapes_of(self.study), self._tokenizer.vocab_size, self.study.sequence_length)

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


@dataclass(slots=True)
class _Times:
    optimizer: float
    steps: list[float]


def rate_factor(step: int, steps: int, warmup: float, least: float) -> float:
    """Share of the top rate at `step`: linear over the first `warmup` of the steps, then a cosine down to `least`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    share = (step - rising) / max(1, steps - rising)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * share))


def execute(run: Run, inputs: Inputs) -> dict[str, Any]:
    """Train one run and validate it; never raises but for KeyboardInterrupt.

    Returns:
        `status` ("ok", "diverged", "failed" or "unavailable"), `reason` where it is not "ok", and what was measured:
        `losses` of all steps in nats a token, `validation_loss`, `bits_per_byte`, `state_bytes` (all that the optimizer
        holds), `matrix_state_bytes` (of them, those of attention and MLP), their `parameters` and `matrix_elements`,
        `seconds` of the whole run and `optimizer_seconds` of its steps, `optimizer_ms` (mean of a step after the
        first, CPU time: on a GPU what it takes to start the work), `optimizer_ms_median`, the `device`, and the
        checksums of initial weights and of the text.
    """
    started = time.perf_counter()
    result: dict[str, Any] = {}
    try:
        torch.set_num_threads(1)
        torch.manual_seed(run.seed)
        _train(run, inputs, result)
    except ImportError as error:
        result |= {"status": "unavailable", "reason": f"cannot be imported: {error}"}
    except Exception as error:  # a peer may fail in any way, and the study goes on
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename.rpartition('site-packages/')[2]}:{last.lineno}"
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:500]} ({place})"}
    result["seconds"] = round(time.perf_counter() - started, 3)
    return result


def _train(run: Run, inputs: Inputs, result: dict[str, Any]) -> None:
    study = inputs.study
    model = build_model(inputs.shapes, run.seed, {}).to(inputs.device)  # type: ignore[arg-type]
    model.train()
    parameters = list(model.parameters())
    matrices, _ = split(model)
    result["parameters"] = sum(p.numel() for p in parameters)
    result["matrix_elements"] = sum(p.numel() for p in matrices.values())
    result["weights_checksum"] = _weights_checksum(model)
    result["device"] = "cpu" if inputs.device.type == "cpu" else torch.cuda.get_device_name(inputs.device)
    batches = inputs.batches(run)
    accumulation = run.tokens // study.sequence_length // min(study.micro_batch, run.tokens // study.sequence_length)
    optimizers = build(run.optimizer, model, run.lr, run.rest_lr, run.options)
    losses: list[float] = []
    result["losses"] = losses
    times = _Times(0.0, [])
    text = 0
    for step in range(run.steps):
        total = 0.0
        for micro_step in range(accumulation):
            batch = batches.batch(step, micro_step)
            text += checksum(batch)
            loss = token_losses(model, torch.from_numpy(batch).to(inputs.device)).mean() / accumulation
            loss.backward()
            total += loss.item()
        losses.append(round(total, 5))
        if not math.isfinite(total):
            losses.pop()
            result |= {"status": "diverged", "reason": f"loss {total} at step {step + 1} of {run.steps}"}
            return
        if study.clipping:
            torch.nn.utils.clip_grad_norm_(parameters, study.clipping)
        set_rates(optimizers, rate_factor(step, run.steps, study.warmup, study.min_lr_ratio))
        _step(optimizers, times)
        model.zero_grad(set_to_none=True)
    result["data_checksum"] = text
    result["state_bytes"] = bytes_held((vars(one) for one in optimizers), parameters)
    of_matrices = [one.state[p] for one in optimizers for p in matrices.values() if p in one.state]
    result["matrix_state_bytes"] = bytes_held(of_matrices, parameters)
    kept = times.steps[WARM_UP_STEPS:] or times.steps
    result["optimizer_seconds"] = round(times.optimizer, 4)
    result["optimizer_ms"] = round(1e3 * statistics.fmean(kept), 4)
    result["optimizer_ms_median"] = round(1e3 * statistics.median(kept), 4)
    loss_, bits = validate(model, inputs)
    if math.isfinite(loss_):
        result |= {"status": "ok", "validation_loss": loss_, "bits_per_byte": bits}
    else:
        result |= {"status": "diverged", "reason": f"validation loss {loss_} after the last step"}


def _step(optimizers: list[torch.optim.Optimizer], times: _Times) -> None:
    """One step, timed twice: on the clock, and in CPU time, which other work on the machine does not lengthen."""
    wall, own = time.perf_counter(), time.process_time()
    for optimizer in optimizers:
        optimizer.step()
    times.optimizer += time.perf_counter() - wall
    times.steps.append(time.process_time() - own)


@torch.no_grad()
def validate(model: torch.nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Mean loss in nats a token over the fixed validation windows, and bits a byte of their text."""
    model.eval()
    summed, tokens, text_bytes = 0.0, 0, 0
    for batch in inputs.validation.batches(0, 1, min(inputs.study.micro_batch, inputs.validation.windows)):
        losses = token_losses(model, torch.from_numpy(batch.tokens).to(inputs.device)).double().sum(dim=1).cpu()
        summed += float((losses * torch.from_numpy(batch.counted)).sum())
        tokens += int(batch.counted.sum()) * inputs.study.sequence_length
        text_bytes += int((batch.counted * batch.text_bytes).sum())
    return summed / tokens, summed / text_bytes / math.log(2)


def _weights_checksum(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

"""One run of a study: the same text and the same initial weights for every optimizer, on one thread."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
import traceback
from typing import Any

import torch
from torch import Tensor, nn

from gwt_dist.study.clock import Clock
from gwt_dist.study.held import bytes_held
from gwt_dist.study.inputs import Inputs
from gwt_dist.study.optimizers import build, set_rates, split
from gwt_dist.study.plan import Run
from gwt_dist.train.batches import checksum

LOOKS = 20  # times in a run that losses are read: on a GPU each waits for it
MOVES = 8  # times in its second half that the change of matrices is measured


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
        `update_rms` (root mean square of what a step takes from an element of them, over the rate, weight decay aside;
        median of several steps in the second half), `seconds` of the whole run, `optimizer_ms` and `iteration_ms`
        (medians of a step, see `clock`), the `device`, and the checksums of initial weights and of the text.
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
    model = inputs.model(run.seed)
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
    clock = Clock(inputs.device)
    moved = _Moves(list(matrices.values()), run)
    losses: list[float] = []
    result["losses"] = losses
    fresh: list[Tensor] = []  # losses that have not been read yet
    text = 0
    for step in range(run.steps):
        total = torch.zeros((), device=inputs.device)
        for micro_step in range(accumulation):
            batch = batches.batch(step, micro_step)
            text += checksum(batch)
            loss = inputs.losses(torch.from_numpy(batch).to(inputs.device)).mean() / accumulation
            loss.backward()
            total += loss.detach()
        fresh.append(total)
        if (step + 1) % max(1, run.steps // LOOKS) == 0 or step + 1 == run.steps:
            losses += [round(value, 5) for value in torch.stack(fresh).tolist()]
            fresh = []
            strange = next((i for i, value in enumerate(losses) if not math.isfinite(value)), None)
            if strange is not None:
                value, losses[strange:] = losses[strange], []
                result |= {"status": "diverged", "reason": f"loss {value} at step {strange + 1} of {run.steps}"}
                return
        if study.clipping:
            torch.nn.utils.clip_grad_norm_(parameters, study.clipping)
        factor = rate_factor(step, run.steps, study.warmup, study.min_lr_ratio)
        set_rates(optimizers, factor)
        moved.before(step)
        with clock.optimizer():
            for optimizer in optimizers:
                optimizer.step()
        moved.after(run.lr * factor)
        model.zero_grad(set_to_none=True)
        clock.iteration()
    result["data_checksum"] = text
    result["state_bytes"] = bytes_held((vars(one) for one in optimizers), parameters)
    of_matrices = [one.state[p] for one in optimizers for p in matrices.values() if p in one.state]
    result["matrix_state_bytes"] = bytes_held(of_matrices, parameters)
    result |= clock.read() | {"update_rms": moved.read()}
    loss_, bits = validate(model, inputs)
    if math.isfinite(loss_):
        result |= {"status": "ok", "validation_loss": loss_, "bits_per_byte": bits}
    else:
        result |= {"status": "diverged", "reason": f"validation loss {loss_} after the last step"}


class _Moves:
    """How far matrices go in a step."""

    def __init__(self, matrices: list[Tensor], run: Run) -> None:
        self._matrices, self._steps = matrices, run.steps
        self._decay = float(run.options.get("weight_decay") or 0.0)
        self._old: list[Tensor] = []
        self._found: list[Tensor] = []

    def before(self, step: int) -> None:
        if step >= self._steps // 2 and step % max(1, self._steps // (2 * MOVES)) == 0:
            self._old = [matrix.detach().clone() for matrix in self._matrices]

    def after(self, lr: float) -> None:
        if self._old and lr:
            squares = [
                (new - old * (1 - lr * self._decay)).double().square().sum()
                for new, old in zip(self._matrices, self._old, strict=True)
            ]
            count = sum(matrix.numel() for matrix in self._matrices)
            self._found.append((torch.stack(squares).sum() / count).sqrt().detach() / lr)
        self._old = []

    def read(self) -> float | None:
        return round(statistics.median(torch.stack(self._found).tolist()), 5) if self._found else None


@torch.no_grad()
def validate(model: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Mean loss in nats a token over the fixed validation windows, and bits a byte of their text."""
    model.eval()
    summed, tokens, text_bytes = 0.0, 0, 0
    for batch in inputs.validation.batches(0, 1, min(inputs.study.micro_batch, inputs.validation.windows)):
        losses = inputs.losses(torch.from_numpy(batch.tokens).to(inputs.device)).double().sum(dim=1).cpu()
        summed += float((losses * torch.from_numpy(batch.counted)).sum())
        tokens += int(batch.counted.sum()) * inputs.study.sequence_length
        text_bytes += int((batch.counted * batch.text_bytes).sum())
    return summed / tokens, summed / text_bytes / math.log(2)


def _weights_checksum(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
